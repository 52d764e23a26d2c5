"""From a command to its first result: an image, and a step of training, compiled anew and before.

Each is measured by a clock outside of the process, on a machine that does nothing else.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks import racing


def first_step(
    folder: pathlib.Path, words: Sequence[str], env: Mapping[str, str], deadline: float
) -> dict[str, Any]:
    """Seconds from `ddim-jax train …` to the line of its first updates; the run is then ended.

    Args:
      folder: of the run, to be made.
      words: of the command, after `train`.
      env: the environment, which names the compilation cache.
      deadline: of `time.time`, to give up at.

    Returns:
      {"seconds", "compiling": as the command says it}, or {"why": what went wrong}.
    """
    command = [sys.executable, "-m", "ddim_jax.cli", "train", *words, "--out", str(folder)]
    log, metrics = folder.with_suffix(".log"), folder / "metrics.jsonl"
    with log.open("w") as output:
        began = time.time()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=dict(env), start_new_session=True
        )
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if time.time() > deadline:
                return {"why": "no time was left"}
            if process.poll() is not None:
                said = log.read_text().strip().splitlines() or ["it ended without a word"]
                return {"why": said[-1][:300]}
            time.sleep(0.02)
        took = time.time() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    compiled = re.findall(r"compiled in (\d+) s", log.read_text())
    return {"seconds": took, "compiling": float(compiled[-1]) if compiled else None}


def first_image(
    folder: pathlib.Path, spec: Mapping[str, Any], env: Mapping[str, str], deadline: float
) -> dict[str, Any]:
    """Seconds from a process's start to its first sample, weights read from a diffusers folder.

    Args:
      folder: for its log and output.
      spec: of a side of sampling.
      env: the environment, which names the compilation cache.
      deadline: as for `first_step`.

    Returns:
      {"first_seconds", "prepare_seconds": of them, to read the weights, compile and draw}, or
      {"why": what went wrong}.
    """
    output = str(folder / "first.npy")
    worker = racing.Worker(dict(spec) | {"output": output}, env, folder / "first.log")
    while worker.state not in (racing.READY, racing.FAILED) and time.time() < deadline:
        worker.look()
        if worker.state == racing.LOADED:
            worker.prepare()
        time.sleep(0.01)
    worker.kill()
    if worker.state == racing.READY:
        return worker.prepared()
    return {"why": worker.why or "no time was left"}
