"""Folders of images: the same on any number of devices, after any kill, and never overwritten."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import ddim_jax as ddim
from ddim_jax.generation import drawing
from ddim_jax.generation.drawing import make_draw
from ddim_jax.generation.shards import generate, iter_shards
from ddim_jax.networks.unet import UNetConfig
from ddim_jax.pictures.images import to_uint8
from ddim_jax.sampling.methods import find_method
from tests.tiny import unet_model

pytestmark = pytest.mark.usefixtures("one_trace")
SHAPE = (4, 4, 1)
CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective|reduce-scatter|ragged|send|recv"


def linear(params, x, t, labels=None):
    """ε = w x, shifted by the class."""
    shift = 0.0 if labels is None else labels[:, None, None, None].astype(x.dtype)
    return params["w"] * x + shift


SCHEDULE = ddim.schedule_from_betas(np.linspace(0.01, 0.3, 20))


def toy(apply_fn=linear, w=0.25, num_classes=None):
    config = UNetConfig(
        4, 1, 32, (1,), attention_resolutions=(), num_blocks=1, num_classes=num_classes
    )
    return ddim.Model(apply_fn, {"w": jnp.float32(w)}, SCHEDULE, config, {})


@pytest.fixture
def draw(tmp_path):
    """Draws 21 images of the toy model in shards of 4, into a folder named once."""

    def run(name="images", model=None, num_images=21, steps=5, **changes):
        small = {"batch_size": 2, "shard_size": 4, "progress": False, **changes}
        return generate(model or toy(), tmp_path / name, num_images, steps, **small)

    return run


@pytest.fixture(scope="module")
def network():
    """A U-Net of 8×8 pixels."""
    return unet_model("v")


def images(folder):
    return np.concatenate(list(iter_shards(folder)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def x_T(numbers, seed=0, shape=SHAPE):
    return ddim.initial_noise(jax.random.split(jax.random.key(seed))[0], numbers, shape)


# The images.


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("spacing", "tau"), [("linear", [5, 10, 15, 20]), ("quadratic", [1, 5, 11, 20])]
)
def test_of_a_linear_network_they_are_a_multiple_of_x_T(draw, spacing, tau, seed):
    alpha_bar = np.concatenate([[1], np.cumprod(1 - np.linspace(0.01, 0.3, 20))])
    factor = 1.0
    for t, s in zip(tau[::-1], [*tau[-2::-1], 0]):
        x_0 = (1 - np.sqrt(1 - alpha_bar[t]) * 0.25) / np.sqrt(alpha_bar[t])
        factor *= np.sqrt(alpha_bar[s]) * x_0 + np.sqrt(1 - alpha_bar[s]) * 0.25
    exact = np.clip(127.5 * (1 + factor * np.asarray(x_T(21, seed), np.float64)), 0, 255)
    drawn = images(draw(steps=4, spacing=spacing, seed=seed))
    assert drawn.shape == (21, *SHAPE)
    assert drawn.dtype == np.uint8
    assert np.abs(drawn - exact).max() < 0.5 + 1e-3
    assert 0 < np.mean(drawn == 255) < 0.5


@pytest.mark.parametrize(
    "options",
    [{"eta": 0.5}, {"method": "ddpm-large", "clip": True}, {"method": "pf-euler"}],
    ids=str,
)
def test_they_are_those_of_a_plain_sampler(network, draw, options):
    folder = draw(
        model=network, num_images=12, steps=3, seed=7, devices=jax.devices()[:2], **options
    )
    key, noise_key = jax.random.split(jax.random.key(7))
    model = ddim.predicts(network, x0_fn=ddim.clip_x0()) if "clip" in options else network
    method = find_method(options.get("method", "ddim"), options.get("eta", 0.0))
    noise_key = None if "pf-euler" in options.values() else noise_key
    sampler = ddim.make_sampler(model, [333, 666, 1000], method=method)
    plain = sampler(ddim.initial_noise(key, 12, (8, 8, 1)), noise_key)
    pixels = np.clip(np.rint(127.5 * (np.asarray(plain) + 1)), 0, 255)
    differs = pixels != images(folder)
    assert np.abs(pixels - images(folder)).max() <= 1
    assert differs.mean() < 0.01


def test_the_number_of_devices_changes_no_bit(network, draw):
    folders = [
        draw(
            f"on {n}",
            network,
            24,
            2,
            eta=1.0,
            batch_size=4,
            shard_size=8,
            devices=jax.devices()[:n],
        )
        for n in (1, 2, 8)
    ]
    assert len(contents(folders[0])) == 4
    for folder in folders[1:]:
        assert contents(folder) == contents(folders[0])


@pytest.mark.slow
def test_the_batch_size_changes_rounding_alone(network, draw):
    a, b = (
        images(draw(f"by {size}", network, 120, 4, batch_size=size, shard_size=120)).astype(int)
        for size in (8, 15)
    )
    assert np.abs(a - b).max() <= 1
    assert (
        np.mean(a != b) < 3e-3
    )  # where x differs by 1e-5, at most one pixel in 1 / (127.5 · 2e-5)


def test_tau_itself_may_be_given(draw):
    tau = ddim.timesteps(
        20, 12, "quad", exact=False
    )  # of the authors: 12 steps, 10 of them distinct
    assert len(tau) == 10
    model = toy()
    plain = ddim.sample(lambda x, t: linear(model.params, x, t), x_T(21), model.schedule, tau)
    folder = draw(steps=tau)
    np.testing.assert_array_equal(images(folder), to_uint8(plain))
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["tau"] == tau.tolist()
    assert draw(steps=tau.tolist()) == folder
    with pytest.raises(ValueError, match=r"settings; choose another:\n  tau: saved \[1, 2"):
        draw(steps=9)
    with pytest.raises(ValueError, match=r"settings; choose another:\n  tau: saved \[1, 2"):
        draw(steps=[1, 2, 3, 4, 5, 6, 7, 8, 9, 11])


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_networks_that_predict_x_0_or_v(draw, prediction):
    """The network that stands for the same ε draws the same images."""
    model = toy()

    def other(params, x, t):
        c = ddim.coefficients(model.schedule, t, t * 0)
        x_0, eps = ddim.to_x0_eps(c, x, linear(params, x, t))
        return ddim.from_x0_eps(c, x_0, eps, prediction)

    expected = images(draw("eps")).astype(int)
    folder = draw(model=ddim.predicts(toy(other), prediction))
    assert np.abs(images(folder) - expected).max() <= 1
    with pytest.raises(ValueError, match=f"model.prediction: saved '{prediction}', now 'eps'"):
        draw(model=toy(other))


def test_classes_cycle(draw):
    folder = draw(model=toy(num_classes=3), labels="all")
    labels = np.arange(21) % 3
    model = toy()
    plain = ddim.sample(
        lambda x, t: linear(model.params, x, t, labels), x_T(21), model.schedule, [4, 8, 12, 16, 20]
    )
    np.testing.assert_array_equal(images(folder), to_uint8(plain))
    with pytest.warns(
        UserWarning, match="has 3 classes, does not say .* asked for none: choose labels=0"
    ):
        without = images(draw("without", toy(num_classes=3)))
    np.testing.assert_array_equal(without, images(draw("plain")))
    assert (without[labels == 0] == images(folder)[labels == 0]).all()
    assert (without[labels == 1] != images(folder)[labels == 1]).any()


def test_one_class_and_guidance(draw):
    """ε is w x + y / 10, so guided it is w x + (∅ + g (y − ∅)) / 10; here ∅ = 3 and y = 2."""

    def network(params, x, t, labels):
        return params["w"] * x + labels[:, None, None, None].astype(x.dtype) / 10

    def expected(shift):
        def denoise(x, t):
            return 0.25 * x + shift / 10

        tau = [4, 8, 12, 16, 20]
        return to_uint8(ddim.sample(denoise, x_T(21), SCHEDULE, tau))

    model = toy(network, num_classes=3)
    for guidance, shift in [(None, 2), (1.0, 2), (0.0, 3), (2.5, 0.5)]:
        drawn = images(draw(f"guided {guidance}", model, labels=2, guidance=guidance)).astype(int)
        assert np.abs(drawn - np.asarray(expected(shift))).max() <= 1
    assert np.abs(drawn - np.asarray(expected(2))).max() > 10
    none = images(draw("none", model, labels=3)).astype(int)  # said to be none: no warning
    assert np.abs(none - np.asarray(expected(3))).max() <= 1
    with pytest.raises(ValueError, match=r"guidance: saved 2.5, now 2.0\n  labels: saved 2, now"):
        draw("guided 2.5", model, labels="all", guidance=2.0)


def test_the_images_are_as_oblong_as_the_model_s(draw):
    config = dataclasses.replace(toy().config, image_size=(4, 6))
    folder = draw(model=toy()._replace(config=config))
    assert images(folder).shape == (21, 4, 6, 1)
    assert json.loads((folder / "settings.json").read_text())["image_shape"] == [4, 6, 1]


# The program.


def hlo(function, *args):
    return function.lower(*args).compile().as_text()


def test_the_compiled_sampler_has_no_collective(network):
    mesh = Mesh(np.array(jax.devices()), ("images",))
    function = make_draw(network, mesh, ddim.timesteps(1000, 3), find_method("ddpm"))
    keys = jax.random.split(jax.random.key(0))
    text = hlo(function, network.params, keys, np.arange(32, dtype=np.uint32), *[None] * 3)
    assert "num_partitions=8" in text
    assert "f32[4,8,8,1]" in text  # a slice of 4 images on each of the 8
    assert "f32[32,8,8,1]" not in text
    assert not re.findall(rf"= \S+ (?:{COLLECTIVES})[\w-]*\(", text)


def test_a_collective_would_be_seen():
    mesh = Mesh(np.array(jax.devices()), ("images",))
    split = PartitionSpec("images")
    function = jax.shard_map(
        lambda x: x - jax.lax.pmean(x, "images"), mesh=mesh, in_specs=split, out_specs=split
    )
    assert re.findall(rf"= \S+ (?:{COLLECTIVES})[\w-]*\(", hlo(jax.jit(function), jnp.ones(8)))


def test_it_is_traced_once_for_all_batches(draw):
    calls = []

    def counted(params, x, t):
        calls.append(x.shape)
        return linear(params, x, t)

    draw("one batch", toy(counted), 2, devices=jax.devices()[:1])
    once = len(calls)
    draw("many, and a ragged one", toy(counted), 21, devices=jax.devices()[:2])
    assert len(calls) == 2 * once
    assert set(calls) == {(2, *SHAPE)}


def test_another_class_guidance_or_interval_compiles_nothing():
    calls = []

    def counted(params, x, t, labels):
        calls.append(x.shape)
        return linear(params, x, t, labels)

    model = toy(counted, num_classes=3)
    mesh = Mesh(np.array(jax.devices()[:1]), ("images",))
    function = make_draw(model, mesh, np.array([5, 20]), find_method("ddim"))
    keys, numbers = jax.random.split(jax.random.key(0)), np.arange(2, dtype=np.uint32)
    once = []
    for label, scale, interval in [(0, 1.0, (1, 9)), (2, 1.0, (1, 9)), (2, 3.0, (4, 5))]:
        inputs = np.full(2, label, np.int32), np.float32(scale), np.array(interval, np.int32)
        function(model.params, keys, numbers, *inputs)
        once = once or list(calls)
    assert calls == once


def test_one_batch_is_in_flight_while_the_last_is_fetched():
    log = []

    def draw(batch):
        log.append(f"draw {batch[0]}")
        batch = jnp.asarray(batch)
        return drawing.Drawn(batch, batch >= 0, batch[:, None])

    for batch in drawing.batches_of(draw, np.arange(0, 5, dtype=np.uint32), 2, 1):
        log.append(f"got {batch.images[0]}")
    assert log == ["draw 0", "draw 2", "got 0", "draw 4", "got 2", "got 4"]


def test_non_finite_images_are_numbered(draw):
    def broken(params, x, t):
        bad = (x[:, :1, :1] > 1.2) & (t[0] == 20)
        return jnp.where(bad, jnp.nan, params["w"] * x)

    bad = np.flatnonzero(x_T(64)[:, 0, 0, 0] > 1.2)
    assert len(bad) > 3
    assert bad[0] > 0
    with pytest.raises(FloatingPointError, match=rf"numbers \[{bad[0]}\]: the model"):
        draw(model=toy(broken), num_images=64, devices=jax.devices()[:1])
    with pytest.raises(FloatingPointError, match=f"{len(bad)} images .*{bad[0]}, {bad[1]}"):
        draw("wide", toy(broken), 64, batch_size=8, shard_size=64)
    # What fills up the last batch is nobody's image.
    draw("short", toy(broken), int(bad[0]), batch_size=8, shard_size=64)


# The folder.


def test_settings_say_what_determines_the_images(draw):
    folder = draw(eta=0.5, seed=4, clip=True)
    settings = json.loads((folder / "settings.json").read_text())
    said = {k: settings[k] for k in ("num_images", "seed", "eta", "clip", "tau", "image_shape")}
    assert said == {
        "num_images": 21,
        "seed": 4,
        "eta": 0.5,
        "clip": True,
        "tau": [4, 8, 12, 16, 20],
        "image_shape": [4, 4, 1],
    }
    assert settings["model"]["model"]["image_size"] == 4
    assert settings["versions"]["jax"] == jax.__version__
    names = [f"images-0000{i}.npy" for i in range(6)]
    assert sorted(contents(folder)) == [*names, "settings.json"]


def test_finished_shards_are_left_alone_and_missing_ones_drawn(draw):
    folder = draw()
    before = contents(folder)
    victims = [folder / f"images-0000{i}.npy" for i in (1, 2, 5)]
    for path in victims:
        path.unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(FileNotFoundError, match=r"lacks 3 of 6 .*00001.*00002.*00005"):
        iter_shards(folder)
    for _ in range(2):
        assert draw(devices=jax.devices()[:3]) == folder
        assert contents(folder) == before
        assert {n: (folder / n).stat().st_mtime_ns for n in stamps} == stamps


def test_a_folder_grows_by_the_images_that_one_call_would_have_drawn(network, draw):
    """21 images in shards of 4, then 29, then 30: ragged shards stay as they are."""
    options = {"model": network, "steps": 2, "eta": 1.0}
    folder = draw("grown", num_images=21, **options)
    before = contents(folder)
    (folder / "images-00005.npy").unlink()  # was not finished either
    draw("grown", num_images=29, **options)
    for name in before.keys() - {"settings.json"}:
        assert (folder / name).read_bytes() == before[name]
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    draw("grown", num_images=30, devices=jax.devices()[:1], **options)
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    sizes = [len(shard) for shard in iter_shards(folder)]
    assert sizes == [4, 4, 4, 4, 4, 1, 3, 4, 1, 1]
    np.testing.assert_array_equal(images(folder), images(draw("at once", num_images=30, **options)))
    with pytest.raises(ValueError, match="num_images: saved 30, now 29"):
        draw("grown", num_images=29, **options)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_let_a_folder_grow(draw, monkeypatch, processes):
    draw("by many")
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for p in reversed(range(processes)):
        monkeypatch.setattr(jax, "process_index", lambda p=p: p)
        draw("by many", num_images=26)
    monkeypatch.undo()
    np.testing.assert_array_equal(
        images(draw("by many", num_images=26)), images(draw("at once", num_images=26))
    )


def test_folders_of_the_first_format_are_read(draw):
    folder = draw()
    settings = json.loads((folder / "settings.json").read_text())
    before = images(folder)
    (folder / "settings.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "earlier"} | {"format": 1})
    )
    for i in range(6):
        (folder / f"images-0000{i}.npy").rename(folder / f"images-0000{i}-of-00006.npy")
    np.testing.assert_array_equal(images(folder), before)
    with pytest.raises(ValueError, match="format: saved 1, now 2"):
        draw()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_shards_and_do_not_wait(draw, monkeypatch, processes):
    whole = contents(draw("by one process"))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for p in reversed(range(processes)):
        monkeypatch.setattr(jax, "process_index", lambda p=p: p)
        before = set(contents(draw("by many"))) if p < processes - 1 else set()
        folder = draw("by many")
        new = {int(name[7:12]) for name in set(contents(folder)) - before if name[0] == "i"}
        assert before or new == set(range(p, 6, processes))
    assert contents(folder) == whole


PROCESS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
from ddim_jax.generation.shards import generate
from tests.test_generate import toy
generate(toy(), sys.argv[1], 21, 5, 1.0, batch_size=2, shard_size=4, progress=False)
"""


