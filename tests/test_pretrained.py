"""Models from every source: PyTorch checkpoints, run folders, our own files; and bad ones."""

import dataclasses
import io
import json
import pathlib
import re
import struct
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import ddim_jax as ddim
from ddim_jax import demo
from ddim_jax.networks import unet
from ddim_jax.networks.paper import PAPER
from ddim_jax.process import ScheduleConfig, predicts
from ddim_jax.storage.checkpoint import Checkpoints
from ddim_jax.storage.weights_file import HEADER_KEY, load_weights, save_weights
from ddim_jax.training.presets import PRESETS
from ddim_jax.weights import load_model, save_diffusers, save_model, to_facts
from ddim_jax.weights.pretrained import SHIPPED
from ddim_jax.weights.state_dict import from_state_dict, infer_config, to_state_dict
from tests import pseudo_weights, torch_writer
from tests.tiny import UNET as TINY
from tests.tiny import assert_same

PARAMS = unet.abstract_params(TINY)
FACTS = to_facts(ScheduleConfig(), TINY)
SMALLEST = dataclasses.replace(TINY, multipliers=(1,), attention_resolutions=())


def authors_state(shift=0.0):
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape), PARAMS)
    state = pseudo_weights.state({name: a.shape for name, a in to_state_dict(blank).items()})
    return {name: array + np.float32(shift) for name, array in state.items()}


STATE = authors_state()
EMA = authors_state(0.25)


def training_list(model=STATE, ema=EMA):
    parallel = {f"module.{name}": array for name, array in model.items()}
    optimiser = {"state": {0: {"step": 7, "exp_avg": np.zeros(3)}}, "param_groups": [{"lr": 2e-4}]}
    return [parallel, optimiser, 12, 7000, ema]


def write(path, value, **options):
    path.write_bytes(torch_writer.saved(value, **options))
    return path


# The layout.


def test_axes_of_every_kind_of_weight():
    p = from_state_dict(STATE, TINY)
    conv, ours = STATE["down.1.block.0.conv1.weight"], p["down"]["1"]["block"]["0"]["conv1"]
    assert conv.shape == (64, 32, 3, 3)  # out, in, height, width
    for o, i, y, x in [(0, 0, 0, 0), (63, 31, 2, 1), (5, 17, 0, 2)]:
        assert ours["kernel"][y, x, i, o] == conv[o, i, y, x]
    np.testing.assert_array_equal(ours["bias"], STATE["down.1.block.0.conv1.bias"])
    pointwise = STATE["up.1.block.1.nin_shortcut.weight"]
    assert pointwise.shape == (64, 96, 1, 1)
    shortcut = p["up"]["1"]["block"]["1"]["nin_shortcut"]["kernel"]
    assert shortcut.shape == (96, 64)
    assert shortcut[90, 7] == pointwise[7, 90, 0, 0]
    for name in "qkv":
        weight = STATE[f"mid.attn_1.{name}.weight"]
        assert p["mid"]["attn_1"][name]["kernel"][3, 40] == weight[40, 3, 0, 0]
    dense = STATE["temb.dense.0.weight"]
    assert dense.shape == (128, 32)
    assert p["temb"]["dense"]["0"]["kernel"][9, 100] == dense[100, 9]
    np.testing.assert_array_equal(p["norm_out"]["scale"], STATE["norm_out.weight"])


def test_state_dict_round_trip_and_linear_attention():
    params = from_state_dict(STATE, TINY)
    again = to_state_dict(params)
    assert again.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(again[name], array)
    flat = {name: a[:, :, 0, 0] if a.shape[2:] == (1, 1) else a for name, a in STATE.items()}
    assert_same(from_state_dict(flat, TINY), params)


@pytest.mark.parametrize("name", PAPER)
def test_networks_of_the_paper_are_inferred_from_shapes(name):
    from ddim_jax.training.presets import PRESETS

    config = PAPER[name]
    assert config == dataclasses.replace(PRESETS[name]().model, dropout=0.0)
    assert PRESETS[name]().schedule == ScheduleConfig()
    assert infer_config(state_of(unet.abstract_params(config)), config.image_size) == config


def state_of(abstract):
    """Zeros of a state dict that take no memory: these networks are large."""
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = ".".join(entry.key for entry in path)
        shape = leaf.shape[::-1][:2] + leaf.shape[:2] if leaf.ndim == 4 else leaf.shape[::-1]
        name = name.replace(".kernel", ".weight").replace(".scale", ".weight")
        names[name] = np.broadcast_to(np.float32(0), shape)
    return names


