"""Many cells in little time: one is judged in a thread while the next is drawn on the device."""

from __future__ import annotations

import io
import pathlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from ddim_jax.generation.drawing import check_finite
from ddim_jax.sampling import Method, find_method
from experiments.arguments import noise
from experiments.common import Cell, Experiment
from experiments.provenance import write

STARTED = time.monotonic()  # what --seconds counts from: the process, whatever it runs
HELD = 2**30  # bytes of images that wait for their judge


class OutOfTimeError(TimeoutError):
    """--seconds are over."""


def cells(
    experiment: Experiment,
    jobs: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Cell]]],
    first: Callable[[], Any] = lambda: None,
) -> dict[str, Cell]:
    """Finished cells from their files; each other one is judged while the next is drawn.

    Args:
      experiment: whose folder keeps them.
      jobs: key → (draw, judge); what `draw()` gives is what `judge` makes a cell of.
      first: what the judging thread begins with, while the first cell is drawn.

    Returns:
      Key → cell, without those that were not yet drawn when --seconds were over.
    """
    found: dict[str, Future[Cell]] = {}

    def judged(judge: Callable[[Any], Cell], drawn: Any, seconds: float) -> Cell:
        return judge(drawn) | {"drawing_seconds": seconds}

    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[Future[Any], int]] = [(pool.submit(first), 0)]
        try:
            for key, (draw, judge) in jobs.items():
                if experiment.has(key):
                    found[key] = pool.submit(experiment.cell, key, dict)
                    continue
                check_time(experiment)
                began = time.perf_counter()
                drawn = draw()
                spent = time.perf_counter() - began
                compute = partial(judged, judge, drawn, spent)
                found[key] = pool.submit(experiment.cell, key, compute)
                waiting.append((found[key], getattr(drawn, "nbytes", 0)))
                while waiting and (waiting[0][0].done() or sum(n for _, n in waiting) > HELD):
                    waiting.pop(0)[0].result()  # errors at once
        except OutOfTimeError as late:
            print(f"{experiment.name}: {late}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {key: future.result() for key, future in found.items()}


def drawn(experiment: Experiment, eta: str, steps: int, spacing: str | None = None) -> np.ndarray:
    """Images, uint8 (n, H, W, C), image k from the same x_T in every cell; resumes.

    They are kept in `samples/`, batch by batch, each fetched while the next one is drawn.

    Raises:
      FloatingPointError: images are not finite; the message numbers them.
    """
    args, number = experiment.args, experiment.num_images(steps)
    spacing = spacing or experiment.spacing
    method, clip = _method(eta, getattr(args, "clip", False))
    plan = method(experiment.model.schedule, experiment.tau(steps, spacing))
    name = f"eta{eta.replace(':', '.')}-S{steps}-{spacing}"
    folder = args.out / "samples" / name
    folder.mkdir(parents=True, exist_ok=True)
    devices = len(jax.local_devices())
    size = min(args.batch_size, -(-number // devices)) * devices
    parts: dict[int, np.ndarray] = {}
    pending: list[tuple[int, pathlib.Path, Any, int]] = []
    for start in range(0, number, size):
        path = folder / f"images-{start:08d}-{size}.npy"
        if path.exists():
            parts[start] = np.load(path)
            continue
        check_time(experiment)
        result = experiment.stepper.draw(plan, args.seed, start, size, clip)
        pending.append((start, path, result, number - start))
        if len(pending) > 1:
            _fetch(parts, *pending.pop(0))
    for one in pending:
        _fetch(parts, *one)
    return np.concatenate([parts[start] for start in sorted(parts)])


def check_time(experiment: Experiment) -> None:
    """Raises OutOfTimeError where --seconds are over."""
    seconds = experiment.args.seconds
    if seconds and time.monotonic() - STARTED > seconds:
        raise OutOfTimeError(f"{seconds} s are over; the same command goes on from here")


def _method(eta: str, clip: bool) -> tuple[Method, bool]:
    options = {"clip": clip, "method": "ddim"} | noise(eta)
    clip = options.pop("clip")
    return find_method(options.pop("method"), options.pop("eta", 0.0)), clip


def _fetch(parts: dict[int, np.ndarray], start: int, path: pathlib.Path, result: Any,
           wanted: int) -> None:  # fmt: skip
    images, finite = (v[:wanted] for v in jax.device_get(result))
    check_finite(start + np.flatnonzero(~finite))
    buffer = io.BytesIO()
    np.save(buffer, images)
    write(path, buffer.getvalue())
    parts[start] = images
