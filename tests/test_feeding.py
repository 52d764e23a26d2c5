"""Several updates a call, images that lie on the device: the same run, whatever the way to it."""

import dataclasses

import jax
import numpy as np
import pytest

from ddim_jax.data import batch_indices, batches
from ddim_jax.storage.checkpoint import Checkpoints, restore
from ddim_jax.storage.checkpoint_folder import saved_steps
from ddim_jax.training import averages, feeding, fit, parallel
from ddim_jax.training.run_folder import Preempted
from ddim_jax.training.step import DENOISING, TrainState
from ddim_jax.training.summary import read_metrics
from tests.tiny import SCHEDULE, affine, affine_params, assert_same, make_config, make_dataset

pytestmark = pytest.mark.usefixtures("one_trace")

MANY = {"steps_per_call": 4, "data_on_device": True, "log_every": 4}


def run(directory, **options):
    changes = options.pop("changes", {})
    return fit(
        affine, affine_params(), SCHEDULE, make_dataset(), make_config(**changes), directory,
        facts={"model": {"kind": "affine"}}, progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), changes={"sample_every": 0, "flip": True})


@pytest.mark.parametrize(
    ("most", "resident"),
    [
        (4, True),
        (2, False),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(4, False, marks=pytest.mark.slow),
    ],
)
def test_calls_of_many_updates_make_the_same_run(tmp_path, plain, resident, most):
    changes = {**MANY, "data_on_device": resident, "steps_per_call": most, "sample_every": 0}
    state = run(tmp_path, changes={**changes, "flip": True})
    # The same sums in another program: float32 rounding of 12 updates of order 0.01.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state, plain)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8, 12]


@pytest.mark.slow
def test_a_run_in_calls_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    changes = {**MANY, "sample_every": 0, "post_hoc": True}
    whole = run(tmp_path / "whole", changes=changes)
    stops = iter([False, True])
    monkeypatch.setattr(
        "ddim_jax.training.run_folder.StopSignals.requested", lambda self, step: next(stops, False)
    )
    with pytest.raises(Preempted):
        run(tmp_path / "stopped", changes=changes)
    assert saved_steps(tmp_path / "stopped" / "checkpoints") == [4, 8]
    resumed = run(tmp_path / "stopped", changes=changes, resume="must")
    assert_same(resumed, whole)
    first, again = (tmp_path / name / "averages" / "00000012.safetensors" for name in
                    ("whole", "stopped"))  # fmt: skip
    assert first.read_bytes() == again.read_bytes()
    means = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
             for name in ("whole", "stopped")]  # fmt: skip
    assert means[0] == means[1]


def test_indices_are_those_of_the_images():
    dataset = make_dataset(10)
    images = batches(dataset, 4, seed=3, start=2)
    numbers = batches(dataset, 4, seed=3, start=2, indices_only=True)
    for number in range(2, 6):  # over the joint of two epochs
        index = next(numbers)["index"]
        assert index.dtype == np.int32
        np.testing.assert_array_equal(index, batch_indices(dataset, 4, 3, number))
        np.testing.assert_array_equal(dataset.take(index)["image"], next(images)["image"])


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2)])
def test_a_batch_is_gathered_where_it_is_needed(data, fsdp):
    mesh = parallel.make_mesh(fsdp, jax.devices()[: data * fsdp])
    dataset, config = make_dataset(), make_config(batch_size=16, data_on_device=True)
    feed = feeding.Feed(dataset, config, mesh, 3, 2)

    def step(state, batch, loss, num_updates):
        return state._replace(step=state.step + 1), batch

    steps = feeding.make_steps(step, mesh, averages.leave)
    given = feed.data()
    assert [v.sharding.is_fully_replicated for v in given.values()] == [True, True]
    state, _, seen = steps(TrainState(np.int32(0), {}, {}, ()), [], given, next(feed), DENOISING)
    assert int(state.step) == 2
    for k in (0, 1):
        wanted = dataset.take(batch_indices(dataset, 16, 0, 3 + k))
        jax.tree.map(lambda a, b, k=k: np.testing.assert_array_equal(a[k], b), seen, wanted)


def test_updates_a_call_fit_every_interval(monkeypatch):
    config = make_config(num_updates=3000, log_every=100, checkpoint_every=500, sample_every=0)
    assert feeding.steps_per_call(config, 0, 1e12, None) == 1  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert feeding.steps_per_call(config, 0, 1e10, 989e12) == 50
    assert feeding.steps_per_call(config, 0, 15e12, 989e12) == 10  # of 10 in half a second
    assert feeding.steps_per_call(config, 0, 15e12, None) == 4  # 15e12 in 0.15 s
    assert feeding.steps_per_call(config, 0, 1e20, 989e12) == 1
    assert feeding.steps_per_call(config, 504, 1e10, 989e12) == 4  # stopped there by another way
    few = dataclasses.replace(config, steps_per_call=7)
    assert feeding.steps_per_call(few, 0, 1e10, None) == 5
    with pytest.raises(ValueError, match="steps_per_call must be at least 1"):
        make_config(steps_per_call=0)


def test_what_fits_lies_on_the_device(monkeypatch):
    dataset, config = make_dataset(), make_config()  # 640 bytes
    assert not feeding.on_device(dataset, config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    class Device:
        memory = 8 * 640

        def memory_stats(self):
            return {"bytes_limit": self.memory}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert feeding.on_device(dataset, config)
    assert not feeding.on_device(dataset, make_config(num_workers=1))
    Device.memory -= 1
    assert not feeding.on_device(dataset, config)


def test_a_copied_state_is_saved_beside_what_follows(tmp_path):
    like = {"w": np.zeros(3, np.float32)}
    with Checkpoints(tmp_path, keep=3, copies=True) as checkpoints:
        change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
        state = {"w": jax.numpy.zeros(3)}
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"batch": step}, {})
            state = change(state)
    for step in (1, 2, 3):
        restored = restore(tmp_path, like, step)
        assert restored.data_state == {"batch": step}
        np.testing.assert_array_equal(restored.state["w"], np.full(3, step - 1, np.float32))


def test_a_copied_state_that_cannot_be_written_is_told_at_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, copies=True)
    monkeypatch.setattr("ddim_jax.storage.checkpoint.digests", lambda parts: 1 / 0)
    checkpoints.save(1, {"w": np.zeros(3, np.float32)}, {}, {})
    with pytest.raises(ValueError, match="could not write a checkpoint"):
        checkpoints.save(2, {"w": np.zeros(3, np.float32)}, {}, {})
    checkpoints.close()
