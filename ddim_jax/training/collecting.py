"""Metrics from the devices to the log, and to the user; a run that diverges is named here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from ddim_jax.data import Dataset, batch_indices
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import Metrics

IN_FLIGHT = 2  # calls handed to the device before the host waits for one
MAX_SKIPPED = 100  # updates in a row, after which a run that skips them stops nevertheless


class Collected:
    """Metrics of steps that are made, and not yet in a line of the log.

    Args:
      config, dataset: of the run.
      waiting: name → values of the steps since the last line, as `position` gave them.
      skipped_in_a_row: updates left out one after another, likewise.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        waiting: dict[str, list[float]],
        skipped_in_a_row: int,
    ):
        self._config, self._dataset = config, dataset
        self.waiting, self._in_a_row = waiting, skipped_in_a_row
        self._pending: list[Metrics] = []  # on the devices, (K,) of each call
        self._ends: list[Future[float]] = []  # when each of them is done
        self._clock = ThreadPoolExecutor(1)
        self.ended = 0.0  # when what was fetched last was done, by `time.perf_counter`

    def add(self, metrics: Metrics) -> None:
        """Those of one call; waits for no call but the one `IN_FLIGHT` before."""
        self._pending.append(metrics)
        self._ends.append(self._clock.submit(_when_done, metrics))
        if len(self._pending) > IN_FLIGHT:
            self._pending[-1 - IN_FLIGHT]["loss"].block_until_ready()

    def measured(self, values: Mapping[str, float]) -> None:
        """What is measured now and then, for the next line."""
        for name, value in values.items():
            self.waiting.setdefault(name, []).append(value)

    def fetch(self, step: int) -> None:
        """Fetches all up to `step`; FloatingPointError names the first bad one."""
        calls = jax.device_get(self._pending)  # waits for the devices
        if self._ends:
            self.ended = self._ends[-1].result()
        self._pending, self._ends = [], []
        fetched = [dict(zip(call, values)) for call in calls for values in zip(*call.values())]
        for at, metrics in enumerate(fetched, start=step - len(fetched) + 1):
            self._take(at, {name: float(value) for name, value in metrics.items()})

    def _take(self, at: int, values: dict[str, float]) -> None:
        config = self._config
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and not (config.skip_nonfinite and math.isfinite(values["param_norm"])):
            images = batch_indices(self._dataset, config.batch_size, config.seed, at - 1)
            raise FloatingPointError(
                f"{bad[0]} is {values[bad[0]]} at step {at}: training stopped. Its batch was "
                f"images {first(images)} of {self._dataset.name}. Checkpoints are from before it; "
                "try a lower learning_rate or grad_clip in a new run, or skip_nonfinite"
            )
        self.waiting.setdefault("skipped", []).append(float(bool(bad)))
        for name, value in values.items():
            self.waiting.setdefault(name, []).extend([] if bad else [value])
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if self._in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the {MAX_SKIPPED} updates up to step {at} were all skipped, as none had a finite "
                "loss and gradient: training stopped"
            )

    def means(self) -> dict[str, float]:
        """Of what waits, which is then gone; nothing where every update was skipped."""
        waiting = self.waiting
        if not waiting["loss"]:
            return {}
        self.waiting = {}
        means = {name: sum(v) / len(v) for name, v in waiting.items() if name != "skipped"}
        return means | ({"skipped": sum(waiting["skipped"])} if self._config.skip_nonfinite else {})

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps beside the state."""
        waiting = {"waiting": self.waiting, "skipped_in_a_row": self._in_a_row}
        return {"batch": step, **waiting}


def _when_done(metrics: Metrics) -> float:
    """Waited for beside the loop, which a call may hold up until the devices have begun it."""
    metrics["loss"].block_until_ready()
    return time.perf_counter()


class Meter:
    """Lines of metrics, with how fast the steps since the last one were.

    Args:
      config: of the run.
      flops: of an image's forward and backward pass, 0 where it is not known.
      peak: FLOP/s of all devices, where it is known.
      start: the step of this process's start.
    """

    def __init__(self, config: TrainConfig, flops: float, peak: float | None, start: int):
        self._config, self._flops, self._peak, self._since = config, flops, peak, start
        self.reset()

    def reset(self) -> None:
        """Begins anew: what came before was no step."""
        self._began = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def line(self, step: int, means: Mapping[str, float], now: float) -> dict[str, float]:
        """Of the steps since the last line up to this one, which was made at `now`."""
        speed = (step - self._since) * self._config.batch_size / (now - self._last)
        line = {"step": step, **means, "images_per_second": speed}
        if self._flops > 0:
            line["flops_per_second"] = speed * self._flops
        if self._flops > 0 and self._peak:
            line["mfu"] = speed * self._flops / self._peak
        self._since, self._last = step, now
        return line | {"seconds": now - self._began}


def forecast(steps: int, left: int, seconds: float, compiling: float, batch_size: int) -> str:
    """How fast a run is, and how long it will take, for the user.

    Example:
      >>> forecast(120, 5880, 60.0, 12.3, 32)
      '64 images/s, 2 steps/s: about 49 min to go (12 s of compiling apart)'
    """
    rate = steps / seconds
    minutes = left / rate / 60
    time = f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
    return (
        f"{rate * batch_size:.3g} images/s, {rate:.2g} steps/s: about {time} to go "
        f"({compiling:.0f} s of compiling apart)"
    )


def first(images: np.ndarray, count: int = 8) -> str:
    more = f", … ({len(images)} in all)" if len(images) > count else ""
    return ", ".join(str(i) for i in images[:count]) + more
