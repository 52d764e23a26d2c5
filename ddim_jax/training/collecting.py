"""Metrics from the devices to the log, and to the user; a run that diverges is named here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import jax
import numpy as np

from ddim_jax.data import Dataset, batch_indices
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import Metrics

MAX_SKIPPED = 100  # updates in a row, after which a run that skips them stops nevertheless


def collect(
    waiting: dict[str, list[float]],
    pending: list[Metrics],
    step: int,
    in_a_row: int,
    dataset: Dataset,
    config: TrainConfig,
) -> int:
    """Fetches the metrics of the steps up to `step`; FloatingPointError names the first bad one.

    They are (K,) of each call. Takes and returns the number of updates skipped in a row.
    """
    calls = jax.device_get(pending)  # waits for the devices
    fetched = [dict(zip(call, values)) for call in calls for values in zip(*call.values())]
    for at, metrics in enumerate(fetched, start=step - len(fetched) + 1):
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and not (config.skip_nonfinite and math.isfinite(values["param_norm"])):
            images = batch_indices(dataset, config.batch_size, config.seed, at - 1)
            raise FloatingPointError(
                f"{bad[0]} is {values[bad[0]]} at step {at}: training stopped. Its batch was "
                f"images {first(images)} of {dataset.name}. Checkpoints are from before it; try a "
                "lower learning_rate or grad_clip in a new run, or skip_nonfinite"
            )
        waiting.setdefault("skipped", []).append(float(bool(bad)))
        for name, value in values.items():
            waiting.setdefault(name, []).extend([] if bad else [value])
        in_a_row = in_a_row + 1 if bad else 0
        if in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the {MAX_SKIPPED} updates up to step {at} were all skipped, as none had a finite "
                "loss and gradient: training stopped"
            )
    return in_a_row


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

    def line(self, step: int, waiting: Mapping[str, list[float]]) -> dict[str, float]:
        """Of the steps since the last line up to this one, which have just been made."""
        now = time.perf_counter()
        speed = (step - self._since) * self._config.batch_size / (now - self._last)
        line = {"step": step, **means(waiting, self._config), "images_per_second": speed}
        if self._flops > 0:
            line["flops_per_second"] = speed * self._flops
        if self._flops > 0 and self._peak:
            line["mfu"] = speed * self._flops / self._peak
        self._since, self._last = step, now
        return line | {"seconds": now - self._began}


def means(waiting: Mapping[str, list[float]], config: TrainConfig) -> dict[str, float]:
    means = {name: sum(v) / len(v) for name, v in waiting.items() if name != "skipped"}
    return means | ({"skipped": sum(waiting["skipped"])} if config.skip_nonfinite else {})


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
