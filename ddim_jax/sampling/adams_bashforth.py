"""Fewer steps: Adams–Bashforth on the ODE behind DDIM, and the paper's Eq. 15 for comparison.

In x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ), sampling at η = 0 is Euler's method on dx̄ = ε_θ dσ (DDIM
Eq. 13–14). A method that remembers earlier ε integrates the same ODE to higher order with the same
number of network calls. Each is the DDIM step of Eq. 12 with a weighted sum of ε's in the place of
ε, and differs from the others in the table of weights alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import ArrayLike, is_concrete
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.lagrange import integrals
from ddim_jax.sampling.plan import Method, Plan, euler


def adams_bashforth(order: int = 2, *, variable: str = "angle") -> Method:
    """Adams–Bashforth steps on the ODE behind DDIM (DDIM Eq. 13–14 and §7).

    x̄_s = x̄_t + ∫_{σ_t}^{σ_s} P dσ, where P interpolates the last `order` values of ε_θ

    P is a polynomial in the angle φ = arctan σ (so √ᾱ = cos φ, √(1 − ᾱ) = sin φ) unless
    `variable` says in σ itself. Both have the order; but at large σ ε_θ changes like 1/σ, which
    is linear in φ, and steps there are so long in σ that a polynomial in σ does much worse.
    The integral is over σ in either case, exact for unequal steps. Order 1 is `ddim()`.

    Start-up: fewer ε's are known in the first `order` steps, and Euler's first one errs by O(h²),
    which would leave the whole run at order 2. So these steps do not add to x̄_t but integrate
    anew from x̄_T, through all ε's known so far: x̄_s = x̄_T + ∫_{σ_T}^{σ_s} P dσ. That repairs
    the earlier steps when better ε's are known; at order 4 the second ε, the only one too
    inaccurate, is dropped once four are known. The order is kept at exactly one call per element
    of τ. The last step, to σ = 0, extrapolates farthest and is taken one order lower, which
    keeps the order too, and helps when S is small.

    A clipped x̂_0 makes ε less smooth, and can cost the higher orders.

    Args:
      order: 1, 2, 3 or 4; memory holds as many arrays of ε.
      variable: what P is a polynomial in: `"angle"` or `"sigma"`.

    Returns:
      A `Method`, for schedules with ᾱ_T > 0.

    Raises:
      ValueError: order or variable is out of range; when used, ᾱ is 0 at an element of τ (σ is
        infinite).

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> tau, method = ddim.timesteps(1000, 20), ddim.adams_bashforth(3)
      >>> ddim.sample(exact, x_T, schedule, tau, method=method).shape
      (4, 2)
    """
    _check_order(order, variable)

    def plan(schedule: Schedule, tau: ArrayLike | Sequence[int]) -> Plan:
        plan = euler(schedule, tau)
        weights = adams_bashforth_weights(_sigma(plan.steps), order, variable)
        return dataclasses.replace(plan, weights=weights)

    return plan


def pf_euler() -> Method:
    """Euler's method on the probability-flow ODE in dt, for comparison (DDIM Eq. 15).

    x̄_s = x̄_t + ½ (σ_s² − σ_t²)/σ_t · ε_θ(x_t, t), with σ² = (1 − ᾱ)/ᾱ

    The same ODE as DDIM's, another variable: Euler in dσ² and not in dσ. The two agree for small
    steps only, and DDIM is the better one for few.

    Returns:
      A `Method`, for schedules with ᾱ_T > 0.

    Raises:
      ValueError: when used, ᾱ is 0 at an element of τ.

    Example:
      >>> import ddim_jax as ddim
      >>> plan = ddim.pf_euler()(ddim.linear_schedule(1000), [500, 1000])
      >>> plan.weights.round(2).tolist()  # ½ (σ_s + σ_t)/σ_t; DDIM has 1
      [[0.51], [0.5]]
    """

    def plan(schedule: Schedule, tau: ArrayLike | Sequence[int]) -> Plan:
        plan = euler(schedule, tau)
        sigma = _sigma(plan.steps)
        weights = (sigma[1:] + sigma[:-1]) / (2 * sigma[:-1])  # ½(σ_s² − σ_t²)/σ_t over σ_s − σ_t
        return dataclasses.replace(plan, weights=weights[:, None])

    return plan


def adams_bashforth_weights(sigma: Any, order: int, variable: str = "angle") -> Any:
    """The share of each remembered ε in each step: w with x̄_{n+1} = x̄_n + h_n Σ_j w_nj ε_{n−j}.

    w_nj = (1/h_n) ∫_{σ_n}^{σ_{n+1}} L_nj dσ, h_n = σ_{n+1} − σ_n, with L_nj the Lagrange polynomial
    of node σ_{n−j}; in the first `order` steps and the last what `adams_bashforth` says.

    Args:
      sigma: (S+1,) strictly decreasing, σ_T first and 0 last.
      order: 1, 2, 3 or 4.
      variable: what L_nj is a polynomial in: `"angle"` or `"sigma"`.

    Returns:
      (S, order) w, newest ε first; float64 on the host where sigma is concrete.

    Raises:
      ValueError: order or variable is unknown.

    Example:
      >>> import numpy as np
      >>> from ddim_jax.sampling.adams_bashforth import adams_bashforth_weights
      >>> (adams_bashforth_weights(np.arange(4.0, -1, -1), 2, "sigma") + 0).round(9)
      array([[ 1. ,  0. ],
             [ 2. , -1. ],
             [ 1.5, -0.5],
             [ 1. ,  0. ]])
    """
    _check_order(order, variable)
    xp: Any = np if is_concrete(sigma) else jnp
    n = np.arange(sigma.shape[0] - 1)[:, None]
    k = n - np.arange(order)[None, :]  # slot j of step n holds the ε of call n − j
    last = (n == len(n) - 1) & (n >= order) & (order > 1)
    known = (k >= 0) & ~(last & (k == n - order + 1)) & ~((k == 1) & (n >= 3) & (order == 4))
    start = sigma[np.where(n < order, 0, n)]
    total = _integrals(xp, sigma[np.maximum(k, 0)], known, start, sigma[n + 1], variable)
    already = xp.pad(total, ((1, 0), (1, 0)))[:-1, :-1]  # of step n − 1, its ε's one slot on
    return (total - xp.where((n > 0) & (n < order), already, 0)) / (sigma[n + 1] - sigma[n])


def _integrals(xp: Any, node: Any, known: np.ndarray, start: Any, end: Any, variable: str) -> Any:
    """(S, p) ∫ dσ from start to end (S, 1) of the Lagrange polynomials of the known nodes (S, p).

    By Gauss–Legendre quadrature in asinh σ, in which 32 points give all digits of float64.
    """
    points, weights = (xp.asarray(v, node.dtype) for v in np.polynomial.legendre.leggauss(32))
    low, high = xp.arcsinh(start), xp.arcsinh(end)
    v = (low + high) / 2 + points[None] * (high - low) / 2  # (S, 32)
    d_sigma = xp.cosh(v) * weights[None] * (high - low) / 2
    u: Any = xp.arctan if variable == "angle" else lambda sigma: sigma
    return integrals(u(node), known, u(xp.sinh(v)), d_sigma)


def _check_order(order: int, variable: str) -> None:
    if isinstance(order, bool) or order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order!r}")
    if variable not in ("angle", "sigma"):
        raise ValueError(f'variable must be "angle" or "sigma", got {variable!r}')


def _sigma(c: Any) -> Any:
    """(S+1,) σ = √((1 − ᾱ)/ᾱ) along the steps, ending in 0."""
    if is_concrete(c) and not np.all(np.asarray(c.sqrt_alpha_bar_t) > 0):
        raise ValueError(
            "alpha_bar[t] = 0 (zero terminal SNR) at the first step: sigma is infinite there, and "
            "a multistep method cannot start; use `ddim()`, or a tau that stops before T"
        )
    xp: Any = np if is_concrete(c) else jnp
    sigma = c.sqrt_one_minus_alpha_bar_t / c.sqrt_alpha_bar_t
    return xp.concatenate([sigma, xp.zeros_like(sigma[:1])])
