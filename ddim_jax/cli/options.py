"""Options that several commands share, and how facts are shown."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import Any, Literal, TypeAlias

import numpy as np
import tyro

from ddim_jax.generation.drawing import Labels
from ddim_jax.process import Schedule, ScheduleConfig, as_timesteps, timesteps
from ddim_jax.sampling import Method, find_method
from ddim_jax.training import parallel
from ddim_jax.weights import Model, load_model

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
    prediction: Literal["eps", "x_0", "v", "edm"] | None = None

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
      method: ddim, ddpm, ddpm-large, adams-bashforth-2 (to 4), pf-euler, or module:function.
      eta: of the method ddim: 0 is DDIM, 1 is DDPM.
      spacing: of τ.
      tau: τ itself, in place of steps and spacing: 1,10,100 or a file of numbers (.npy, text).
      clip: clip each predicted x_0 to [−1, 1].
      label: of a model with K classes, the class of all images, in 0..K; K means none.
      cycle_labels: of a model with K classes, image k gets class k mod K.
      guidance: classifier-free, w, for images with classes: 1 is conditional, more is guided.
      seed: of x_T and of the noise.
    """

    steps: int = 50
    method: str = "ddim"
    eta: float = 0.0
    spacing: Spacing = "linear"
    tau: str | None = None
    clip: bool = False
    label: int | None = None
    cycle_labels: bool = False
    guidance: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        how = f"eta = {self.eta:g}" if self.method == "ddim" else self.method
        return f"{f'tau {self.tau}' if self.tau else f'S = {self.steps}'}, {how}, seed {self.seed}"

    @property
    def labels(self) -> Labels:
        """As `generate` takes them."""
        return "cycle" if self.cycle_labels else self.label

    @property
    def stem(self) -> str:
        """The part of a file name that says how it was drawn."""
        label = "" if self.label is None else f"-label{self.label}"
        steps = len(_numbers(self.tau)) if self.tau else self.steps
        how = f"eta{self.eta:g}" if self.method == "ddim" else self.method.replace(":", ".")
        return f"{label}-S{steps}-{how}-seed{self.seed}"

    def timesteps(self, schedule: Schedule) -> np.ndarray:
        """τ, as asked for."""
        if self.tau:
            return as_timesteps(_numbers(self.tau), schedule.num_steps)
        return timesteps(schedule.num_steps, self.steps, self.spacing, schedule=schedule)

    def check(self) -> Method:
        """What can be checked without the model; the method."""
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be >= 0, got --eta {self.eta:g}")
        if self.tau:
            if (self.steps, self.spacing) != (50, "linear"):
                raise ValueError("give --tau, or --steps and --spacing, not both")
            _numbers(self.tau)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2**32 - 1, got {self.seed}")
        if self.cycle_labels and self.label is not None:
            raise ValueError(f"give --label or --cycle-labels, not both, got --label {self.label}")
        if self.guidance is not None and self.labels is None:
            raise ValueError("--guidance is towards a class: give --label or --cycle-labels too")
        return find_method(self.method, self.eta)


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


def _numbers(tau: str) -> np.ndarray:
    """The timesteps of --tau."""
    path = pathlib.Path(tau)
    if path.suffix == ".npy":
        return np.load(path)
    text = path.read_text() if path.is_file() else tau
    try:
        return np.array([int(word) for word in text.replace(",", " ").split()])
    except ValueError:
        raise ValueError(
            f"--tau takes whole numbers, such as 1,10,100, or a file of them, got {tau!r}"
        ) from None


def check_writable(path: pathlib.Path) -> None:
    """Raises OSError where no file or folder could be made at `path`, before long work."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission in {there}")
