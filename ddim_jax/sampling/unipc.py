"""UniPC: a predictor in λ, and a corrector that uses each evaluation twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import ArrayLike, is_concrete
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.dpm_solver import exponential_integrals, half_log_snr, midpoint
from ddim_jax.sampling.plan import Method, Plan, euler


def unipc(order: int = 2, *, corrector: bool = True, variant: str = "B2") -> Method:
    """UniPC multistep in data prediction (Zhao et al. 2023, arXiv:2302.04867).

    The predictor UniP takes x_t to x_s with x̄_0 = Σ_j w_j x̂_0,j over the last `order` calls. The
    network's call at x_s, which the next step needs anyway, then says how x_s should have been:
    the corrector UniC takes x_t to x_s again with x̄_0 = Σ_j c_j x̂_0,j, now through x̂_0(x_s, s) too.
    As both are the step of Eq. 12, the correction is a sum over the memory, and costs no call:

    x_s ← x_s + (√ᾱ_s − √ᾱ_t √(1 − ᾱ_s)/√(1 − ᾱ_t)) (Σ_j c_j x̂_0,j − Σ_j w_j x̂_0,j)

    w and c are the weights of `ddim_jax.sampling.dpm_solver`: e^λ-weighted means over the step of
    the polynomial in λ through the x̂_0, of `order` of them for w and one more for c. Of a line the
    paper takes the value at ½ instead, times its B(h): x̂_0 + (β/2) × the line's change over the
    step, with β = 1 for B2 and β = h/(1 − e^{−h}) for B1, h = λ_s − λ_t. From three points on its
    conditions of order fix the weights, and B cancels.

    The order rises by one a step at the start and falls by one a step at the end, to the last step,
    which returns x̂_0; a corrector has the order of the predictor it corrects. So `unipc(2,
    corrector=False)` is `dpm_solver(2)`. Where ᾱ_T = 0 nothing is corrected that started there.

    Args:
      order: 1, 2 or 3, of the predictor; the corrector gains one. Memory holds `order` arrays of
        x̂_0, one more with the corrector.
      corrector: whether UniC is used.
      variant: B(h), `"B2"` or `"B1"`.

    Returns:
      A `Method`.

    Raises:
      ValueError: order or variant is unknown.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> tau = ddim.timesteps(1000, 10, "logsnr", schedule=schedule)
      >>> ddim.sample(exact, x_T, schedule, tau, method=ddim.unipc(3)).shape
      (4, 2)
    """
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if variant not in ("B1", "B2"):
        raise ValueError(f'variant must be "B1" or "B2", got {variant!r}')

    def plan(schedule: Schedule, tau: ArrayLike | Sequence[int]) -> Plan:
        plan = euler(schedule, tau)
        lam = half_log_snr(plan.steps)
        return predicting(plan, lam, order, corrector=corrector, variant=variant)

    return plan


def predicting(
    plan: Plan, lam: Any, order: int, *, corrector: bool | np.ndarray = True, variant: str = "B2"
) -> Plan:
    """A plan of DDIM's steps along λ (S+1,) with UniPC's two tables.

    Args:
      plan: DDIM's own at η = 0.
      lam: λ of its steps, from t down; the last may be ∞.
      order, variant: of `unipc`.
      corrector: whether UniC is used, or (S,) bool, after which steps it is.

    Returns:
      The plan, which remembers x̂_0.
    """
    c: Any = plan.steps
    xp: Any = np if is_concrete(lam) else jnp
    w = predictor_weights(lam, order, variant)
    if corrector is False:
        return dataclasses.replace(plan, weights=w, remembers="x_0")
    w = xp.pad(w, ((0, 0), (0, 1)))
    change = corrector_weights(lam, order, variant)[:-1] - xp.roll(w, 1, 1)[:-1]
    scale = c.sqrt_alpha_bar_s - c.sqrt_alpha_bar_t * c.direction / c.sqrt_one_minus_alpha_bar_t
    used = xp.isfinite(lam)[:-2] & np.broadcast_to(corrector, lam[1:].shape)[:-1]
    change = xp.where(used[:, None], scale[:-1, None] * change, 0)
    corrects = xp.pad(change, ((1, 0), (0, 0)))  # a step is corrected in the row after it
    return dataclasses.replace(plan, weights=w, remembers="x_0", corrects=corrects)


def predictor_weights(lam: Any, order: int, variant: str = "B2") -> Any:
    """(S, order) w of UniP in each step, newest x̂_0 first; λ (S+1,) as in `dpm_solver_weights`.

    Example:
      >>> predictor_weights(np.array([0.0, 1.0, 3.0, np.inf]), 2).tolist()
      [[1.0, 0.0], [2.0, -1.0], [1.0, 0.0]]
    """
    xp: Any = np if is_concrete(lam) else jnp
    n, slots, orders = _orders(lam, order)
    line = xp.pad(midpoint(lam, _beta(xp, lam, variant)), ((0, 0), (0, order)))[:, :order]
    exact = _exact(xp, lam, n - slots[:order], slots[:order] < orders)
    w = xp.where(orders == 2, line, xp.where(orders > 2, exact, 0))
    return xp.where(orders == 1, np.eye(1, order, dtype=lam.dtype), w)


def corrector_weights(lam: Any, order: int, variant: str = "B2") -> Any:
    """(S, order + 1) c of UniC in each step, that of x̂_0 at the step's own end first.

    The last step, to λ = ∞, has no corrector, and a row of no meaning.

    Example:
      >>> corrector_weights(np.array([0.0, 1.0, 3.0, np.inf]), 1)[:2].tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """
    xp: Any = np if is_concrete(lam) else jnp
    n, slots, orders = _orders(lam, order)
    half = _beta(xp, lam, variant)[:, None] / 2
    line = xp.pad(xp.concatenate([half, 1 - half], 1), ((0, 0), (0, order - 1)))
    return xp.where(orders == 1, line, _exact(xp, lam, n + 1 - slots, slots <= orders))


def _orders(lam: Any, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n (S, 1), the slots (order + 1,), and the order of each step (S, 1)."""
    S = lam.shape[0] - 1
    n = np.arange(S)[:, None]
    return n, np.arange(order + 1), np.minimum(order, np.minimum(n + 1, S - n))


def _beta(xp: Any, lam: Any, variant: str) -> Any:
    """(S,) B(h)/(e^h − 1) in the paper's sense, 1 for B2 and where h is infinite."""
    h = lam[1:] - lam[:-1]
    if variant == "B2":
        return xp.ones_like(h)
    h = xp.where(xp.isfinite(h), h, 0)
    return xp.where(h > 0, h / -xp.expm1(-xp.where(h > 0, h, 1)), 1)


def _exact(xp: Any, lam: Any, k: np.ndarray, known: np.ndarray) -> Any:
    """(S, p) e^λ-weighted means of Lagrange's polynomials over each step, of the nodes λ_k."""
    k = np.clip(k, 0, len(lam) - 1)
    total = exponential_integrals(lam, k, known, np.arange(len(lam) - 1)[:, None])
    return total / -xp.expm1(lam[:-1] - lam[1:])[:, None]
