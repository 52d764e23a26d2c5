"""Fewer steps: DPM-Solver++, the multistep method of the mirrored ODE, which remembers x̂_0.

DDIM Eq. 14, dx̄ = ε_θ dσ in x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ), turned inside out: with y = x̄/σ =
x/√(1 − ᾱ) and κ = 1/σ, dy = κ dx̄ + x̄ dκ = (x̄ − σ ε_θ) dκ, and x̄ − σ ε_θ is x̂_0 (Eq. 9), so

    dy = x̂_0 dκ,   y_s = y_t + ∫_{λ_t}^{λ_s} e^λ x̂_0 dλ,   λ = log κ = ½ log(ᾱ/(1 − ᾱ))

(the exponential integrator of Lu et al. 2022, arXiv:2211.01095). With x̂_0 held fixed this is the
step of Eq. 12; the methods here and in `unipc` put a polynomial in λ through earlier x̂_0 in its
place, so that x̄_0 = Σ_j w_j x̂_0,j with w_j = ∫ e^λ L_j dλ/(e^{λ_s} − e^{λ_t}).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import ArrayLike, is_concrete
from ddim_jax.process.gaussian import Coefficients
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.lagrange import integrals
from ddim_jax.sampling.plan import Method, Plan, euler


def dpm_solver(order: int = 2, *, eta: ArrayLike = 0.0) -> Method:
    """DPM-Solver++ multistep, and its SDE form (Lu et al. 2022, arXiv:2211.01095).

    x_s = √ᾱ_s x̄_0 + √(1 − ᾱ_s − σ²) (x_t − √ᾱ_t x̄_0)/√(1 − ᾱ_t) + σ z, σ(η) of Eq. 16

    | order | x̄_0, with h = λ_s − λ_t of this step, h' of the one before |
    |---|---|
    | 1 | x̂_0: `ddim(eta)` |
    | 2 | x̂_0 + h/(2h') (x̂_0 − x̂_0'): the line through two, at the middle of the step (2M) |
    | 3 | e^λ-weighted mean over the step of the parabola through three |

    η scales the noise as in DDIM, which keeps the marginals: η = 0 solves the ODE, and order 2 with
    η = 1 is SDE-DPM-Solver++(2M). Order 3 is for the ODE alone.

    The last step, to λ_0 = ∞, returns x̂_0, which is exact for a fixed x̂_0, and at order 3 the step
    before has order 2. Start-up: the first step has order 1, and order 2 needs no more. At order 3
    that one error would leave the whole run at order 2, so the first three steps integrate anew
    from x_T through all x̂_0 known so far, as `adams_bashforth` does. Where ᾱ_T = 0, λ_T = −∞,
    and the first x̂_0 is in no later polynomial.

    A clipped x̂_0 is remembered clipped, and ε is always derived from x̄_0.

    Args:
      order: 1, 2 or 3; memory holds as many arrays of x̂_0.
      eta: η ≥ 0, a scalar, or (S,) along τ; may be traced. 0 at order 3.

    Returns:
      A `Method`.

    Raises:
      ValueError: the order is unknown, or is 3 with an η; when used, η is out of range or of
        another length than τ.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> tau = ddim.timesteps(1000, 10, "logsnr", schedule=schedule)
      >>> ddim.sample(exact, x_T, schedule, tau, method=ddim.dpm_solver(2)).shape
      (4, 2)
    """
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if order == 3 and not (is_concrete(eta) and not np.any(np.asarray(eta))):
        raise ValueError(f"order 3 solves the ODE, eta = 0, got eta = {eta}; take order 1 or 2")

    def plan(schedule: Schedule, tau: ArrayLike | Sequence[int]) -> Plan:
        plan = euler(schedule, tau, eta)
        weights = None if order == 1 else dpm_solver_weights(half_log_snr(plan.steps), order)
        return dataclasses.replace(plan, weights=weights, remembers="x_0")

    return plan


def dpm_solver_weights(lam: Any, order: int) -> Any:
    """The share of each remembered x̂_0 in x̄_0 of each step, by the table of `dpm_solver`.

    Args:
      lam: (S+1,) λ strictly increasing, λ_T (maybe −∞) first and ∞ last.
      order: 2 or 3.

    Returns:
      (S, order) w, newest x̂_0 first; float64 on the host where λ is concrete.

    Example:
      >>> dpm_solver_weights(np.array([0.0, 1.0, 3.0, np.inf]), 2).tolist()
      [[1.0, -0.0], [2.0, -1.0], [1.0, -0.0]]
    """
    xp: Any = np if is_concrete(lam) else jnp
    if order == 2:
        return midpoint(lam)
    S = lam.shape[0] - 1
    n, slots = np.arange(S)[:, None], np.arange(order)
    known = slots < np.minimum(n + 1, S - n)
    total = exponential_integrals(lam, n - slots, known, np.where(n < order, 0, n))
    gap = (lam[:-1] - lam[1:])[:, None]  # −h
    already = xp.pad(total, ((1, 0), (1, 0)))[:-1, :-1] * xp.exp(gap)
    w = (total - xp.where((n > 0) & (n < order), already, 0)) / -xp.expm1(gap)
    return xp.where((n == 0) | (n == S - 1), np.eye(1, order, dtype=lam.dtype), w)


def midpoint(lam: Any, more: Any = 1.0) -> Any:
    """(S, 2) 1 + r, −r with r = h/(2h'): the line through two, `more` times its slope.

    r = 0 in the first step, and in the last, where h is infinite.
    """
    xp: Any = np if is_concrete(lam) else jnp
    h = lam[1:] - lam[:-1]
    r = more * xp.pad(h[1:-1] / (2 * h[:-2]), (1, int(len(h) > 1)))
    return xp.stack([1 + r, -r], 1)


def exponential_integrals(lam: Any, k: np.ndarray, known: Any, start: Any) -> Any:
    """(S, p) e^{−λ_{n+1}} ∫ e^λ L_nj dλ of step n, from λ_start to λ_{n+1}, nodes λ_k.

    By Gauss–Legendre quadrature over the last 40 of λ at most, beyond which e^λ is nothing: there
    32 points give all digits of float64. An infinite node is left out beside others, the limit of
    a far one.

    Args:
      lam: (S+1,) λ; the row of the last step, to ∞, means nothing.
      k: (S, p) int, which λ are nodes; where not known, anything in range.
      known: (S, p) bool.
      start: (S, 1) int.
    """
    xp: Any = np if is_concrete(lam) else jnp
    finite = xp.isfinite(lam)
    known = known & (finite[k] | (known.sum(1, keepdims=True) == 1))
    points, weights = (xp.asarray(v, lam.dtype) for v in np.polynomial.legendre.leggauss(32))
    high = xp.where(finite, lam, 0)[1:, None]
    low = xp.maximum(lam[start], high - 40)
    v = (low + high) / 2 + points[None] * (high - low) / 2  # (S, 32)
    measure = xp.exp(v - high) * weights[None] * (high - low) / 2
    return integrals(xp.where(finite, lam, 0)[k], known, v, measure)


def half_log_snr(c: Coefficients) -> Any:
    """(S+1,) λ = log(√ᾱ/√(1 − ᾱ)) along the steps, ending in ∞; −∞ where ᾱ = 0."""
    xp: Any = np if is_concrete(c) else jnp
    a: Any = c.sqrt_alpha_bar_t
    lam = xp.log(xp.where(a > 0, a, 1) / c.sqrt_one_minus_alpha_bar_t)
    return xp.append(xp.where(a > 0, lam, -xp.inf), xp.inf)
