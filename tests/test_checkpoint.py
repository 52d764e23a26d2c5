"""Checkpoints: exact, kept in number, safe beside donation, and clear about damage."""

import gc
import json
import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddim_jax.storage import checkpoint_folder
from ddim_jax.storage.checkpoint import Checkpoints, restore, restore_config, restore_part
from ddim_jax.storage.checkpoint_folder import CheckpointError, saved_steps
from ddim_jax.storage.digest import digests
from tests.tiny import assert_same

CONFIG = {"model": {"channels": 32, "multipliers": [1, 2]}, "train": {"learning_rate": 2e-4}}


class State(NamedTuple):
    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def make_state(step=0, width=4):
    k1, k2 = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
    params = {
        "conv": {"kernel": jax.random.normal(k1, (3, 3, 1, width)), "bias": jnp.ones(width)},
        "scale": jax.random.normal(k2, ()),
        "half": jnp.full(3, step / 3, jnp.bfloat16),
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    opt_state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), opt_state)
    return State(jnp.int32(step), params, jax.tree.map(lambda x: x * 2, params), opt_state)


def write(directory, steps=(5,), keep=10):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"next_index": step}, CONFIG)
    return directory


def test_round_trip_is_exact(tmp_path):
    write(tmp_path / "run" / "checkpoints")
    restored = restore(tmp_path / "run" / "checkpoints", make_state())
    assert_same(restored.state, make_state(5))
    assert (restored.step, restored.data_state, restored.config) == (5, {"next_index": 5}, CONFIG)


def test_like_may_be_abstract_and_any_step_may_be_asked_for(tmp_path):
    write(tmp_path, steps=(1, 2, 3))
    like = jax.eval_shape(make_state)
    for step in (1, 2, 3):
        assert_same(restore(tmp_path, like, step).state, make_state(step))
    assert restore(tmp_path, like).step == 3


def test_parts_and_config_alone(tmp_path):
    write(tmp_path, steps=(1, 2))
    assert_same(restore_part(tmp_path, "ema"), make_state(2).ema)
    assert_same(restore_part(tmp_path, "params", step=1), make_state(1).params)
    assert restore_config(tmp_path) == CONFIG
    with pytest.raises(CheckpointError, match="no part 'emma'; it has ema, opt_state, params"):
        restore_part(tmp_path, "emma")


@pytest.mark.parametrize("keep", [1, 3])
def test_the_latest_are_kept(tmp_path, keep):
    write(tmp_path, steps=range(1, 5), keep=keep)
    assert saved_steps(tmp_path) == list(range(5 - keep, 5))
    assert_same(restore(tmp_path, make_state()).state, make_state(4))


def test_a_run_goes_on_in_its_directory(tmp_path):
    write(tmp_path, steps=(1, 2))
    write(tmp_path, steps=(3,), keep=2)
    assert saved_steps(tmp_path) == [2, 3]
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="step 3 does not come after the saved step 3"),
    ):
        checkpoints.save(3, make_state(3), {}, {})


def test_a_state_donated_right_after_saving_is_saved_as_it_was(tmp_path):
    def advance(state):
        return jax.tree.map(lambda x: x + 1, state)

    advance = jax.jit(advance, donate_argnums=0)
    state = {"w": jnp.zeros((1000, 1000)), "n": jnp.int32(0)}
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(1, 5):
            state = advance(state)
            checkpoints.save(step, state, {}, {})
            for _ in range(3):
                state = advance(state)
    for step in range(1, 5):
        restored = restore(tmp_path, state, step).state
        assert (np.asarray(restored["w"]) == 4 * step - 3).all()
        assert int(restored["n"]) == 4 * step - 3


def test_saved_on_eight_devices_restored_on_one_and_on_four(tmp_path):
    def placed(devices):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        return NamedSharding(mesh, PartitionSpec("data"))

    w = jnp.arange(64.0).reshape(16, 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(w, placed(8))}, {}, {})
    for devices in (1, 4):
        like = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=placed(devices))}
        restored = restore(tmp_path, like).state["w"]
        assert len(restored.sharding.device_set) == devices
        np.testing.assert_array_equal(restored, w)
    np.testing.assert_array_equal(restore_part(tmp_path, "w"), w)