# PyTorch checkpoints.


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_file(tmp_path, in_zip, prefix):
    state = {prefix + name: array for name, array in STATE.items()}
    path = write(tmp_path / "m.ckpt", state, in_zip=in_zip)
    model = load_model(path, image_size=8, schedule=ScheduleConfig("cosine", 100))
    assert model.config == TINY
    assert (model.schedule.num_steps, model.prediction.kind) == (100, "eps")
    assert_same(model.params, from_state_dict(STATE, TINY))
    assert model.facts["weights"] == "as stored"


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "legacy"])
def test_training_list(tmp_path, in_zip):
    path = write(tmp_path / "ckpt.pth", training_list(), in_zip=in_zip)
    model = load_model(path, config=TINY, schedule=ScheduleConfig())
    assert_same(model.params, from_state_dict(EMA, TINY))
    assert (model.facts["weights"], model.facts["step"]) == ("moving average", 7000)
    model = load_model(path, config=TINY, schedule=ScheduleConfig(), ema=False)
    assert_same(model.params, from_state_dict(STATE, TINY))
    assert model.facts["weights"] == "last"
    write(path, training_list()[:4])  # trained without a moving average
    model = load_model(path, config=TINY, schedule=ScheduleConfig())
    assert_same(model.params, from_state_dict(STATE, TINY))


@pytest.fixture
def small_paper(monkeypatch):
    monkeypatch.setitem(PAPER, "cifar10", TINY)


@pytest.mark.parametrize(
    "name",
    [
        "ema_diffusion_cifar10_model/model-790000.ckpt",
        "diffusion_cifar10_model-790000.ckpt",
        "diffusion_lsun_church_model/model-4432000.ckpt",
    ],
)
def test_released_files_need_no_options(tmp_path, small_paper, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    model = load_model(write(tmp_path / name, STATE))
    assert model.config == TINY
    assert model.schedule.num_steps == 1000


def test_a_name_of_the_paper(tmp_path, small_paper):
    path = write(tmp_path / "m.ckpt", STATE)
    assert load_model(path, config="cifar10").config == TINY
    with pytest.raises(ValueError, match="neither the image size.*'cifar10'.*image_size="):
        load_model(path)
    with pytest.raises(ValueError, match=r"shapes are those of 'cifar10'"):
        load_model(path)
    with pytest.raises(ValueError, match="not this network's"):
        load_model(path, config="celeba64")


# Ours.


def test_run_folder_by_step_and_part(tmp_path):
    abstract = unet.abstract_params(SMALLEST)
    like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=5) as checkpoints:
        for step in (1, 2):
            state = {
                "params": jax.tree.map(lambda leaf, v=step: leaf + v, like),
                "ema": jax.tree.map(lambda leaf, v=step: leaf + 10 * v, like),
            }
            checkpoints.save(step, state, {}, to_facts(ScheduleConfig(), SMALLEST))

    def value(**options):
        return float(load_model(tmp_path / "run", **options).params["conv_in"]["bias"][0])

    assert value() == 20
    assert value(step=1) == 10
    assert value(step=1, ema=False) == 1
    with pytest.raises(ValueError, match="has no step 3; it has 1, 2"):
        value(step=3)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "edm"])
def test_save_model(tmp_path, prediction):
    params = unet.build(TINY, jax.random.key(0))[1]
    facts = {"score": 1.5, **FACTS}
    schedule = ddim.linear_schedule()
    own = {"sigma_data": 0.7} if prediction == "edm" else {}
    apply_fn = predicts(unet.make_apply(TINY), prediction, schedule=schedule, **own)
    model = ddim.Model(apply_fn, params, schedule, TINY, facts)
    save_model(tmp_path / "m.safetensors", model)
    again = load_model(tmp_path / "m.safetensors")
    assert_same(again.params, params)
    assert (again.config, again.prediction, again.facts["score"]) == (TINY, model.prediction, 1.5)
    if prediction == "edm":
        with pytest.raises(ValueError, match="diffusers has no prediction type 'edm'"):
            save_diffusers(tmp_path / "theirs", again)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_model(tmp_path / "m.safetensors", model)
    save_model(tmp_path / "m.safetensors", model, overwrite=True, float16=True)
    for save, path in ((save_model, "other.safetensors"), (save_diffusers, "other")):
        with pytest.raises(ValueError, match="not the schedule of this model"):
            save(tmp_path / path, model._replace(schedule=ddim.cosine_schedule()))
        assert not (tmp_path / path).exists()
    with pytest.raises(ValueError, match="no model and schedule"):
        save_model(tmp_path / "other.safetensors", model._replace(facts={}))


