"""Trains a small network on digits in a process of its own: `python -m tests.worker '{JSON}'`.

The tests kill it, and start two at once.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp


def start(directories, train, **options):
    """The process that trains in each folder in turn, begun; `finish` waits for it."""
    directories = directories if isinstance(directories, list) else [directories]
    options = {"directories": list(map(str, directories)), "train": train, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.worker", json.dumps(options)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes, seconds=240):
    """The exit codes of the processes, and what they said on stderr."""
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], errors


def network(params, x, t, dropout_key=None):
    """Two convolutions, a learned vector for each t, and dropout between: few leaves, quick."""

    def conv(x, kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)

    h = jax.nn.silu(conv(x, params["in"]) + params["time"][t - 1][:, None, None, :])
    if dropout_key is not None:
        h = jnp.where(jax.random.bernoulli(dropout_key, 0.9, h.shape), h / 0.9, 0.0)
    return conv(h, params["out"])


def network_params(width=64):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (3, 3, 1, width), "time": (1000, width), "out": (3, 3, width, 1)}
    return {name: jax.random.normal(k, s) / 8 for k, (name, s) in zip(keys, shapes.items())}


def train(directory, config):
    """Trains on all devices of all processes, or goes on from the last checkpoint."""
    from ddim_jax.data import load
    from ddim_jax.process.schedule import linear_schedule
    from ddim_jax.training.config import TrainConfig
    from ddim_jax.training.loop import fit

    schedule, config = linear_schedule(1000), TrainConfig(**config)
    fit(network, network_params(), schedule, load("digits"), config, directory,
        resume="auto", progress=False)  # fmt: skip


def main(options):
    jax.config.update("jax_num_cpu_devices", options.get("devices", 1))
    from ddim_jax.training import parallel

    parallel.initialize(*options.get("processes", ()))
    for directory in options["directories"]:
        train(directory, options["train"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