def test_another_shape_dtype_or_structure_names_the_leaf(tmp_path):
    write(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model") as error:
        restore(tmp_path, make_state(width=8))
    expected = "params/conv/kernel: saved 'float32[3,3,1,4]', now 'float32[3,3,1,8]'"
    assert expected in str(error.value)
    state = make_state()
    params = {**state.params, "scale": jnp.zeros((), jnp.bfloat16), "new": jnp.zeros(2)}
    del params["half"]
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, state._replace(params=params))
    assert "params/scale: saved 'float32[]', now 'bfloat16[]'" in str(error.value)
    assert "params/new: saved nothing, now 'float32[2]'" in str(error.value)
    assert "params/half: saved 'bfloat16[3]', now nothing" in str(error.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        restore_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is empty, no checkpoint"):
        restore_config(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, no checkpoint"):
        restore(tmp_path, make_state())
    with pytest.raises(CheckpointError, match=r"not checkpoints: thesis\.tex; choose an empty"):
        Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path / "new", keep=0)


def test_an_unknown_step_lists_the_steps(tmp_path):
    write(tmp_path, steps=(1, 2))
    with pytest.raises(CheckpointError, match="has no step 7; it has 1, 2"):
        restore(tmp_path, make_state(), step=7)


def test_a_half_written_step_is_not_a_checkpoint(tmp_path):
    write(tmp_path)
    shutil.copytree(tmp_path / "5", tmp_path / "6.orbax-checkpoint-tmp")
    assert saved_steps(tmp_path) == [5]
    write(tmp_path, steps=(6,))
    assert_same(restore(tmp_path, make_state()).state, make_state(6))


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def edit_facts(path, edit):
    facts = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    edit(facts["custom_metadata"])
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(facts))


def replace(path, other):
    shutil.rmtree(path)
    shutil.copytree(other, path)


DAMAGE = {
    "no files": lambda p: [shutil.rmtree(c) if c.is_dir() else c.unlink() for c in p.iterdir()],
    "no state": lambda p: shutil.rmtree(p / "state"),
    "no facts": lambda p: (p / "_CHECKPOINT_METADATA").unlink(),
    "empty facts": lambda p: (p / "_CHECKPOINT_METADATA").write_text(""),
    "garbled facts": lambda p: (p / "_CHECKPOINT_METADATA").write_text('{"item_handlers'),
    "no tree": lambda p: (p / "state" / "_METADATA").unlink(),
    "garbled tree": lambda p: (p / "state" / "_METADATA").write_text("{}"),
    "no manifest": lambda p: (p / "state" / "manifest.ocdbt").unlink(),
    "empty manifest": lambda p: (p / "state" / "manifest.ocdbt").write_bytes(b""),
    "truncated arrays": lambda p: largest_file(p / "state").write_bytes(b"short"),
    "no arrays": lambda p: shutil.rmtree(p / "state" / "d"),
    "one bit": lambda p: flip_a_bit(largest_file(p / "state")),
    "zeros": lambda p: largest_file(p / "state").write_bytes(bytes(300_000)),
    "another step's arrays": lambda p: replace(p / "state", p.parent / "4" / "state"),
    "a file for a checkpoint": lambda p: [shutil.rmtree(p), p.touch()],
    "one digit of the facts": lambda p: edit_facts(p, lambda f: f["data_state"].update(x=6)),
    "no digests": lambda p: edit_facts(p, lambda f: f.update(digests=None)),
    "no configuration": lambda p: edit_facts(p, lambda f: f.pop("config")),
    "a file for a folder": lambda p: [shutil.rmtree(p / "state"), (p / "state").touch()],
}


