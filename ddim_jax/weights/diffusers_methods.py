"""Samplers of the diffusers library that are none of ours, as tables like any other.

Its solvers walk λ = ½ log SNR = −log σ, with x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ) of DDIM's Eq. 14. They
differ from `dpm_solver`, `unipc` and `adams_bashforth` in the order of single steps, in where the
last one ends, in what is remembered and in how far apart the steps are. All of it is known before
the run, so that one scan draws them too. Everything here is float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from ddim_jax.process.gaussian import Coefficients, coefficients
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps
from ddim_jax.sampling.plan import Method, Plan, pairs
from ddim_jax.sampling.unipc import predicting

LEAST_SIGNAL = 2.0**-24  # its solvers' ᾱ_T where that is 0
ADAMS_BASHFORTH = (  # of equal steps, newest first
    np.array([1.0]),
    np.array([3.0, -1.0]) / 2,
    np.array([23.0, -16.0, 5.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)
Spread: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def ddim_to_first(eta: float = 0.0) -> Method:
    """`ddim(eta)` whose last step ends at ᾱ_1 and not at 1: `set_alpha_to_one: false`.

    From t = 1 there is nowhere to go: the network's call changes x by the clipping of x̂_0 alone.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.linear_schedule(1000)
      >>> plan = ddim_to_first()(schedule, [2, 500])
      >>> bool(plan.steps.sqrt_alpha_bar_s[-1] ** 2 == schedule.alpha_bar[1])
      True
    """

    def plan(schedule: Schedule, tau: Any) -> Plan:
        t, s = pairs(schedule, np.asarray(tau))
        c: Any = coefficients(schedule, t, np.append(s[:-1], t[-1] > 1), eta)
        if t[-1] == 1:
            ends = {
                "sqrt_alpha_bar_s": c.sqrt_alpha_bar_t,
                "direction": c.sqrt_one_minus_alpha_bar_t,
            }
            c = c._replace(**{n: np.append(getattr(c, n)[:-1], v[-1]) for n, v in ends.items()})
        return Plan(t, c if eta else c._replace(sigma=None))

    return plan


def pndm(runge_kutta: bool = True, *, to_one: bool = False) -> Method:
    """PNDM (Liu et al. 2022, arXiv:2202.09778): Adams–Bashforth in t, carried out by DDIM's steps.

    x̄_s = x̄_t + (σ_s − σ_t) ε̄, with ε̄ the Adams–Bashforth sum for equal steps of the last four ε

    The first three steps are classical Runge–Kutta's, four calls each, or else the first one is
    Heun's, two calls. So it calls the network S + 9 or S + 1 times.

    Args:
      runge_kutta: how it starts.
      to_one: whether the last step ends at ᾱ = 1; else at ᾱ_1.

    Returns:
      A `Method`, for schedules with ᾱ_T > 0.

    Raises:
      ValueError: when used, τ has fewer than 4 elements, for Runge–Kutta's start, or ᾱ_T is 0.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.linear_schedule(1000)
      >>> pndm(runge_kutta=False)(schedule, [1, 251, 501, 751]).t.tolist()
      [751, 501, 501, 251, 1]
    """

    def plan(schedule: Schedule, tau: Any) -> Plan:
        tau = as_timesteps(np.asarray(tau), schedule.num_steps)
        log_alpha_bar = np.asarray(schedule.log_alpha_bar, np.float64)
        if runge_kutta and len(tau) < 4:
            raise ValueError(
                f"PNDM starts with three Runge-Kutta steps and needs 4 of them or more, got "
                f"S = {len(tau)}; or take skip_prk_steps"
            )
        if not np.isfinite(log_alpha_bar[tau[-1]]):
            raise ValueError("alpha_bar[t] = 0 (zero terminal SNR): PNDM cannot start there")
        levels = [*tau[::-1].tolist(), 0 if to_one else 1]
        sigma = np.sqrt(np.expm1(-log_alpha_bar))
        t, states = _pndm_states(levels, sigma, runge_kutta)
        return _of_states(t, levels[-1], states, log_alpha_bar)

    return plan


def _pndm_states(
    levels: list[int], sigma: np.ndarray, runge_kutta: bool
) -> tuple[list[int], np.ndarray]:
    """The t of N calls, and C (N + 1, N) of the states before them, x̄_n = x̄_T + Σ_j C_nj ε_j."""
    steps = len(levels) - 1
    e = np.eye(steps + (9 if runge_kutta else int(steps > 1)))
    t, states, past = list[int](), [0 * e[0]], list[int]()
    if runge_kutta:
        for d, c in pairwise(levels[:4]):
            n, x, m = len(t), states[-1], c + (d - c) // 2
            half, whole = sigma[m] - sigma[d], sigma[c] - sigma[d]
            mean = (e[n] + 2 * e[n + 1] + 2 * e[n + 2] + e[n + 3]) / 6
            t += [d, m, m, c]
            states += [x + half * e[n], x + half * e[n + 1], x + whole * e[n + 2], x + whole * mean]
            past.append(n)
        levels = levels[3:]
    elif steps > 1:
        d, c = levels[:2]
        h = sigma[c] - sigma[d]
        t, past, levels = [d, c], [0], levels[1:]
        states += [h * e[0], h * (e[0] + e[1]) / 2]
    for d, c in pairwise(levels):
        past = [*past, len(t)][-4:]
        mean = ADAMS_BASHFORTH[len(past) - 1] @ e[past[::-1]]
        states.append(states[-1] + (sigma[c] - sigma[d]) * mean)
        t.append(d)
    return t, np.stack(states)


def _of_states(t: list[int], end: int, states: np.ndarray, log_alpha_bar: np.ndarray) -> Plan:
    """The plan whose states are those sums of the calls' ε."""
    log = log_alpha_bar[np.append(t, end)]
    a, b = np.exp(log / 2), np.sqrt(-np.expm1(log))
    sigma = b / a
    change = np.diff(states, axis=0)  # (N, N): of x̄ after call n, from ε_j
    scale = np.diff(sigma)
    still = scale == 0  # a second look at one t: any scale will do
    scale[still] = np.maximum(np.abs(change[still]).max(1), 1e-9)
    n, j = np.nonzero(change)
    weights = np.zeros((len(t), 1 + int((n - j).max(initial=0))))
    weights[n, n - j] = change[n, j] / scale[n]
    steps = Coefficients(a[:-1], b[:-1], a[1:], a[1:] * (scale + sigma[:-1]), None)
    return Plan(np.array(t, np.int32), steps, weights)


