"""The settings by which diffusers samples: its defaults, and which values are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ddim_jax.weights.diffusers_scheduler import OF_SCHEDULE


class Setting(NamedTuple):
    """A setting of a scheduler: diffusers' default for it, and which values are read."""

    default: Any
    ok: Callable[[Any], bool]
    read: str


def _one_of(default: Any, *others: Any) -> Setting:
    values = (default, *others)
    ok = lambda v: any(type(v) is type(known) and v == known for known in values)  # noqa: E731
    return Setting(default, ok, ", ".join(map(repr, values)))


def _flag(default: bool) -> Setting:
    return Setting(default, lambda v: type(v) is bool, "true, false")


def _number(default: float, low: float, high: float = math.inf) -> Setting:
    ok = lambda v: type(v) in (int, float) and low < v <= high  # noqa: E731
    return Setting(default, ok, f"a number in ({low:g}, {high:g}]")


OFFSET = Setting(0, lambda v: type(v) is int and 0 <= v < 10**6, "an int >= 0")
ANY = Setting(None, lambda v: True, "")
SPACINGS = ("leading", "trailing", "linspace")
THRESHOLD = {
    "thresholding": _flag(False),
    "dynamic_thresholding_ratio": _number(0.995, 0, 1),
    "sample_max_value": _number(1.0, 0),
}
CHAIN = {
    **THRESHOLD,
    "clip_sample": _flag(True),
    "clip_sample_range": _number(1.0, 0),
    "timestep_spacing": _one_of(*SPACINGS),
    "steps_offset": OFFSET,
}
SIGMA = {
    "timestep_spacing": _one_of("linspace", *SPACINGS[:2]),
    "steps_offset": OFFSET,
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    **dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), _one_of(False)),
    **dict.fromkeys(("sigma_min", "sigma_max"), _one_of(None)),
}
SOLVER = {
    **THRESHOLD,
    **SIGMA,
    "solver_order": _one_of(2, 1, 3),
    "lower_order_final": _flag(True),
    "use_karras_sigmas": _flag(False),
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), _one_of(False)),
    **dict.fromkeys(("flow_shift", "time_shift_type"), ANY),  # of those two
}
SAMPLERS: dict[str, dict[str, Setting]] = {
    "DDPMScheduler": {
        **CHAIN,
        "variance_type": _one_of("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    },
    "DDIMScheduler": {**CHAIN, "set_alpha_to_one": _flag(True)},
    "PNDMScheduler": {
        "skip_prk_steps": _flag(False),
        "set_alpha_to_one": _flag(False),
        "timestep_spacing": CHAIN["timestep_spacing"],
        "steps_offset": OFFSET,
    },
    "DPMSolverMultistepScheduler": {
        **SOLVER,
        "algorithm_type": _one_of("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis"),
        "solver_type": _one_of("midpoint", "heun", "logrho", "bh1", "bh2"),
        "euler_at_final": _flag(False),
        "use_lu_lambdas": _flag(False),
        "lambda_min_clipped": Setting(
            -math.inf, lambda v: type(v) in (int, float) and v < math.inf, "a number"
        ),
        "variance_type": _one_of(None, "learned", "learned_range"),  # the ε half is taken
    },
    "UniPCMultistepScheduler": {
        **SOLVER,
        "solver_type": _one_of("bh2", "bh1", "midpoint", "heun", "logrho"),
        "predict_x0": _one_of(True),
        "disable_corrector": Setting(
            [],
            lambda v: isinstance(v, list) and all(type(i) is int and i >= 0 for i in v),
            "a list of steps, from 0",
        ),
        **dict.fromkeys(("solver_p", "shift_terminal"), _one_of(None)),
    },
    "DEISMultistepScheduler": {
        **{name: setting for name, setting in SOLVER.items() if name not in ("final_sigmas_type",)},
        "algorithm_type": _one_of("deis", "dpmsolver", "dpmsolver++"),  # these all mean the first
        "solver_type": _one_of("logrho", "midpoint", "heun", "bh1", "bh2"),
    },
    "EulerDiscreteScheduler": {
        **SIGMA,
        "use_karras_sigmas": _one_of(False),  # with these its network is called at fractions of t
        "interpolation_type": _one_of("linear"),
        "timestep_type": _one_of("discrete"),
    },
}
OLD = ("tensor_format", "timestep_values", "set_alpha_to_zero")  # of the schedulers of 2022
KNOWN = {*OF_SCHEDULE, *OLD}.union(*SAMPLERS.values())
