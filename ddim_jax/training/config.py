"""How to train: all settings of a run's optimiser, average, batches and intervals, checked."""

import dataclasses
import math
from typing import Literal

from ddim_jax.process.gamma import find_gamma
from ddim_jax.process.prediction import PREDICTIONS, SIGMA_DATA


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are those of the paper's CIFAR-10 run (with Ho et al.'s warm-up).

    Attributes:
      batch_size: images per step, over all devices and processes.
      num_updates: optimiser steps in all.
      prediction: what the network learns to predict: ε as in the paper, x_0, v, or Karras et al.'s
        F ("edm"). ε's error is multiplied by 1/√ᾱ_T at the start of sampling, and DDIM never
        corrects it; a network trained briefly does better with the others.
      gamma: γ_t of Eq. 5, the weight of the squared error of what is predicted: "one", "bound",
        "min-snr-5", "truncated-snr", "edm", …, or module:function, see `find_gamma`.
      sigma_data: of the prediction "edm" alone, the standard deviation of the data in [−1, 1].
      learning_rate: Adam's, after the warm-up.
      warmup_steps: the rate of step n = 0, 1, … is learning_rate · min(1, (n+1)/warmup_steps).
      cosine_decay: multiply the rate by ½(1 + cos(π n/num_updates)): better for short runs.
        num_updates is then part of what a resumed run must keep.
      grad_clip: largest global norm of the gradient; a larger one is scaled down to it.
      adam_b1: decay of the mean of the gradient.
      adam_b2: decay of the mean of its square.
      adam_eps: Adam's ε.
      ema_decay: of the moving average, see `ema_rate`.
      post_hoc: keep two power-function averages too, and store them in `averages/` with each
        checkpoint: `ddim-jax average` makes one of any length of them (`training.averages`).
      flip: mirror each image left-right with probability 1/2.
      label_dropout: for class-conditional networks, the probability of hiding a label from the
        network (classifier-free guidance); unused by unconditional ones.
      seed: of everything random in training.
      accumulate: work through each batch in so many parts, one after the other: less memory, the
        same update (dropout masks aside). Divides batch_size.
      fsdp: over how many devices each parameter, its average and its optimiser state are split;
        the batch is split over all devices in any case.
      skip_nonfinite: leave out an update whose loss or gradient is not finite, and count it, where
        the run would otherwise stop. After 100 in a row it stops.
      num_threads: threads that read and decode images.
      num_workers: processes that do so instead, 0 for none; for data that threads cannot keep up
        with.
      data_on_device: keep all images on each device, and send indices alone; None: off the CPU,
        where they take less than an eighth of its memory.
      steps_per_call: the most updates that one call of the compiled step makes; None: one on a CPU,
        else about half a second of them. All intervals and num_updates should have a large common
        divisor, as updates are counted, and stopped, by whole calls.
      log_every: steps between lines of metrics.
      checkpoint_every: steps between checkpoints.
      sample_every: steps between pictures of samples drawn with the moving average; 0 for none.
      keep: how many checkpoints stay.

    Raises:
      ValueError: a field outside its range.

    Example:
      >>> TrainConfig(batch_size=128, num_updates=1000, warmup_steps=100).learning_rate
      0.0002
    """

    batch_size: int = 128
    num_updates: int = 800_000
    prediction: Literal["eps", "x_0", "v", "edm"] = "eps"
    gamma: str = "one"
    sigma_data: float = SIGMA_DATA
    learning_rate: float = 2e-4
    warmup_steps: int = 5000
    cosine_decay: bool = False
    grad_clip: float = 1.0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    ema_decay: float = 0.9999
    post_hoc: bool = False
    flip: bool = False
    label_dropout: float = 0.1
    seed: int = 0
    accumulate: int = 1
    fsdp: int = 1
    skip_nonfinite: bool = False
    num_threads: int = 4
    num_workers: int = 0
    data_on_device: bool | None = None
    steps_per_call: int | None = None
    log_every: int = 100
    checkpoint_every: int = 5000
    sample_every: int = 5000
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_updates", "log_every", "checkpoint_every", "keep",
                     "accumulate", "fsdp", "num_threads"):  # fmt: skip
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("warmup_steps", "num_workers", "sample_every"):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("learning_rate", "grad_clip", "adam_eps", "sigma_data"):
            _require(0 < getattr(self, name) < math.inf, self, name, "positive and finite")
        for name in ("adam_b1", "adam_b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")
        _require(0 <= self.label_dropout <= 1, self, "label_dropout", "in [0, 1]")
        _require(0 <= self.seed < 2**32, self, "seed", "in 0..2**32 - 1")
        _require(
            self.steps_per_call is None or self.steps_per_call >= 1,
            self,
            "steps_per_call",
            "at least 1, or None",
        )
        kinds = ", ".join(map(repr, PREDICTIONS))
        _require(self.prediction in PREDICTIONS, self, "prediction", f"one of {kinds}")
        find_gamma(self.gamma)
        divides = self.batch_size % self.accumulate == 0
        _require(divides, self, "accumulate", f"a divisor of batch_size = {self.batch_size}")


def _require(condition: bool, config: TrainConfig, name: str, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}")
