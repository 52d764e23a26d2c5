"""Sharded training is the same training: on 1, 2, 4, 8 devices, with FSDP, in two processes."""

import dataclasses
import functools
import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from ddim_jax.data import batches, load
from ddim_jax.networks.unet import UNetConfig, build
from ddim_jax.process.schedule import linear_schedule
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.storage.checkpoint import Checkpoints, restore, restore_part
from ddim_jax.storage.checkpoint_folder import saved_steps
from ddim_jax.training import parallel
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import init_state, make_train_step
from ddim_jax.weights import Model
from tests import worker
from tests.worker import finish, start

SCHEDULE = linear_schedule(1000)
MODEL = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=32,
    multipliers=(1,),
    num_blocks=1,
    attention_resolutions=(),
    num_classes=10,
)
MESHES = [(4, 2, False)]
SLOW = [
    (8, 1, False),
    (1, 8, False),
    (2, 1, False),
    (4, 1, False),
    (8, 1, True),
    (4, 2, True),
    (1, 8, True),
]
TRAIN = TrainConfig(batch_size=16, warmup_steps=5, learning_rate=1e-3, flip=True)


def make_mesh(data, fsdp=1):
    return parallel.make_mesh(fsdp, jax.devices()[: data * fsdp])


def small(params, x, t, dropout_key=None, labels=None):
    """`worker.network`, shifted by the class if there is one."""
    out = worker.network(params, x, t, dropout_key)
    return out if labels is None else out + params["label"][labels][:, None, None, :1]


@functools.cache
def network(unet=False):
    if not unet:
        label = jax.random.normal(jax.random.key(1), (11, 64)) / 8
        return small, {**worker.network_params(), "label": label}
    apply_fn, params = build(MODEL, jax.random.key(0))
    # Not all zeros at the output, so that every parameter has a gradient from the first step.
    wave = jax.tree.map(lambda p: np.cos(np.arange(p.size, dtype="f4")).reshape(p.shape), params)
    return apply_fn, jax.tree.map(lambda p, w: p + 0.01 * w, params, wave)


@functools.cache
def make_step(mesh, config=TRAIN, unet=False):
    return make_train_step(network(unet)[0], SCHEDULE, config, 10, mesh)


def make_state(mesh, config=TRAIN, unet=False):
    state = init_state(network(unet)[1], config)
    return jax.device_put(state, parallel.state_sharding(mesh, state))


def run(mesh, config=TRAIN, steps=10, state=None, first=0, unet=False):
    step = make_step(mesh, config, unet)
    state = make_state(mesh, config, unet) if state is None else state
    iterator = batches(load("digits"), config.batch_size, 0, start=first)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, parallel.put_batch(mesh, next(iterator)))
        losses.append([float(metrics[k]) for k in ("loss", "grad_norm", "param_norm")])
    return state, np.array(losses)


@functools.cache
def alone(unet=False):
    return run(make_mesh(1), unet=unet)[1]


@pytest.mark.parametrize(
    ("data", "fsdp", "unet"),
    [*MESHES, *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in SLOW)],
)
def test_losses_do_not_depend_on_the_devices(data, fsdp, unet):
    # The steps add the same numbers in another order, and carry what was rounded on: 100 EPS.
    np.testing.assert_allclose(run(make_mesh(data, fsdp), unet=unet)[1], alone(unet), rtol=1e-5)


@pytest.mark.parametrize("mesh", [(2, 2), pytest.param((1, 1), marks=pytest.mark.slow)])
def test_accumulated_parts_are_the_whole_batch(mesh):
    def without_dropout(params, x, t, key):
        return worker.network(params, x, t)

    def losses(mesh, accumulate):
        config = dataclasses.replace(TRAIN, accumulate=accumulate)
        step = make_train_step(without_dropout, SCHEDULE, config, mesh=mesh)
        state = init_state(worker.network_params(), config)
        state = jax.device_put(state, parallel.state_sharding(mesh, state))
        iterator, values = batches(load("digits"), 16, 0), []
        for _ in range(3):
            state, metrics = step(state, parallel.put_batch(mesh, next(iterator)))
            values.append(float(metrics["loss"]))
        return values

    whole = losses(make_mesh(1), 1)
    np.testing.assert_allclose(losses(make_mesh(*mesh), 4), whole, rtol=1e-5)