def solver(
    fill: Callable[[Plan, np.ndarray], Plan],
    *,
    spread: Spread | None = None,
    end: str = "zero",
    noise: bool = False,
) -> Method:
    """A multistep solver along λ.

    Args:
      fill: gives DDIM's plan along λ (S+1,) its tables; λ_S may be ∞.
      spread: (λ of all t (T+1,), t (S,)) → (t, λ), each (S,), where λ is not that of t.
      end: of the last step: `"zero"`, σ = 0; `"first"`, that of t = 1; `"same"`, where it began.
      noise: whether σ(η) of Eq. 16 is added, η = 1.

    Returns:
      A `Method`.

    Example:
      >>> import ddim_jax as ddim
      >>> plan = solver(multistep(2), end="first")(ddim.linear_schedule(1000), [250, 500, 1000])
      >>> plan.weights.round(2).tolist()
      [[1.0, 0.0], [1.17, -0.17], [1.0, 0.0]]
    """

    def plan(schedule: Schedule, tau: Any) -> Plan:
        t = as_timesteps(np.asarray(tau), schedule.num_steps)[::-1]
        table = half_log_snr(schedule)
        t, lam = spread(table, t) if spread else (t, table[t])
        lam = np.append(lam, {"zero": np.inf, "first": table[1], "same": lam[-1]}[end])
        with np.errstate(all="ignore"):
            a, b = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
            h = np.diff(lam)
            direction = b[1:] * np.exp(-h) if noise else b[1:]
            sigma = b[1:] * np.sqrt(-np.expm1(-2 * h)) if noise else None
            return fill(Plan(t, Coefficients(a[:-1], b[:-1], a[1:], direction, sigma)), lam)

    return plan


def half_log_snr(schedule: Schedule) -> np.ndarray:
    """(T+1,) λ_t; where ᾱ_T = 0, λ_T of its 2⁻²⁴."""
    lam = np.asarray(schedule.log_snr, np.float64) / 2
    if np.isneginf(lam[-1]):
        lam[-1] = (np.log(LEAST_SIGNAL) - np.log1p(-LEAST_SIGNAL)) / 2
    return lam


