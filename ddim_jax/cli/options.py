"""Options that several commands share, and how facts are shown."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import Any, Literal, TypeAlias

import tyro

from ddim_jax import parallel
from ddim_jax.generate import Labels
from ddim_jax.pretrained import Model, load_model
from ddim_jax.schedule import ScheduleConfig

Spacing = Literal[
    "linear", "quadratic", "uniform", "quad", "leading", "trailing", "linspace", "logsnr"
]


@dataclasses.dataclass(frozen=True)
class Source:
    """What the model's file does not say, or which of its contents is meant.

    Attributes:
      step: which checkpoint of a run folder, the latest by default.
      config: the network of a PyTorch checkpoint: cifar10, celeba64 or lsun256.
      image_size: of a PyTorch checkpoint of another network, a side or height and width; its
        shapes tell the rest.
      schedule: of the noise, T = 1000, in place of what the file says; linear is the paper's.
      prediction: what the network predicts, in place of what the file says; noise if neither says.
    """

    step: int | None = None
    config: str | None = None
    image_size: int | tuple[int, int] | None = None
    schedule: Literal["linear", "cosine"] | None = None
    prediction: Literal["eps", "x_0", "v"] | None = None

    def given(self) -> dict[str, Any]:
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }

    def load(self, model: str) -> Model:
        given = self.given()
        if self.schedule:
            given["schedule"] = ScheduleConfig(self.schedule)
        return load_model(model, **given)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw.

    Attributes:
      steps: S, the number of network calls per image.
      eta: 0 is DDIM, 1 is DDPM.
      spacing: of τ.
      sigma_hat: the larger noise of DDPM; takes eta = 1.
      clip: clip each predicted x_0 to [−1, 1].
      label: of a model with K classes, the class of all images, in 0..K; K means none.
      cycle_labels: of a model with K classes, image k gets class k mod K.
      guidance: classifier-free, w, for images with classes: 1 is conditional, more is guided.
      seed: of x_T and of the noise.
    """

    steps: int = 50
    eta: float = 0.0
    spacing: Spacing = "linear"
    sigma_hat: bool = False
    clip: bool = False
    label: int | None = None
    cycle_labels: bool = False
    guidance: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"S = {self.steps}, eta = {self.eta:g}, seed {self.seed}"

    @property
    def labels(self) -> Labels:
        """As `generate` takes them."""
        return "cycle" if self.cycle_labels else self.label

    def check(self) -> None:
        """What can be checked without the model."""
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be >= 0, got --eta {self.eta:g}")
        if self.sigma_hat and self.eta != 1.0:
            raise ValueError(f"--sigma-hat takes --eta 1 (App. D.3), got --eta {self.eta:g}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2**32 - 1, got {self.seed}")
        if self.cycle_labels and self.label is not None:
            raise ValueError(f"give --label or --cycle-labels, not both, got --label {self.label}")
        if self.guidance is not None and self.labels is None:
            raise ValueError("--guidance is towards a class: give --label or --cycle-labels too")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes; Slurm, Open MPI and Cloud TPU say these by themselves.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: how many processes take part.
      process_id: which one this is, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def join(self) -> None:
        parallel.initialize(self.coordinator, self.num_processes, self.process_id)


SourceOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Source]
SamplingOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Sampling]
ProcessOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Processes]


def describe(facts: dict[str, Any], indent: str = "") -> str:
    """Nested facts as indented lines, with commas in whole numbers."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", describe(value, indent + "  ")]
        else:
            shown = f"{value:,}" if type(value) is int else value
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(lines)


def check_writable(path: pathlib.Path) -> None:
    """Raises OSError where no file or folder could be made at `path`, before long work."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission in {there}")