def test_fsdp_divides_the_bytes_of_parameters_average_and_optimiser():
    mesh = make_mesh(4, 2)
    state = run(mesh, steps=1)[0]
    for tree in (state.params, state.ema, state.opt_state):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        total = sum(leaf.nbytes for leaf in leaves)
        for device in mesh.devices.flat:
            held = sum(
                shard.data.nbytes
                for leaf in leaves
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            # Leaves with no even axis stay whole.
            assert total / 2 <= held <= total / 2 + 64
    whole = jax.tree.leaves(run(make_mesh(8), steps=1)[0].params)
    assert all(leaf.is_fully_replicated for leaf in whole)


COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)[-a-z]*\("


def collectives(compiled):
    return {match[1] for match in re.finditer(COLLECTIVES, compiled.as_text())}


def moved(compiled, kind=COLLECTIVES):
    """The shapes that devices have of one another."""
    found = re.findall(rf" = (.*) {kind}", compiled.as_text())
    shapes = re.findall(r"\[([\d,]*)\]\{", " ".join(match[0] for match in found))
    return {tuple(map(int, filter(None, shape.split(",")))) for shape in shapes}


def test_the_step_talks_as_expected_and_the_sampler_not_at_all():
    def compiled(mesh):
        step = make_step(mesh, TRAIN)
        batch = parallel.put_batch(mesh, next(batches(load("digits"), 16, 0)))
        return step.lower(make_state(mesh), batch).compile()

    assert collectives(compiled(make_mesh(1))) == set()
    assert collectives(compiled(make_mesh(8))) == {"all-reduce"}
    # Parameters are gathered where they are used. Each image stays on its device, with all that
    # the network makes of it: (n, 8, 8, c), as no parameter is.
    with_fsdp = compiled(make_mesh(4, 2))
    assert "all-reduce" in collectives(with_fsdp)
    assert {leaf.shape for leaf in network()[1].values()} <= moved(with_fsdp, "(all-gather)")
    assert not any(shape.count(8) > 1 for shape in moved(with_fsdp))

    mesh = make_mesh(8)
    apply_fn, params = network()
    sampler = make_sampler(Model(apply_fn, params, SCHEDULE), [1, 500, 1000])
    params = jax.device_put(params, parallel.replicated(mesh))
    x_T = jax.device_put(
        initial_noise(jax.random.key(0), 16, (8, 8, 1)), parallel.batch_sharding(mesh)
    )
    text = jax.jit(lambda p, x: sampler(x, params=p)).lower(params, x_T).compile()
    assert collectives(text) == set()
    assert sampler(x_T, params=params).sharding.is_equivalent_to(x_T.sharding, 4)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_with_one_and_four(tmp_path):
    state, _ = run(make_mesh(4, 2), steps=5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {}, {})
    for mesh in (make_mesh(1), make_mesh(4), make_mesh(1, 4)):
        like = make_state(mesh)
        restored = restore(tmp_path, like).state
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        losses = run(mesh, steps=5, state=restored, first=5)[1]
        np.testing.assert_allclose(losses, alone()[5:], rtol=1e-5)


def test_arguments():
    with pytest.raises(ValueError, match="fsdp must divide the number of devices, 8, got 3"):
        parallel.make_mesh(3)
    with pytest.raises(ValueError, match="go together, got .*'localhost:1', 2, None"):
        parallel.initialize("localhost:1", 2)
    with pytest.raises(ValueError, match="process_id must be in 0..1, got 2"):
        parallel.initialize("localhost:1", 2, 2)
    assert parallel.in_cluster({"OMPI_COMM_WORLD_SIZE": "2"})
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}  # in sbatch itself, outside of srun
    assert not parallel.in_cluster(batch)
    assert parallel.in_cluster({**batch, "SLURM_STEP_NODELIST": "node[1-4]"})
    assert parallel.peak_flops("TPU v5 lite") == 197e12
    assert parallel.peak_flops("TPU v5") == 459e12
    assert parallel.peak_flops("NVIDIA L40S") is None
    assert parallel.peak_flops("NVIDIA H100 PCIe") == 756e12  # 1,513 with sparsity


# Two processes of two devices each, on this machine.


def losses_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["step"], line["loss"], line["grad_norm"]] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("resumed_by", [1, 2])
def test_two_processes_are_one_run_stopped_and_resumed(tmp_path, resumed_by):
    train = {"batch_size": 16, "num_updates": 20, "log_every": 1, "checkpoint_every": 5,
             "warmup_steps": 5, "sample_every": 0}  # fmt: skip
    worker.train(tmp_path / "one", train)  # in this process, on its eight devices

    def pair(fsdp):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [
            start(tmp_path / "two", {**train, "fsdp": fsdp}, devices=2, processes=[address, 2, p])
            for p in (0, 1)
        ]

    first = pair(fsdp=2)
    while not saved_steps(tmp_path / "two" / "checkpoints"):
        assert all(process.poll() is None for process in first), finish(first)
        time.sleep(0.01)
    first[1].send_signal(signal.SIGTERM)  # one is told, and both stop at the same step
    codes, errors = finish(first)
    stopped = saved_steps(tmp_path / "two" / "checkpoints")[-1]
    if stopped < 20:  # else they were done before the signal came
        assert all("Preempted: stopped by a signal at step" in e for e in errors), errors
    if resumed_by == 1:
        worker.train(tmp_path / "two", train)
    else:
        codes, errors = finish(pair(fsdp=1))
        assert codes == [0, 0], errors
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    np.testing.assert_allclose(two, one, rtol=1e-5)
    ema = [restore_part(tmp_path / name / "checkpoints", "ema", 20) for name in ("one", "two")]
    for a, b in zip(*map(jax.tree.leaves, ema)):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-4