def multistep(
    order: int,
    *,
    remembers: str = "x_0",
    midpoint: bool = True,
    curvature: float = 1.0,
    last: bool = True,
    short: bool = False,
    stretch: float = 1.0,
) -> Callable[[Plan, np.ndarray], Plan]:
    """What `solver` fills in for DPM-Solver(++) and DEIS of order 1 to 3.

    x̄ = m + c₁ D₁ + c₂ D₂ in Newton's form of the polynomial in λ through the last m = x̂_0 (or ε),
    D₁ = h m', D₂ = h² m''/2, and with z = −h (or h)

    c₁ = 1/z − 1/(e^z − 1), or ½;   c₂ = curvature · (1/z² − (1/z + ½)/(e^z − 1))

    Args:
      order: 1, 2 or 3.
      remembers: `"x_0"` (DPM-Solver++) or `"eps"` (DPM-Solver, DEIS).
      midpoint: whether a line counts by its value at ½, c₁ = ½, at order 2.
      curvature: 2 integrates the parabola exactly (DEIS), 1 is what its DPM-Solver does.
      last: whether the last step has order 1.
      short: of fewer than 15 steps, whether the last has order 1, and the one before 2 at most.
      stretch: of z; 2 for the SDE.
    """

    m = np.eye(order)

    def row(h: np.ndarray, order: int) -> np.ndarray:
        """(M,) of one step; h newest first."""
        if order == 1 or h[0] == 0:
            return m[0]
        z = h[0] * stretch * (1 if remembers == "eps" else -1)
        first = (m[0] - m[1]) * h[0] / h[1]
        c_1 = 0.5 if order == 2 and midpoint else 1 / z - 1 / np.expm1(z)
        if order == 2:
            return m[0] + c_1 * first
        change = (first - (m[1] - m[2]) * h[0] / h[2]) * h[0] / (h[1] + h[2])
        c_2 = curvature * (1 / z**2 - (1 / z + 0.5) / np.expm1(z))
        return m[0] + c_1 * (first + h[1] / h[0] * change) + c_2 * change

    def fill(plan: Plan, lam: np.ndarray) -> Plan:
        h, S = np.diff(lam), len(lam) - 1
        few = short and S < 15
        orders = np.minimum(order, np.arange(S) + 1)
        orders[S - 2 :] = np.minimum(orders[S - 2 :], 2 if few else order)
        orders[-1] = 1 if last or few else orders[-1]
        weights = np.stack([row(h[n::-1], k) for n, k in enumerate(orders)])
        return Plan(plan.t, plan.steps, weights, remembers=remembers)

    return fill


def unipc_steps(order: int, variant: str, uncorrected: tuple[int, ...] = ()) -> Any:
    """What `solver` fills in for UniPC: no corrector after the steps of those numbers."""

    def fill(plan: Plan, lam: np.ndarray) -> Plan:
        corrector = ~np.isin(np.arange(len(lam) - 1), uncorrected)
        return predicting(plan, lam, order, corrector=corrector, variant=variant)

    return fill


def in_sigma(table: np.ndarray, t: np.ndarray, rho: float | None) -> tuple[np.ndarray, np.ndarray]:
    """S even steps of σ^(1/ρ) between those of t's ends, or of log σ; and the nearest t to each.

    Example:
      >>> import ddim_jax as ddim
      >>> lam = half_log_snr(ddim.linear_schedule(1000))
      >>> karras(lam, np.array([1000, 500, 1]))[0].tolist()
      [1000, 594, 1]
    """
    log_sigma = -table
    high, low, ramp = log_sigma[t[0]], log_sigma[t[-1]], np.linspace(0, 1, len(t))
    if rho is None:
        chosen = high + ramp * (low - high)
    else:
        high, low = np.exp(high / rho), np.exp(low / rho)
        chosen = rho * np.log(high + ramp * (low - high))
    index = np.interp(chosen, log_sigma[1:], np.arange(len(table) - 1))
    return 1 + np.rint(index).astype(np.int32), -chosen


karras = partial(in_sigma, rho=7.0)
lu = partial(in_sigma, rho=None)
