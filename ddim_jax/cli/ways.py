"""Options of the commands that draw: the way from x_T to x_0, classes and guidance."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from fractions import Fraction
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import tyro

from ddim_jax.generation.condition import Condition, Labels, condition
from ddim_jax.process import Schedule, as_timesteps, timesteps
from ddim_jax.sampling import Method, find_method
from ddim_jax.storage.files import portable
from ddim_jax.weights import Model
from ddim_jax.weights.model import SAYING_HOW, Stored, own_tau, stored
from ddim_jax.weights.pretrained import with_classes

Spacing = Literal[
    "linear", "quadratic", "uniform", "quad", "leading", "trailing", "linspace", "logsnr"
]
STEPS = 50  # S, unless it is said or the model has its own
CONDITION = ("label", "labels", "guidance", "guidance_interval")


@dataclasses.dataclass(frozen=True)
class Classes:
    """Which classes.

    Attributes:
      label: of a model with classes, that of all images: a number, a name, or none.
      labels: or several classes in turn over the images' numbers, such as 0,1,2 or cat,dog, or all.
    """

    label: str | None = None
    labels: str | None = None

    @property
    def wanted(self) -> Labels:
        """The labels, as `generate` takes them."""
        if self.labels is None or self.labels == "all":
            return self.label if self.labels is None else "all"
        return self.labels.split(",")

    def check_classes(self) -> None:
        """What can be checked without the model."""
        if self.labels is not None and self.label is not None:
            raise ValueError(
                f"give --label or --labels, not both, got --label {self.label} and --labels "
                f"{self.labels}"
            )
        for name in ("label", "labels"):
            given = getattr(self, name)
            if given is not None and "" in ([given] if name == "label" else given.split(",")):
                raise ValueError(f"--{name} holds an empty name, got {given!r}")


@dataclasses.dataclass(frozen=True)
class Way:
    """From x_T to x_0.

    Attributes:
      steps: S, the number of network calls per image, 50 by default. A distilled model has a number
        of its own, along its own τ by ddim with eta 0, and is drawn otherwise with --tau alone.
      method: ddim, ddpm, ddpm-large, adams-bashforth-2 (to 4), dpm-solver-2 (or 3, or sde), unipc-2
        (or 3), pf-euler, or module:function.
      eta: of the methods ddim and dpm-solver-2: 0 adds no noise, 1 is DDPM's.
      spacing: of τ.
      tau: τ itself, in place of steps and spacing: 1,10,100 or a file of numbers (.npy, text).
      clip: clip each predicted x_0 to [−1, 1].
    """

    steps: int | None = None
    method: str = "ddim"
    eta: float = 0.0
    spacing: Spacing = "linear"
    tau: str | None = None
    clip: bool = False


@dataclasses.dataclass(frozen=True)
class Sampling(Way, Classes):
    """How to draw.

    Attributes:
      guidance: classifier-free, w, for images with classes: 1 is conditional, more is guided.
      guidance_interval: LO,HI: guide there only; whole numbers are t of 1..T, others parts of T,
        such as 0.2,0.8.
      seed: of x_T and of the noise.
    """

    guidance: float | None = None
    guidance_interval: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        asked = {name: getattr(self, name) for name in CONDITION if getattr(self, name) is not None}
        steps = f"S = {self.steps or STEPS}" if self.tau is None else f"tau {self.tau}"
        parts = [steps, self.how]
        parts += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in asked.items()]
        return ", ".join([*parts, f"seed {self.seed}"])

    @property
    def how(self) -> str:
        """The method."""
        eta = f"eta = {self.eta:g}"
        return eta if self.method == "ddim" else self.method + (f", {eta}" if self.eta else "")

    @property
    def stem(self) -> str:
        """The part of a file name that says how it was drawn."""
        names = {"label": "label", "labels": "labels", "guidance": "w", "guidance_interval": "in"}
        asked = {short: getattr(self, name) for name, short in names.items()}
        marks = [f"{short}{_short(value)}" for short, value in asked.items() if value is not None]
        steps = len(_numbers(self.tau)) if self.tau is not None else self.steps or STEPS
        how = self.how.replace(", ", "-").replace(" = ", "").replace(":", ".")
        return file_name("-".join(["", *marks, f"S{steps}", how, f"seed{self.seed}"]))

    def words(self) -> list[str]:
        """The options that say all of this but the classes."""
        defaults, words = type(self)(steps=STEPS), list[str]()
        for name, value in dataclasses.asdict(self).items():
            if name in ("label", "labels") or value == getattr(defaults, name):
                continue
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, portable(_short(value))]
        return words

    def interval(self, num_steps: int) -> tuple[int, int] | None:
        """The guidance interval in t of 1..T: of parts of T, the t with lo ≤ t/T ≤ hi."""
        if self.guidance_interval is None:
            return None
        low, high = _pair(self.guidance_interval)
        if low.denominator == high.denominator == 1 and "." not in self.guidance_interval:
            return int(low), int(high)
        return max(1, math.ceil(low * num_steps)), math.floor(high * num_steps)

    def model(self, name: str) -> str:
        """The model to load: of a shipped one that has no classes the one that has, if need be."""
        return name if self.wanted is None else with_classes(name)

    def condition(self, model: Model) -> Condition:
        """Classes and guidance, checked against the model."""
        interval = self.interval(model.schedule.num_steps)
        return condition(model, self.wanted, self.guidance, interval)

    def of(self, model: Model) -> Self:
        """The same with `steps`, or with the τ of a distilled model, unless another is given."""
        usual = (self.method, self.eta, self.spacing) == ("ddim", 0.0, "linear")
        own = own_tau(model, self.steps, usual) if self.tau is None else None
        if own is None:
            return dataclasses.replace(self, steps=self.steps or STEPS)
        return dataclasses.replace(self, steps=STEPS, tau=",".join(map(str, own)))

    def timesteps(self, schedule: Schedule) -> np.ndarray:
        """τ, as asked for."""
        if self.tau is not None:
            return as_timesteps(_numbers(self.tau), schedule.num_steps)
        return timesteps(schedule.num_steps, self.steps or STEPS, self.spacing, schedule=schedule)

    def check(self) -> Method:
        """What can be checked without the model; the method."""
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be >= 0, got --eta {self.eta:g}")
        if self.tau is not None:
            if (self.steps, self.spacing) != (None, "linear"):
                raise ValueError("give --tau, or --steps and --spacing, not both")
            _numbers(self.tau)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2**32 - 1, got {self.seed}")
        self.check_classes()
        if self.guidance is not None and self.wanted is None:
            raise ValueError("--guidance is towards a class: give --label or --labels too")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"--guidance must be finite, got {self.guidance}")
        if self.guidance_interval is not None:
            _pair(self.guidance_interval)
            if self.guidance is None:
                raise ValueError("--guidance-interval is for guidance: give --guidance too")
        return find_method(self.method, self.eta)


@dataclasses.dataclass(frozen=True)
class Drawing(Sampling):
    """How to draw, or that the model says it.

    Attributes:
      as_stored: as the model says: the scheduler of a diffusers folder, or the flags of OpenAI's
        networks; its method, spacing of τ and clipping.
    """

    as_stored: bool = False

    @property
    def how(self) -> str:
        if not self.as_stored:
            return super().how
        return "as stored" + (f", eta = {self.eta:g}" if self.eta else "")

    def check(self) -> Method:
        """As `Sampling.check`."""
        fields = {f: getattr(Sampling(), f) for f in ("method", "spacing", "tau", "clip")}
        given = [f for f, default in fields.items() if getattr(self, f) != default]
        if self.as_stored and given:
            raise ValueError(f"--as-stored takes {given[0]} from the model: leave out one of them")
        return super().check()

    def check_model(self, name: str, model: Model) -> None:
        """Raises ValueError where the model does not say it; says so where it does in vain."""
        says = model.facts.keys() & SAYING_HOW
        if self.as_stored and not says and model.tau is None:
            raise ValueError(f"{name} does not say how it is sampled: leave out --as-stored")
        if says and not self.as_stored:
            print(f"drawn by {self.method}, and not as {name} says itself: --as-stored does that")

    def stored(self, model: Model, method: Method) -> Stored:
        """Model, τ and method as asked for."""
        if self.as_stored and self.tau is None:
            return stored(model, self.steps, eta=self.eta or None)
        return Stored(model, self.timesteps(model.schedule), method)


ClassOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Classes]
SamplingOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Sampling]
DrawingOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Drawing]


def _numbers(tau: str) -> np.ndarray:
    """The timesteps of --tau."""
    try:
        if tau.endswith(".npy"):
            return np.load(tau)
        text = pathlib.Path(tau).read_text() if os.path.isfile(tau) else tau  # long ones too
        return np.array([int(word) for word in text.replace(",", " ").split()])
    except (ValueError, EOFError):
        raise ValueError(
            f"--tau takes whole numbers, such as 1,10,100, or a file of them, got {tau!r}"
        ) from None


def _short(value: Any) -> str:
    """A value as one would type it: 2 for 2.0."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _pair(interval: str) -> tuple[Fraction, Fraction]:
    """The two numbers of --guidance-interval, exactly."""
    try:
        low, high = (Fraction(word.strip()) for word in interval.split(","))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--guidance-interval takes two numbers, such as 0.2,0.8 or 200,800, got {interval!r}"
        ) from None
    if "." in interval and not 0 <= min(low, high) <= max(low, high) <= 1:
        raise ValueError(
            "--guidance-interval has parts of T in 0..1, or whole numbers, which are t, got "
            f"{interval}"
        )
    if low > high:
        raise ValueError(f"--guidance-interval must go from low to high, got {interval}")
    return low, high


def file_name(text: str) -> str:
    """The text with what does not belong into the name of a file as an underscore.

    Example:
      >>> file_name("-labels0,1-S50"), file_name("polar bear/white")
      ('-labels0,1-S50', 'polar_bear_white')
    """
    return re.sub(r"[^\w.,=-]+", "_", text)