def test_oblong_images(tmp_path):
    """A network of 8×16 images remembers them, whatever file it goes through."""
    config = dataclasses.replace(TINY, image_size=(8, 16))
    params, chosen = unet.build(config, jax.random.key(0))[1], ScheduleConfig()
    facts = to_facts(chosen, config)
    model = ddim.Model(unet.make_apply(config), params, chosen.build(), config, facts)
    save_model(tmp_path / "m.safetensors", model)
    save_diffusers(tmp_path / "folder", model)
    write(tmp_path / "m.ckpt", to_state_dict(params))
    for name, options in [
        ("m.safetensors", {}),
        ("folder", {}),
        ("m.ckpt", {"image_size": (8, 16), "schedule": chosen}),
    ]:
        again = load_model(tmp_path / name, **options)
        assert again.image_shape == (8, 16, 3)
        assert again.config.resolutions == config.resolutions
        assert_same(again.params, params)


def test_a_run_that_does_not_say_its_network(tmp_path):
    params = unet.build(SMALLEST, jax.random.key(0))[1]
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"params": params, "ema": params}, {}, {"train": {}})
    with pytest.raises(ValueError, match=r"(?s)no facts.*restore_part\('.*checkpoints', 'ema'\)"):
        load_model(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no noise schedule"):
        load_model(tmp_path / "run", config=SMALLEST)
    model = load_model(tmp_path / "run", config=SMALLEST, schedule=ScheduleConfig())
    assert_same(model.params, params)
    assert model.config == SMALLEST


def test_what_is_stored_can_be_replaced(tmp_path):
    params = unet.build(TINY, jax.random.key(0))[1]
    save_weights(tmp_path / "m", params, FACTS)  # as written before prediction was stored
    assert load_model(tmp_path / "m").prediction.kind == "eps"
    half = dataclasses.replace(TINY, dtype="bfloat16")
    model = load_model(
        tmp_path / "m", config=half, schedule=ScheduleConfig("cosine", 10), prediction="v"
    )
    assert (model.config.dtype, model.schedule.num_steps) == ("bfloat16", 10)
    assert model.facts["schedule"]["kind"] == "cosine"
    assert model.prediction.kind == model.facts["prediction"] == "v"
    x, t = jnp.zeros((1, *TINY.image_shape)), jnp.ones(1, jnp.int32)
    for dtype, computed in (("bfloat16", True), ("float32", False), (None, False)):
        model = load_model(tmp_path / "m", dtype=dtype)
        assert ("bf16[" in str(jax.make_jaxpr(model.apply_fn)(model.params, x, t))) == computed
        assert model.facts["model"]["dtype"] == model.config.dtype
        assert_same(model.params, params)
    with pytest.raises(ValueError, match="m: dtype must be 'float32' or 'bfloat16', got 'half'"):
        load_model(tmp_path / "m", dtype="half")


def test_the_shipped_model():
    model = load_model("digits")
    assert (model.image_shape, model.prediction.kind) == ((8, 8, 1), "v")
    _, saved = load_weights(SHIPPED / "digits.safetensors")
    assert "norm_groups" not in saved["model"]  # it is older than that choice
    assert (model.config.norm_groups, model.label_names) == (32, None)
    labelled = load_model("digits-labels")
    assert (labelled.config.norm_groups, labelled.label_names) == (8, tuple("0123456789"))
    with pytest.raises(ValueError, match="step=3 is for a run folder"):
        load_model("digits", step=3)
    with pytest.raises(ValueError, match="ema=False is for a .* is a file of save_model"):
        load_model("digits", ema=False)
    with pytest.raises(ValueError, match="image_size is for a .* is a file of save_model"):
        load_model("digits", image_size=8)


def test_the_shipped_colours():
    model = load_model("cifar10-small")
    assert (model.image_shape, model.prediction.kind) == ((32, 32, 3), "v")
    assert model.config == PRESETS["cifar10-small"]().model
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert model.label_names == tuple(names.split())
    assert set(demo.CLASSES) <= set(names.split())
    assert (SHIPPED / "cifar10-small.safetensors").stat().st_size < 12e6
    student = load_model("cifar10-small-4")
    assert student.tau.tolist() == [250, 500, 750, 1000]
    assert (student.config, student.label_names) == (model.config, model.label_names)


# Bad files and arguments: what is in the file, options of load_model, what the message says.


def ours(metadata, arrays=None, **header):
    """A weights file of ours with that header."""
    text = json.dumps({"format": 1, "float16": [], "metadata": metadata, **header})
    return safetensors.numpy.save(arrays or {"w": np.zeros(1)}, {HEADER_KEY: text})


def without(name):
    return {key: array for key, array in STATE.items() if key != name}


def with_(**arrays):
    return {**STATE, **{name.replace("__", "."): array for name, array in arrays.items()}}


def torch(value):
    return lambda: torch_writer.saved(value)


def compressed():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    return file.getvalue()


PAPERS = {"schedule": ScheduleConfig()}
SIZED = {"image_size": 8, **PAPERS}
NAN = np.full((32,), np.nan, np.float32)
EVIL = torch_writer.Call("posix", "system", "touch pwned")
FOREIGN = {"layer1.0.conv1.weight": np.zeros((4, 4, 3, 3)), "fc.bias": np.zeros(4)}
RAGGED = with_(down__1__block__0__conv1__weight=np.zeros((48, 32, 3, 3), np.float32))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
BAD = {
    "a.ckpt: empty": (lambda: b"", SIZED, "begins like neither"),
    "a.ckpt: text": (lambda: b"<html>404</html>", SIZED, "a web page, as of a download"),
    "a.ckpt: runs a command": (torch(EVIL), SIZED, "posix.system, which is not plain data"),
    "a.ckpt: list that runs one": (
        torch([STATE, EVIL, 1, 2, EMA]), SIZED, "posix.system, which is not plain data"),
    "a.ckpt: whole module": (
        torch(torch_writer.Call("models.diffusion", "Model")), SIZED, "models.diffusion.Model"),
    "a.ckpt: cut short": (lambda: torch_writer.saved(STATE)[:5000], SIZED, "zip"),
    "a.ckpt: compressed": (compressed, SIZED, "compressed or encrypted"),
    "a.ckpt: a number": (torch({"epoch": 3}), SIZED, r"a dict of 'epoch' \(int\) where"),
    "a.ckpt: no dict": (torch("weights"), SIZED, "holds a str where a state dict belongs"),
    "a.ckpt: empty dict": (torch({}), SIZED, "(?s)state dict belongs|conv_in.weight"),
    "a.ckpt: list of two": (torch([STATE, EMA]), SIZED, r"a list of 2, not \[model, optimiser"),
    "a.ckpt: other network": (
        torch(FOREIGN), SIZED, "not the names of Ho et al.*diffusers.*it has fc.bias, layer1"),
    "a.ckpt: other network, no options": (torch(FOREIGN), {}, "not the names of Ho et al"),
    "a.ckpt: missing": (
        torch(without("mid.attn_1.q.bias")), SIZED, "1 missing: mid.attn_1.q.bias"),
    "a.ckpt: left over": (
        torch(with_(logvar=np.zeros(1000))), SIZED, "1 left over: logvar"),
    "a.ckpt: another shape": (
        torch(with_(norm_out__bias=np.zeros(33, np.float32))),
        SIZED,
        r"norm_out.bias is \(33,\), not \(32,\)",
    ),
    "a.ckpt: not finite": (torch(with_(norm_out__bias=NAN)), SIZED, "not finite.*: norm_out.bias"),
    "a.ckpt: learned variance": (
        torch(with_(conv_out__weight=np.zeros((6, 32, 3, 3)), conv_out__bias=np.zeros(6))),
        SIZED,
        r"conv_out.bias is \(6,\), not \(3,\)",
    ),
    "a.ckpt: ragged widths": (torch(RAGGED), SIZED, r"widths \[32, 48\] are not multiples"),
    "a.ckpt: no size": (torch(STATE), PAPERS, "neither the image size nor the noise schedule"),
    "a.ckpt: no schedule": (torch(STATE), {"image_size": 8}, "holds no noise schedule"),
    "a.ckpt: odd size": (torch(STATE), {**SIZED, "image_size": 9}, "multiple of 2"),
    "a.ckpt: other size": (
        torch(STATE), {**PAPERS, "config": PAPER["cifar10"]}, "of another shape|missing"),
    "a.ckpt: size twice": (torch(STATE), {**SIZED, "config": TINY}, "in place of config"),
    "a.ckpt: unknown name": (
        torch(STATE), {"config": "imagenet"}, "unknown config 'imagenet'; choose one of cifar10"),
    "a.ckpt: unknown prediction": (
        torch(STATE), {**SIZED, "prediction": "flow"}, "unknown prediction type 'flow'"),
    "a.ckpt: one set": (torch(STATE), {**SIZED, "ema": False}, "one set of weights only"),
    "a.ckpt: step": (torch(STATE), {**SIZED, "step": 5}, "step=5 is for a run folder"),
    "a.ckpt: bad schedule": (
        torch(STATE), {**SIZED, "schedule": ScheduleConfig("linear", 10, 0.5, 0.1)}, "beta_start"),
    "a.ckpt: words": (lambda: b"hello", SIZED, "begins like neither"),
    "a.ckpt: pointer": (lambda: POINTER, SIZED, "a.ckpt.*pointer of Git LFS.*git lfs pull"),
    "a.safetensors: pointer": (lambda: POINTER, SIZED, "a.safetensors.*pointer of Git LFS"),
    "a.safetensors: web page": (
        lambda: b"\n<!DOCTYPE html><html>404</html>", SIZED, "a web page.*download it again"),
    "config.json: settings": (lambda: b"{}", {}, "is settings, not weights: name the folder"),
    "a.safetensors: empty": (lambda: b"", {}, "not an intact safetensors file"),
    "a.safetensors: huge header": (
        lambda: struct.pack("<Q", 2**60) + b"{}", {}, "not an intact safetensors file"),
    "a.safetensors: foreign": (
        lambda: struct.pack("<Q", 2) + b"{}", {}, "a dict of nothing where a state dict belongs"),
    "a.safetensors: no model": (lambda: ours({"score": 3}), {}, "no model and schedule"),
    "a.safetensors: odd model": (
        lambda: ours({**FACTS, "model": [1]}), {}, "no model and schedule"),
    "a.safetensors: odd header": (lambda: ours([1, 2]), {}, "damaged header"),
    "a.safetensors: odd format": (lambda: ours(FACTS, format="new"), {}, "damaged header"),
    "a.safetensors: later format": (lambda: ours(FACTS, format=9), {}, "format 9, .* update"),
    "a.safetensors: a path in a path": (
        lambda: ours(FACTS, {"a": np.zeros(1), "a/b": np.zeros(1)}), {}, "damaged header"),
    "a.safetensors: other network": (lambda: ours(FACTS), {}, "params are not this network's"),
    "a.safetensors: odd prediction": (
        lambda: ours({**FACTS, "prediction": "noise"}), {}, "unknown prediction type 'noise'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_weights_are_refused(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    make, options, says = BAD[what]
    path = pathlib.Path(what.partition(":")[0])
    path.write_bytes(make())
    with pytest.raises(ValueError, match=says) as error:
        load_model(path, **options)
    assert re.search(r"a\.(ckpt|safetensors)|config|image_size", str(error.value))
    assert list(tmp_path.iterdir()) == [tmp_path / path]  # nothing was run


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model.*PyTorch file.*\(cifar10-small, .*, digits"
    ):
        load_model(tmp_path / "none.ckpt")


# Against PyTorch itself.


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "legacy"])
def test_checkpoints_that_torch_saves(tmp_path, in_zip):
    """CIFAR-10 size: the training list by torch.save, its network by diffusers with one weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        why = "needs the peers extra: pip install 'ddim_jax[peers]'"
        torch = pytest.importorskip("torch", reason=why)
    config = PAPER["cifar10"]
    params = unet.build(config, jax.random.key(0))[1]
    state = {name: torch.tensor(array) for name, array in to_state_dict(params).items()}
    model = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    value = [model, optimiser.state_dict(), 3, 7000, state]
    path = tmp_path / "diffusion_cifar10_model-7000.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=in_zip)
    loaded = load_model(path)
    assert loaded.config == config
    assert_same(loaded.params, params)
    torch.save(model, path, _use_new_zipfile_serialization=in_zip)
    loaded = load_model(path)
    assert_same(loaded.params, jax.tree.map(lambda leaf: leaf + 1, params))
