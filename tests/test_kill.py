"""A run killed again and again at random moments is the unbroken run, and loses no checkpoint."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from ddim_jax.checkpoint import restore_part, saved_steps

TRAIN = {
    "batch_size": 8,
    "log_every": 3,
    "checkpoint_every": 4,
    "keep": 500,
    "warmup_steps": 5,
    "sample_every": 0,
}
STATE = ("params", "ema", "opt_state", "step")


def start(directory, num_steps):
    options = {
        "cache": os.path.abspath(".cache/jax"),
        "train": {**TRAIN, "num_steps": num_steps},
        "directory": str(directory),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.worker", json.dumps(options)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def check(tmp_path, kills, num_steps):
    unbroken = tmp_path / "unbroken"
    process = start(unbroken, num_steps)
    assert process.communicate(timeout=300)[1] is not None
    assert process.returncode == 0
    broken, rng = tmp_path / "broken", random.Random(0)
    folder = broken / "checkpoints"
    seen, done, torn = set(), 0, 0
    while done < kills:
        process = start(broken, num_steps)
        torn += kill_in_the_middle(process, folder, len(seen), rng)
        assert process.returncode == -9, process.stderr and process.stderr.read()
        done += 1
        assert seen <= set(saved_steps(folder)), "a checkpoint was lost"
        seen = set(saved_steps(folder))
    process = start(broken, num_steps)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert saved_steps(folder) == saved_steps(unbroken / "checkpoints")
    for part in STATE:
        a, b = (restore_part(run / "checkpoints", part) for run in (unbroken, broken))
        for x, y in zip(*(map(np.asarray, _leaves(tree)) for tree in (a, b))):
            np.testing.assert_array_equal(x, y)
    assert metrics(broken) == metrics(unbroken)
    return torn


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def metrics(directory):
    lines = (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[k] for k in ("step", "loss", "grad_norm")] for line in lines]


def test_killed_3_times(tmp_path):
    check(tmp_path, 3, 60)


@pytest.mark.slow
def test_killed_20_times(tmp_path):
    assert check(tmp_path, 20, 300) >= 3  # some of them tore a checkpoint that was being written
