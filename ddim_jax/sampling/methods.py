"""The methods: public functions that return (schedule, τ) → `Plan`, and their names.

A new one is a new file with such a function, and a line in `METHODS`; or stays at home, as
`module:function` on the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ddim_jax.arrays import ArrayLike, import_name, is_concrete
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.adams_bashforth import adams_bashforth, pf_euler
from ddim_jax.sampling.dpm_solver import dpm_solver
from ddim_jax.sampling.learned import learned_variance
from ddim_jax.sampling.plan import Method, Plan, euler, pairs
from ddim_jax.sampling.unipc import unipc


def ddim(eta: ArrayLike = 0.0, *, sigma: ArrayLike | str | None = None) -> Method:
    """The steps of Eq. 12 with σ(η) of Eq. 16, or with σ of your own (DDIM §4.1).

    x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε_θ(x_t, t) + σ z; η = 0 is DDIM, η = 1 is DDPM

    Args:
      eta: η ≥ 0, a scalar, or (S,) along τ; may be traced.
      sigma: (S,) σ along τ, in place of η; sigma[0] is 0, as the last step ends at s = 0. Or
        "learned", that of the network for each pixel, between σ(1) and σ̂ (Nichol & Dhariwal 2021,
        Eq. 15), up to √(1 − ᾱ_s), where Eq. 7 ends; in the last step 0.

    Returns:
      A `Method`.

    Raises:
      ValueError: η and σ are both given, or, when used, one is out of range or of another length
        than τ.

    Example:
      >>> import ddim_jax as ddim
      >>> plan = ddim.ddim(eta=1.0)(ddim.linear_schedule(1000), [401, 421])
      >>> f"{plan.steps.sigma[0] ** 2:.4f}"
      '0.1477'
    """
    if sigma is not None and is_concrete(eta) and np.any(np.asarray(eta) != 0):
        raise ValueError(f"give eta or sigma, not both: got eta = {eta} and a sigma")
    if isinstance(sigma, str):
        if sigma != "learned":
            raise ValueError(f'sigma must be numbers or "learned", got {sigma!r}')
        return partial(_learned, in_family=True)
    return partial(euler, eta=eta, sigma=sigma)


def ddpm(variance: str = "small", *, final_noise: bool = False) -> Method:
    """Ho et al.'s DDPM along any τ, with either of its two variances (DDIM §5 and App. D.3).

    `"small"`: σ(1) of Eq. 16, which is `ddim(1.0)`. `"large"`: the noise is scaled by
    σ̂ = √(1 − ᾱ_t/ᾱ_s), while the direction term keeps σ(1). `"learned"`: between the two by the
    network's v, log σ² = v log σ̂² + (1 − v) log σ(1)² (Nichol & Dhariwal 2021, Eq. 15), with the
    direction of σ(1) too, and no noise in the last step.

    Args:
      variance: `"small"`, `"large"` or `"learned"`, which `predicts(…, learned_variance=True)` and
        models with learned variance have.
      final_noise: whether the large variance also adds noise in the last step, to s = 0, where
        the authors add none. (The small one is 0 there.)

    Returns:
      A `Method`.

    Raises:
      ValueError: the variance is unknown, or final_noise is asked of another than the large one.

    Example:
      >>> import ddim_jax as ddim
      >>> plan = ddim.ddpm("large")(ddim.linear_schedule(1000), [1, 999, 1000])
      >>> [round(float(v), 2) for v in plan.steps.sigma**2]
      [0.02, 1.0, 0.0]
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f'variance must be "small", "large" or "learned", got {variance!r}')
    if variance != "large" and final_noise:
        raise ValueError('final_noise goes with variance="large": σ(1) is 0 in the last step')
    if variance == "small":
        return ddim(1.0)
    if variance == "learned":
        return _learned

    def plan(schedule: Schedule, tau: ArrayLike | Sequence[int]) -> Plan:
        t, s = pairs(schedule, tau)
        c = coefficients(schedule, t, s, 1.0, use_sigma_hat=True)
        return Plan(t, c if final_noise else c._replace(sigma=c.sigma * (s > 0)))

    return plan


def _learned(schedule: Schedule, tau: ArrayLike | Sequence[int], in_family: bool = False) -> Plan:
    """DDPM's rows, and what the network chooses its variance from."""
    if not is_concrete(schedule, tau):
        raise TypeError("schedule and tau must be concrete for a learned variance")
    t, s = pairs(schedule, tau)
    learned = learned_variance(schedule, t, s, in_family=in_family)
    return Plan(t, coefficients(schedule, t, s, 1.0), learned=learned)


METHODS: dict[str, Callable[..., Method]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "ddpm-large": partial(ddpm, "large"),
    "ddpm-learned": partial(ddpm, "learned"),
    "ddim-learned": partial(ddim, sigma="learned"),
    "adams-bashforth-2": partial(adams_bashforth, 2),
    "adams-bashforth-3": partial(adams_bashforth, 3),
    "adams-bashforth-4": partial(adams_bashforth, 4),
    "dpm-solver-2": partial(dpm_solver, 2),
    "dpm-solver-3": partial(dpm_solver, 3),
    "dpm-solver-sde": partial(dpm_solver, 2, eta=1.0),
    "unipc-2": partial(unipc, 2),
    "unipc-3": partial(unipc, 3),
    "pf-euler": pf_euler,
}
"""Name → a function that returns the method; what `--method` knows."""
WITH_ETA = ("ddim", "dpm-solver-2")
"""The names that go with an η of one's choice."""
LEARNED = ("ddpm-learned", "ddim-learned")
"""The names that go with networks that learned their variance."""


def find_method(name: str, eta: float = 0.0) -> Method:
    """A method by its name in `METHODS`, or as `module:function`, called with no argument.

    Args:
      name: such as `"ddim"` or `"adams-bashforth-2"`.
      eta: of those in `WITH_ETA`, `"ddim"` and `"dpm-solver-2"`; the others have none.

    Returns:
      A `Method`.

    Raises:
      ValueError: the name is unknown or of no such function, or η is given to a method that has
        none.
      ModuleNotFoundError: there is no such module.

    Example:
      >>> find_method("ddim", 0.5) is not None
      True
    """
    if eta and name not in WITH_ETA:
        raise ValueError(
            f"eta = {eta:g} goes with the methods {' and '.join(WITH_ETA)}; {name!r} has no eta"
        )
    if name in METHODS:
        return METHODS[name](eta=eta) if eta else METHODS[name]()
    if ":" not in name:
        raise ValueError(
            f"unknown method {name!r}; choose {', '.join(METHODS)}, or module:function"
        )
    function = import_name(name, "method")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"{name} must be a function of no argument that returns a method, (schedule, tau) -> "
            f"Plan: {error}"
        ) from error
    if not callable(method := function()):
        raise ValueError(f"{name} must return a method, (schedule, tau) -> Plan, got {method!r}")
    return method