@pytest.fixture(scope="module")
def four_and_five(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole"), steps=(4, 5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_other_steps_still_restore(tmp_path, four_and_five, damage):
    shutil.copytree(four_and_five, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / "5")
    with pytest.raises(CheckpointError, match="damaged.*; other steps saved beside it: 4") as error:
        restore(tmp_path, make_state())
    assert str(tmp_path / "5") in str(error.value)
    assert_same(restore(tmp_path, make_state(), step=4).state, make_state(4))
    gc.collect(1)  # Orbax leaves tasks unawaited when it fails; they, young, end in this test


def test_a_foreign_or_newer_checkpoint(tmp_path):
    write(tmp_path)
    path = tmp_path / "5" / "_CHECKPOINT_METADATA"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "custom_metadata": {"who": "someone else"}}))
    with pytest.raises(CheckpointError, match="was not written by ddim_jax"):
        restore_config(tmp_path)
    facts["custom_metadata"]["format"] = checkpoint_folder.FORMAT + 1
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="format 3, this version reads 2: update") as error:
        restore_config(tmp_path)
    assert not isinstance(error.value, checkpoint_folder.DamagedError)  # no fallback passes over it


def test_every_changed_bit_changes_the_digest():
    state = make_state()
    before = digests(state._asdict())
    kernel = np.asarray(state.params["conv"]["kernel"])
    rng = np.random.default_rng(0)
    for _ in range(40):
        bits = kernel.copy().view(np.uint32)
        bits.flat[rng.integers(bits.size)] ^= np.uint32(1) << np.uint32(rng.integers(32))
        params = {**state.params, "conv": {"kernel": jnp.asarray(bits.view(np.float32))}}
        after = digests(state._replace(params=params)._asdict())
        assert after["params"] != before["params"]
        assert after["ema"] == before["ema"]
    swapped = kernel.copy()
    swapped[..., [0, 1]] = swapped[..., [1, 0]]
    params = {**state.params, "conv": {"kernel": jnp.asarray(swapped)}}
    assert digests({"params": params})["params"] != before["params"]


def test_a_digest_does_not_depend_on_the_devices():
    tree = {"w": jnp.arange(64.0).reshape(8, 8), "half": jnp.ones((4, 2), jnp.bfloat16)}
    plain = digests({"params": tree})
    for shape in ((8, 1), (2, 4), (1, 8)):
        mesh = jax.make_mesh(shape, ("a", "b"))
        for spec in (PartitionSpec("a", "b"), PartitionSpec("b"), PartitionSpec(None, "a")):
            w = jax.device_put(tree["w"], NamedSharding(mesh, spec))
            assert digests({"params": {**tree, "w": w}}) == plain


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import jax, jax.numpy as jnp
from ddim_jax.storage.checkpoint import Checkpoints
from ddim_jax.storage.checkpoint_folder import CheckpointError
state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state, {}, {})
checkpoints._orbax.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # no file may grow further
try:
    checkpoints.save(2, state, {}, {})
    checkpoints.close()
except CheckpointError as error:
    print(error)
"""


def test_a_disk_without_room_is_named_and_earlier_checkpoints_stay(tmp_path):
    folder = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    assert "could not write a checkpoint" in done.stdout, done.stderr[-2000:]
    assert "those written before are intact: 1" in done.stdout
    assert saved_steps(folder) == [1]
    assert restore_part(folder, "w").shape == (1000, 1000)


def test_a_folder_that_cannot_be_listed(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="cannot read the directory .*checkpoints"):
        restore_config(tmp_path / "checkpoints")
    locked = tmp_path / "locked"
    write(locked)
    locked.chmod(0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(CheckpointError, match="cannot read the directory .*locked"):
            restore_config(locked)
    finally:
        locked.chmod(0o755)


def test_damaged_steps_are_set_aside_and_kept(tmp_path):
    write(tmp_path / "run" / "checkpoints", steps=(4, 5))
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint_folder.set_aside(folder, 5) == tmp_path / "run" / "damaged" / "5"
    write(folder, steps=(5,))
    assert checkpoint_folder.set_aside(folder, 5) == tmp_path / "run" / "damaged" / "5-1"
    assert saved_steps(folder) == [4]
    assert_same(restore(tmp_path / "run" / "damaged", make_state(), 5).state, make_state(5))


def test_a_wait_for_the_save_before_is_not_written_across_the_progress_bar(
    tmp_path, monkeypatch, caplog
):
    manager = "orbax.checkpoint.checkpoint_manager._WAIT_FOR_PREV_SAVE_WARNING_THRESHOLD_SECS"
    monkeypatch.setattr(manager, -1.0)  # as if every save had to wait
    write(tmp_path, (1, 2))
    assert not caplog.records
