"""A sampler as a file: what it takes and gives, alone with JAX, and what is refused."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ddim_jax as ddim
from ddim_jax.generation.artifact import export_sampler, load_sampler
from ddim_jax.generation.drawing import conditioned
from ddim_jax.networks.unet import UNetConfig, build
from ddim_jax.storage.weights_file import read_safetensors
from ddim_jax.weights import to_facts
from tests.test_cli import command as command
from tests.tiny import affine, affine_params

SCHEDULE = ddim.linear_schedule(1000)
TAU = [1, 500, 1000]
AFFINE = ddim.Model(affine, affine_params(), SCHEDULE)
KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
X = ddim.initial_noise(KEY, 3, SHAPE)

# What a user writes who has JAX and nothing else; here our package and Flax cannot be imported.
ALONE = """
import sys
for name in ("ddim_jax", "flax", "optax", "safetensors", "orbax"):
    sys.modules[name] = None
import jax, numpy as np
from jax import export
with open(sys.argv[1], "rb") as file:
    sampler = export.deserialize(bytearray(file.read()))
x_T, labels, scale, key = np.load(sys.argv[2]).values()
np.save(sys.argv[3], jax.jit(sampler.call)(x_T, key, labels, scale))
"""


def assert_close(a, b):
    """To a rounding a step: as these tests compile, XLA divides by constants by their inverses."""
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def classes():
    """A small U-Net with three classes, whose output is not 0."""
    config = UNetConfig(8, 1, 32, (1,), 1, (), 0.0, num_classes=3)
    apply_fn, params = build(config, KEY)
    params["conv_out"]["kernel"] = jax.random.normal(KEY, params["conv_out"]["kernel"].shape) / 9
    facts = to_facts(ddim.ScheduleConfig(), config, "eps")
    return ddim.Model(ddim.predicts(apply_fn), params, SCHEDULE, config, facts)


def test_alone_with_jax_it_draws_the_same_bits(classes, tmp_path, one_device):
    path = tmp_path / "m.stablehlo"
    facts = export_sampler(classes, TAU, path, eta=0.5)
    assert [value["name"] for value in facts["inputs"]] == ["x_T", "key", "labels", "scale"]
    x_T, key = ddim.initial_noise(KEY, 4, (8, 8, 1)), jax.random.key(5)
    labels, scale = np.int32([0, 1, 2, 3]), np.float32(2.0)
    np.savez(tmp_path / "in.npz", x_T, labels, scale, jax.random.key_data(key))
    arguments = [str(tmp_path / name) for name in ("m.stablehlo", "in.npz", "out.npy")]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd="/", env=environ)
    sampler = ddim.make_sampler(conditioned(classes), TAU, eta=0.5)
    ours = sampler(x_T, key, labels=labels, guidance=scale)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), ours)
    assert float(jnp.std(ours)) > 0.1


def test_what_stands_beside_describes_it(tmp_path):
    path = tmp_path / "a.stablehlo"
    facts = export_sampler(AFFINE, TAU, path, image_shape=SHAPE)
    assert json.loads((tmp_path / "a.json").read_text()) == facts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.stablehlo"]
    assert facts["inputs"] == [{"name": "x_T", "shape": ["b", 4, 4, 1], "dtype": "float32"}]
    assert facts["sampling"] == {"method": "ddim", "eta": 0.0, "tau": TAU, "clip": False}
    assert (facts["weights"]["parameters"], facts["weights"]["file"]) == (2, None)
    exported = export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [str(size) for size in exported.in_avals[0].shape] == ["b", "4", "4", "1"]
    sampler = load_sampler(path)
    assert sampler.facts == facts
    ours = ddim.make_sampler(AFFINE, TAU)
    for batch in (X, X[:1]):  # one file, any batch
        assert_close(sampler.call(batch), ours(batch))


def test_from_a_seed_it_draws_what_the_command_draws(tmp_path):
    path, method = tmp_path / "a.stablehlo", ddim.ddpm("large")
    export_sampler(
        AFFINE, TAU, path, method="ddpm-large", clip=True, start="seed", image_shape=SHAPE
    )
    numbers = np.uint32([7, 2])
    drawn = load_sampler(path).call(np.uint32(3), numbers)
    keys = jax.random.split(jax.random.key(3))
    clipped = ddim.predicts(AFFINE, x0_fn=ddim.clip_x0(1.0))
    ours = ddim.make_sampler(clipped, TAU, method=method)(
        ddim.initial_noise(keys[0], numbers, SHAPE), ddim.image_keys(keys[1], numbers)
    )
    assert_close(drawn, ours)
    assert float(abs(drawn).max()) <= 1
    np.testing.assert_array_equal(load_sampler(path).call(3, [7, 2]), drawn)
    with pytest.raises(ValueError, match="seed must be uint32, got int64: -3"):
        load_sampler(path).call(-3, numbers)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 0.0), ("float16", 2.0**-11)])
def test_weights_beside(tmp_path, dtype, eps):
    model = AFFINE._replace(params={"w": jnp.float32(0.3), "b": jnp.float32(-0.1)})
    path = tmp_path / "a.stablehlo"
    export_sampler(model, TAU, path, weights="beside", dtype=dtype, image_shape=SHAPE)
    arrays, _ = read_safetensors(tmp_path / "a.safetensors")
    assert {name: a.dtype.name for name, a in arrays.items()} == {"b": dtype, "w": dtype}
    assert arrays["w"] == pytest.approx(0.3, rel=eps + 1e-7)
    kept = {name: jnp.float32(a) for name, a in arrays.items()}
    assert_close(load_sampler(path).call(X), ddim.make_sampler(model, TAU)(X, params=kept))
    exported = export.deserialize(bytearray(path.read_bytes()))
    other = {name: 2 * a for name, a in arrays.items()}  # they are an argument, not in the file
    twice = exported.call(other, X)
    assert float(abs(twice - load_sampler(path).call(X)).max()) > 0.1


def test_bfloat16_computes_in_it(classes, tmp_path):
    path = tmp_path / "m.stablehlo"
    facts = export_sampler(classes, TAU, path, dtype="bfloat16", guidance=False, platforms=["tpu"])
    assert facts["platforms"] == ["tpu"]
    exported = export.deserialize(bytearray(path.read_bytes()))
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text
    assert all("bf16" in line for line in text.splitlines() if "stablehlo.convolution" in line)
    assert exported.out_avals[0].dtype == jnp.float32
    assert [str(aval.dtype) for aval in exported.in_avals] == ["float32", "int32"]


def refuse_overwriting(path):
    path.with_suffix(".json").write_text("mine")
    export_sampler(AFFINE, TAU, path, image_shape=SHAPE)


def load_after(change):
    def act(path):
        export_sampler(AFFINE, TAU, path, weights="beside", image_shape=SHAPE)
        change(path)
        load_sampler(path)

    return act


def described(**changes):
    def change(path):
        file = path.with_suffix(".json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return load_after(change)


def written(**options):
    return lambda path: export_sampler(
        *(AFFINE, options.pop("tau", TAU), options.pop("path", path)),
        **{"image_shape": SHAPE, **options},
    )


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (refuse_overwriting, FileExistsError, "a.json exists"),
        (written(path="a.bin"), ValueError, "as a file .stablehlo, got a.bin"),
        (written(path="no/a.stablehlo"), FileNotFoundError, "there is no folder no"),
        (written(method="cubic"), ValueError, "unknown method 'cubic'"),
        (written(method="ddpm", eta=0.5), ValueError, "has no eta"),
        (written(method=ddim.ddim(), eta=0.5), ValueError, "eta or a method, not both"),
        (written(tau=[1, 1001]), ValueError, "1..T"),
        (written(image_shape=None), ValueError, "without a config .* image_shape"),
        (written(image_shape=(4, 0, 1)), ValueError, r"above 0, got \(4, 0, 1\)"),
        (written(platforms=["cpu", "abacus"]), ValueError, "platforms must be some of .*abacus"),
        (written(platforms=[]), ValueError, r"platforms must be some of .* got \[\]"),
        (written(platforms=["cpu", "cpu"]), ValueError, "each once"),
        (written(dtype="int8"), ValueError, "dtype must be one of .* 'int8'"),
        (written(dtype="bfloat16"), ValueError, "has no config"),
        (written(dtype="bfloat16", weights="beside"), ValueError, "go inside"),
        (written(weights="elsewhere"), ValueError, "weights must be one of"),
        (written(start="end"), ValueError, "start must be one of"),
        (load_sampler, FileNotFoundError, "no .*a.stablehlo: a sampler is"),
        (
            load_after(lambda path: path.write_bytes(path.read_bytes()[:-1])),
            ValueError,
            "SHA-256 differs",
        ),
        (
            load_after(lambda path: path.with_suffix(".json").write_text("{}")),
            ValueError,
            "describes no sampler",
        ),
        (described(kind="a cake"), ValueError, "describes a cake, not ddim_jax sampler"),
        (described(format="new"), ValueError, "describes no sampler"),
        (described(format=2), ValueError, "format 2, this version reads up to 1"),
        (described(platforms=["tpu"]), ValueError, "is for tpu, and this is cpu"),
        (
            load_after(lambda path: path.with_suffix(".safetensors").unlink()),
            (FileNotFoundError, ValueError),
            "a.safetensors",
        ),
    ],
)
def test_bad_input(tmp_path, act, error, match):
    with pytest.raises(error, match=match):
        act(tmp_path / "a.stablehlo")


def test_what_a_loaded_sampler_refuses(tmp_path, monkeypatch):
    path = tmp_path / "a.stablehlo"
    export_sampler(AFFINE, TAU, path, 1.0, image_shape=SHAPE)
    with pytest.raises(TypeError, match=r"takes \(x_T, key\), got 1"):
        load_sampler(path).call(X)
    as_words = load_sampler(path).call(X, jax.random.key_data(KEY))
    np.testing.assert_array_equal(load_sampler(path).call(X, KEY), as_words)
    export_sampler(AFFINE, TAU, path, image_shape=SHAPE, overwrite=True)
    with pytest.raises(ValueError, match=r"(?i)shape"):
        load_sampler(path).call(X[:, :2])
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install flatbuffers"):
        load_sampler(path)


def test_the_command(command, tmp_path):
    said = command("export digits d.stablehlo --steps 2 --from-seed --float16 --platforms cpu tpu")
    assert "S = 2" in said
    assert "it takes seed uint32(), numbers uint32(b)" in said
    facts = json.loads(pathlib.Path("d.json").read_text())
    assert (facts["platforms"], facts["weights"]["dtype"]) == (["cpu", "tpu"], "float16")
    assert facts["schedule"]["num_steps"] == 1000
    pathlib.Path("kept.safetensors").write_text("weights of another")
    for line, says in [
        ("digits d.stablehlo", "d.stablehlo exists; choose another, or pass --overwrite"),
        ("nothing e.stablehlo --steps 0", "--steps must be at least 1"),
        ("nothing e.stablehlo --method cubic", "unknown method 'cubic'"),
        ("digits e.stablehlo --steps 1001", "S = 1001 and T = 1000"),
        ("nothing e.stablehlo --float16 --bfloat16", "not both"),
        ("nothing e.stablehlo --bfloat16 --dtype float32", "leave out --dtype float32"),
        ("nothing e.safetensors --steps 3", "how to sample is for a whole sampler, e.stablehlo"),
        ("nothing no/e.stablehlo", "there is no folder no"),
        ("mine.safetensors mine.stablehlo --beside --overwrite", "the model itself"),
        (
            "nothing kept.stablehlo --beside",
            "kept.safetensors exists; choose another, or pass --ov",
        ),
        ("nothing e.stablehlo", "no model 'nothing'"),
    ]:
        with pytest.raises(SystemExit, match=says):
            command(f"export {line}")
    with pytest.raises(SystemExit) as stop:
        command("export nothing e.stablehlo --platforms abacus")
    assert stop.value.code == 2
