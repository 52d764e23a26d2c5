"""A noise schedule in plain numbers, as presets, checkpoints and weights files hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ddim_jax.process.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    reaching_noise,
    scaled_linear_schedule,
    schedule_from_betas,
)

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # each kind's β₁ and β_T


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A schedule in plain numbers, as presets and checkpoints hold it.

    Example:
      >>> ScheduleConfig("scaled_linear").build()
      Schedule(num_steps=1000, alpha_bar_T=0.00466)
    """

    kind: Literal["linear", "scaled_linear", "cosine", "betas"] = "linear"
    num_steps: int = 1000  # T
    beta_start: float | None = None  # None: that of linear_schedule or scaled_linear_schedule
    beta_end: float | None = None
    rescale_betas: bool = False  # multiply β by 1000/T
    zero_terminal_snr: bool = False  # shift and scale √ᾱ so that ᾱ_T = 0; then ε cannot be learned
    given: tuple[float, ...] | None = None  # of kind "betas": β₁..β_T themselves

    @property
    def betas(self) -> tuple[float, float] | None:
        """β₁ and β_T before they are rescaled; None for cosine and for given β."""
        if self.kind not in BETAS:
            return None
        start, end = BETAS[self.kind]
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )

    def build(self) -> Schedule:
        """The `Schedule`; ValueError where the numbers do not make one."""
        if (self.given is None) == (self.kind == "betas"):
            raise ValueError(f'given goes with kind "betas", and kind is {self.kind!r}')
        if self.kind == "betas":
            return self._build_given()
        if self.kind == "cosine":
            if self.rescale_betas or (self.beta_start, self.beta_end) != (None, None):
                raise ValueError(
                    "the cosine schedule has no betas: leave out beta_start, beta_end and "
                    f"rescale_betas, got {self.beta_start}, {self.beta_end}, {self.rescale_betas}"
                )
            return cosine_schedule(self.num_steps, zero_terminal_snr=self.zero_terminal_snr)
        makers = {"linear": linear_schedule, "scaled_linear": scaled_linear_schedule}
        if self.kind not in makers or not (betas := self.betas):
            raise ValueError(
                f"unknown schedule kind {self.kind!r}; choose linear, scaled_linear, cosine, betas"
            )
        options = {"rescale_betas": self.rescale_betas, "zero_terminal_snr": self.zero_terminal_snr}
        return makers[self.kind](self.num_steps, *betas, **options)

    def _build_given(self) -> Schedule:
        if self.rescale_betas or (self.beta_start, self.beta_end) != (None, None):
            raise ValueError("given betas are taken as they are: leave out all other numbers")
        schedule = schedule_from_betas(np.asarray(self.given))
        if schedule.num_steps != self.num_steps:
            raise ValueError(f"given are {schedule.num_steps} betas, and T is {self.num_steps}")
        return reaching_noise(schedule, "zero_terminal_snr=True", self.zero_terminal_snr)

    def facts(self) -> dict[str, Any]:
        """This configuration for JSON, in numbers, so that no later default can change it.

        The layout is that of every file so far: beside "cosine" linear's numbers stand unused,
        `rescale_betas` and `zero_terminal_snr` only where they are true, `given` where it is.

        Example:
          >>> ScheduleConfig(num_steps=50).facts()
          {'kind': 'linear', 'num_steps': 50, 'beta_start': 0.0001, 'beta_end': 0.02}
        """
        start, end = self.betas or BETAS["linear"]
        facts = {
            "kind": self.kind,
            "num_steps": self.num_steps,
            "beta_start": start,
            "beta_end": end,
        }
        facts |= {n: True for n in ("rescale_betas", "zero_terminal_snr") if getattr(self, n)}
        return facts | ({} if self.given is None else {"given": list(self.given)})

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> ScheduleConfig:
        """`facts` undone; TypeError for a name that is not a field.

        Example:
          >>> ScheduleConfig.from_facts({"kind": "scaled_linear", "beta_end": 0.012}).betas
          (0.00085, 0.012)
        """
        given = facts.get("given")
        config = cls(**{**facts, "given": None if given is None else tuple(given)})
        own = BETAS.get(config.kind, BETAS["linear"])
        if (config.beta_start, config.beta_end) != own:
            return config
        return dataclasses.replace(config, beta_start=None, beta_end=None)
