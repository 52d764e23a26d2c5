"""A run killed again and again at random moments is the unbroken run, and loses no checkpoint."""

import json
import pathlib
import random
import time

import pytest

from ddim_jax.storage.checkpoint import restore_part
from ddim_jax.storage.checkpoint_folder import saved_steps
from tests.tiny import assert_same
from tests.worker import finish, start

TRAIN = {
    "batch_size": 8,
    "log_every": 3,
    "checkpoint_every": 4,
    "keep": 500,
    "warmup_steps": 5,
    "sample_every": 0,
}
STATE = ("params", "ema", "opt_state", "step")


def half_written(folder):
    return any("tmp" in path.name for path in folder.glob("*"))


def kill_in_the_middle(process, folder, known, rng):
    """SIGKILL, sometimes while a checkpoint is being written; whether it was."""
    while len(saved_steps(folder)) <= known:  # some progress in every life
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    if rng.random() < 0.5:
        deadline = time.time() + 5
        while not half_written(folder) and process.poll() is None and time.time() < deadline:
            pass
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.3))
    writing = half_written(folder)
    process.kill()
    process.communicate()
    return writing


def check(tmp_path, kills, num_updates):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train = {**TRAIN, "num_updates": num_updates}
    rng, folder = random.Random(0), broken / "checkpoints"
    seen, torn = set(), 0
    for _ in range(kills):
        process = start(broken, train)
        torn += kill_in_the_middle(process, folder, len(seen), rng)
        # 0: on a fast machine the last life may be over before the kill.
        assert process.returncode in (-9, 0), process.stderr and process.stderr.read()
        assert seen <= set(saved_steps(folder)), "a checkpoint was lost"
        seen = set(saved_steps(folder))
    codes, errors = finish([start([broken, unbroken], train)])  # the last life, and the other run
    assert codes == [0], errors
    assert saved_steps(folder) == saved_steps(unbroken / "checkpoints")
    for part in STATE:
        assert_same(*(restore_part(run / "checkpoints", part) for run in (unbroken, broken)))
    assert metrics(broken) == metrics(unbroken)
    return torn


def metrics(directory):
    lines = (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[k] for k in ("step", "loss", "grad_norm")] for line in lines]


@pytest.mark.slow
def test_killed_once(tmp_path):
    check(tmp_path, 1, 24)


@pytest.mark.slow
def test_killed_20_times(tmp_path):
    assert check(tmp_path, 20, 300) >= 3  # some of them tore a checkpoint that was being written