@pytest.mark.slow
def test_two_real_processes_of_two_devices_draw_the_same(draw, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [sys.executable, "-c", PROCESS, tmp_path / "by two", port]
    processes = [subprocess.Popen([*arguments, str(p)], env=CPU) for p in range(2)]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    one = draw("by one", eta=1.0, devices=jax.devices()[:1])
    assert contents(tmp_path / "by two") == contents(one)


CHILD = """
import os, signal, sys
from ddim_jax.generation.shards import generate
from tests.test_generate import toy
name, countdown = sys.argv[2], int(sys.argv[3])
call = getattr(os, name)
def call_or_die(first, *rest):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.truncate(first, os.stat(first).st_size // 2)  # half of the temporary file
        os.kill(os.getpid(), signal.SIGKILL)
    call(first, *rest)
setattr(os, name, call_or_die)
generate(toy(), sys.argv[1], 21, 5, batch_size=2, shard_size=4, progress=False)
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param("fsync", 1, marks=pytest.mark.slow),
        ("fsync", 4),
        pytest.param("replace", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_while_writing_it_resumes_to_the_same_bytes(draw, tmp_path, name, call):
    """The first call is for the settings, the others are for shards."""
    folder, arguments = tmp_path / "killed", [name, str(call)]
    child = subprocess.run([sys.executable, "-c", CHILD, folder, *arguments], env=CPU, check=False)
    assert child.returncode == -signal.SIGKILL
    left = sorted(contents(folder))
    assert len([name for name in left if name.endswith(".npy")]) == max(0, call - 2)
    assert len([name for name in left if name.endswith(".tmp")]) == 1
    if call > 1:
        with pytest.raises(FileNotFoundError, match=f"lacks {8 - call} of 6"):
            iter_shards(folder)
    draw("killed")
    assert not list(folder.glob("images*.tmp"))
    kept = {name: data for name, data in contents(folder).items() if not name.endswith(".tmp")}
    assert kept == contents(draw("unbroken"))


def damage(path, kind):
    whole = np.load(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half a header":
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "text":
        path.write_text("These are not the images you are looking for." * 9)
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, whole)
    elif kind == "pickle":
        with path.open("wb") as file:
            np.save(file, np.array([{}]), allow_pickle=True)
    elif kind == "dtype":
        np.save(path, whole.astype(np.float32))
    elif kind == "shape":
        np.save(path, whole[1:])
    elif kind == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "half a header",
        "text",
        "archive",
        "pickle",
        "dtype",
        "shape",
        "folder",
    ],
)
def test_a_damaged_shard_is_named_and_not_overwritten(draw, kind):
    folder = draw()
    path = folder / "images-00003.npy"
    damage(path, kind)
    (folder / "images-00005.npy").unlink()
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(ValueError, match=r"images-00003\.npy is damaged: .*move it away"):
        draw()
    assert before is None or path.read_bytes() == before
    assert not (folder / "images-00005.npy").exists()  # said before anything is drawn
    shutil.copy(folder / "images-00000.npy", folder / "images-00005.npy")
    with pytest.raises(ValueError, match=r"images-00003\.npy is damaged"):
        iter_shards(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eta": 0.5}, "eta: saved 0.0, now 0.5"),
        ({"steps": 4}, r"tau: saved \[4, 8, 12, .*, now \[5, 10, "),
        ({"seed": 1}, "seed: saved 0, now 1"),
        ({"clip": True}, "clip: saved False, now True"),
        ({"num_images": 20}, r"num_images: saved 21, now 20\n\(no image is removed: ask for 21"),
        ({"num_images": 40, "eta": 0.5}, "eta: saved 0.0, now 0.5"),
        ({"shard_size": 8}, "shard_size: saved 4, now 8"),
        ({"model": toy(w=0.3)}, "sha256: saved '.*', now '"),
        ({"model": toy()._replace(schedule=ddim.cosine_schedule(20))}, "sha256: saved"),
        ({"model": toy()._replace(facts={"preset": "x"})}, "model.preset: saved nothing, now 'x'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_other_settings_are_refused(draw, changes, says):
    before = contents(draw())
    with pytest.raises(ValueError, match=f"images of other settings; choose another.*\n  {says}"):
        draw(**changes)
    assert contents(draw()) == before


def test_another_batch_size_may_go_on(draw):
    folder = draw()
    (folder / "images-00001.npy").unlink()
    assert len(images(draw(batch_size=4, devices=jax.devices()[:1]))) == 21


def test_foreign_folders_are_refused(draw, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not of these images: \['thesis.tex'\]; choose an empty"):
        draw("thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    folder = draw()
    (folder / "settings.json").rename(tmp_path / "settings.json")
    with pytest.raises(ValueError, match="not of these images"):
        draw()
    (tmp_path / "settings.json").rename(folder / "settings.json")
    (folder / "images-00006.npy").write_text("x")
    with pytest.raises(ValueError, match="images-00006"):
        draw()


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (None, FileNotFoundError, "no folder of generated images: no settings.json"),
        ("{", ValueError, "is damaged"),
        ("[]", ValueError, "is damaged"),
        ('{"format": 1}', ValueError, "is damaged.*num_images"),
        ('{"format": 1, "num_images": 1, "shard_size": 1}', ValueError, "is damaged.*image_shape"),
        ('{"format": 99}', ValueError, "format 99, this version reads up to 2"),
    ],
)
def test_unreadable_settings(draw, tmp_path, text, error, says):
    (tmp_path / "images").mkdir()
    if text is not None:
        (tmp_path / "images" / "settings.json").write_text(text)
        with pytest.raises(error, match=says):
            draw()
    with pytest.raises(error, match=says):
        iter_shards(tmp_path / "images")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_images": 0}, r"num_images must be in 1..2\*\*31 - 1, got 0"),
        ({"batch_size": 3}, "batch_size must divide shard_size.* 3 and 4"),
        ({"batch_size": 0}, "must divide"),
        ({"labels": "all"}, "no classes: labels and guidance must be None, got labels='all'"),
        ({"guidance": 2.0}, "no classes: labels and guidance must be None, got guidance=2.0"),
        ({"labels": 4, "model": toy(num_classes=3)}, r"in 0\.\.2, 3 or 'none' .*, got 4"),
        ({"labels": [], "model": toy(num_classes=3)}, "at least one class, got an empty list"),
        ({"labels": [0, 9], "model": toy(num_classes=3)}, "got 9"),
        ({"labels": [0, "cat"], "model": toy(num_classes=3)}, "unknown class 'cat'.*not stored"),
        (
            {"labels": 0, "guidance_interval": (1, 5), "model": toy(num_classes=3)},
            "is for guidance",
        ),
        ({"labels": -1, "model": toy(num_classes=3)}, "got -1"),
        ({"guidance": 2.0, "model": toy(num_classes=3)}, "guidance is towards a class"),
        ({"labels": 1, "guidance": np.nan, "model": toy(num_classes=3)}, "guidance must be finite"),
        ({"labels": "random", "model": toy(num_classes=3)}, "unknown class 'random'"),
        *(
            (
                {"labels": 0, "guidance": 2.0, "guidance_interval": v, "model": toy(num_classes=3)},
                r"1 <= lo <= hi <= T = 20, got ",
            )
            for v in [(9, 3), (0, 5), (5, 21)]
        ),
        ({"steps": 21}, "S = 21 and T = 20"),
        ({"steps": [1, 5, 21]}, "tau must lie in 1..T = 1..20, got 1..21"),
        ({"steps": [0, 5, 20]}, "tau must lie in 1..T = 1..20, got 0..20"),
        ({"steps": [5, 5, 20]}, "tau must increase strictly, got 5 then 5"),
        ({"steps": [20, 1]}, "tau must increase strictly"),
        ({"steps": []}, "non-empty"),
        ({"steps": [1, 20], "spacing": "quad"}, "steps=tau alone, got 'quad' and tau"),
        ({"eta": -1.0}, "eta"),
        ({"seed": 2**32}, r"seed must be in 0..2\*\*32 - 1, got 4294967296"),
        ({"spacing": "cubic"}, "unknown spacing"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments_leave_no_folder(draw, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        draw(**changes)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_of_any_type_but_no_others(draw):
    folder = draw(steps=4, seed=3)
    assert draw(steps=np.int64(4), seed=np.int64(3), eta=np.float32(0)) == folder
    assert draw(steps=[5, 10, 15, 20], seed=3) == folder  # τ decides, however it was asked for
    with pytest.raises(TypeError, match="batch_size must be a whole number, got 2.0"):
        draw(batch_size=2.0)


def test_the_bar_counts_images(draw, capsys):
    folder = draw(progress=True)
    assert re.search(r"21/21.*image", capsys.readouterr().err)
    (folder / "images-00005.npy").unlink()
    draw(progress=True)
    assert re.search(r"20/21", capsys.readouterr().err)


def test_as_the_model_says(draw):
    """The images of `model.sampler`; another scheduler is another folder."""
    model = toy()._replace(facts={"sampling": {"_class_name": "DDPMScheduler"}})
    kept = draw("kept", model, 3, method="as-stored")
    x = x_T(np.arange(3))
    key = jax.random.split(jax.random.key(0))[1]
    np.testing.assert_array_equal(images(kept), to_uint8(model.sampler(5)(x, key)))
    other = toy()._replace(facts={"sampling": {"_class_name": "DDIMScheduler"}})
    with pytest.raises(ValueError, match="model.sampling._class_name: saved 'DDPMScheduler', now"):
        draw("kept", other, 3, method="as-stored")
    for wrong in ({"clip": True}, {"spacing": "quad"}):
        with pytest.raises(ValueError, match="'as-stored' takes spacing and clip from the model"):
            draw("none", model, 3, method="as-stored", **wrong)
