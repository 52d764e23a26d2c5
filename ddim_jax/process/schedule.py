"""Noise schedules: β₁..β_T → ᾱ₀..ᾱ_T, in float64 on the host.

One convention everywhere: `alpha_bar[t]` for t = 0..T with `alpha_bar[0] = 1`. The DDIM paper
writes α_t for it, Ho et al. (2020) write ᾱ_t.
"""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, is_concrete

MOST_SIGNAL = 0.02  # of ᾱ_T, above which samples started from N(0, I) are visibly wrong


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule ᾱ₀..ᾱ_T, a pytree with one leaf, log ᾱ.

    The logarithm is what survives float32: 1 − ᾱ_t = −expm1(log ᾱ_t) and
    1 − ᾱ_t/ᾱ_s = −expm1(log ᾱ_t − log ᾱ_s) keep their relative precision near t = 0, where
    a float32 ᾱ_t has lost it. Built on the host it stays float64; only as an argument of a
    jitted function does it become float32 (unless `jax_enable_x64` is set).

    Attributes:
      log_alpha_bar: (T+1,) log ᾱ_t, `log_alpha_bar[0] = 0`, strictly decreasing; −inf is
        allowed at T alone (zero terminal signal-to-noise ratio).

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.linear_schedule(1000)
      >>> schedule
      Schedule(num_steps=1000, alpha_bar_T=4.04e-05)
      >>> schedule.alpha_bar.shape, float(schedule.alpha_bar[0])
      ((1001,), 1.0)
    """

    log_alpha_bar: np.ndarray | Array

    def __repr__(self) -> str:
        leaf = self.log_alpha_bar
        if not isinstance(leaf, np.ndarray | jax.Array) or leaf.ndim != 1 or leaf.size == 0:
            return f"Schedule({leaf!r})"  # what jax.tree.map may put there
        end = f"{np.exp(float(leaf[-1])):.3g}" if is_concrete(leaf) else "traced"
        return f"Schedule(num_steps={self.num_steps}, alpha_bar_T={end})"

    @property
    def num_steps(self) -> int:
        """T, the number of steps of the forward process."""
        return self.log_alpha_bar.shape[0] - 1

    @property
    def alpha_bar(self) -> np.ndarray | Array:
        """(T+1,) ᾱ_t: the share of signal variance left at t (paper: α_t)."""
        xp = jnp if isinstance(self.log_alpha_bar, jax.Array) else np
        return xp.exp(self.log_alpha_bar)

    @property
    def log_snr(self) -> np.ndarray | Array:
        """(T+1,) log ᾱ_t/(1 − ᾱ_t): +inf at t = 0."""
        xp = jnp if isinstance(self.log_alpha_bar, jax.Array) else np
        noisy = self.log_alpha_bar < 0  # twice, or the gradient of every entry is NaN at t = 0
        log_alpha_bar = xp.where(noisy, self.log_alpha_bar, -1)
        return xp.where(noisy, log_alpha_bar - xp.log(-xp.expm1(log_alpha_bar)), np.inf)


def schedule_from_betas(betas: ArrayLike) -> Schedule:
    """The schedule of given noise variances: ᾱ_t = Π_{i≤t} (1 − β_i) (Ho et al. 2020, Eq. 4).

    Args:
      betas: (T,) β₁..β_T in (0, 1]; β_T = 1 alone may be exactly 1 (no signal left at T).

    Returns:
      A `Schedule` with T = len(betas).

    Raises:
      ValueError: betas is empty, not one-dimensional, not finite or out of range.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.schedule_from_betas([0.5, 0.5]).alpha_bar.tolist()
      [1.0, 0.5, 0.25]
    """
    if not is_concrete(betas):
        raise TypeError("betas is traced; build schedules outside jit, they are host arithmetic")
    beta = np.asarray(betas, np.float64)
    if beta.ndim != 1 or beta.size == 0:
        raise ValueError(f"betas must be a non-empty vector (T,), got shape {beta.shape}")
    ok = (beta > 0) & (beta < 1)
    ok[-1] |= beta[-1] == 1
    if not ok.all():
        i = int(np.argmin(ok))
        raise ValueError(f"every beta must lie in (0, 1), got betas[{i}] = {beta[i]}")
    with np.errstate(divide="ignore"):
        return Schedule(np.concatenate([[0.0], np.cumsum(np.log1p(-beta))]))


def schedule_from_alpha_bar(alpha_bar: ArrayLike) -> Schedule:
    """The schedule of a given ᾱ₀..ᾱ_T.

    Args:
      alpha_bar: (T+1,) strictly decreasing from `alpha_bar[0] = 1` to ᾱ_T ≥ 0.

    Returns:
      A `Schedule` with T = len(alpha_bar) − 1.

    Raises:
      ValueError: alpha_bar does not start at 1, is not strictly decreasing, or is negative.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.schedule_from_alpha_bar([1.0, 0.5, 0.0]).num_steps
      2
    """
    if not is_concrete(alpha_bar):
        raise TypeError("alpha_bar is traced; build schedules outside jit")
    a = np.asarray(alpha_bar, np.float64)
    if a.ndim != 1 or a.size < 2:
        raise ValueError(f"alpha_bar must be a vector (T+1,) with T >= 1, got shape {a.shape}")
    if a[0] != 1:
        raise ValueError(
            f"alpha_bar[0] must be 1 (no noise at t = 0), got {a[0]}; prepend 1.0 to the "
            "0-based arrays of other libraries"
        )
    if not (np.isfinite(a).all() and (np.diff(a) < 0).all() and a[-1] >= 0):
        i = int(np.argmin(np.append(True, np.diff(a) < 0) & np.isfinite(a) & (a >= 0)))
        raise ValueError(
            f"alpha_bar must decrease strictly to a value >= 0, got alpha_bar[{i}] = {a[i]} "
            f"after {a[max(i - 1, 0)]}"
        )
    with np.errstate(divide="ignore"):
        return Schedule(np.log(a))


def linear_schedule(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    *,
    rescale_betas: bool = False,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """β_t linear in t, the schedule of Ho et al. (2020, §4) and of all of the DDIM paper.

    These β are made for T = 1000; with a smaller T they leave signal at T, where samplers start
    from N(0, I). `rescale_betas` multiplies them by 1000/T, so that ᾱ_T is about that of T = 1000.

    Args:
      num_steps: T ≥ 1.
      beta_start: β₁ in (0, 1).
      beta_end: β_T in (0, 1), not below beta_start.
      rescale_betas: multiply all β by 1000/T.
      zero_terminal_snr: `rescale_zero_terminal_snr` of it: no signal is left at T.

    Returns:
      A `Schedule`.

    Raises:
      ValueError: a value is out of range, if so after the multiplication.

    Warns:
      UserWarning: ᾱ_T is above 0.02: samples that start from N(0, I) will be wrong.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.linear_schedule(1000)
      Schedule(num_steps=1000, alpha_bar_T=4.04e-05)
      >>> ddim.linear_schedule(100, rescale_betas=True)
      Schedule(num_steps=100, alpha_bar_T=2.04e-05)
    """
    start, end = _beta_range(num_steps, beta_start, beta_end, rescale_betas)
    schedule = schedule_from_betas(np.linspace(start, end, num_steps))
    return reaching_noise(schedule, _MORE, zero_terminal_snr)


def scaled_linear_schedule(
    num_steps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    *,
    rescale_betas: bool = False,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """√β_t linear in t, the schedule of latent diffusion (Rombach et al. 2022).

    Arguments, errors and warning as those of `linear_schedule`.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.scaled_linear_schedule()
      Schedule(num_steps=1000, alpha_bar_T=0.00466)
    """
    start, end = _beta_range(num_steps, beta_start, beta_end, rescale_betas)
    betas = np.linspace(start**0.5, end**0.5, num_steps) ** 2
    return reaching_noise(schedule_from_betas(betas), _MORE, zero_terminal_snr)


def cosine_schedule(
    num_steps: int = 1000,
    offset: float = 0.008,
    max_beta: float = 0.999,
    *,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """ᾱ_t = f(t)/f(0), f(t) = cos²(π/2 · (t/T + s)/(1 + s)) (Nichol & Dhariwal 2021, Eq. 17).

    Args:
      num_steps: T ≥ 1.
      offset: s ≥ 0, which keeps β₁ from vanishing.
      max_beta: β_t is capped here, as in the paper, so that ᾱ_T > 0.
      zero_terminal_snr: `rescale_zero_terminal_snr` of it: no signal is left at T.

    Returns:
      A `Schedule`.

    Raises:
      ValueError: a value is out of range.

    Warns:
      UserWarning: as `linear_schedule`, where `max_beta` or `offset` leaves ᾱ_T above 0.02.

    Example:
      >>> import ddim_jax as ddim
      >>> f"{ddim.cosine_schedule(1000).alpha_bar[500]:.3f}"
      '0.494'
    """
    if num_steps < 1 or offset < 0 or not 0 < max_beta < 1:
        raise ValueError(
            "cosine_schedule needs num_steps >= 1, offset >= 0 and 0 < max_beta < 1, got "
            f"num_steps={num_steps}, offset={offset}, max_beta={max_beta}"
        )
    t = np.arange(num_steps + 1) / num_steps
    f = np.cos(np.pi / 2 * (t + offset) / (1 + offset)) ** 2
    schedule = schedule_from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))
    return reaching_noise(schedule, "a larger max_beta", zero_terminal_snr)


def rescale_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale √ᾱ so that ᾱ_T = 0 and ᾱ₁ is kept (Lin et al. 2024, Algorithm 1).

    √ᾱ'_t = (√ᾱ_t − √ᾱ_T) · √ᾱ₁/(√ᾱ₁ − √ᾱ_T). At t = T the network sees pure noise, so it must
    predict v or x_0: from ε alone x̂_0 is undefined there. Of a schedule that would warn of signal
    left at T, make it by `linear_schedule(…, zero_terminal_snr=True)`, which does not.

    Args:
      schedule: any `Schedule` with T ≥ 2.

    Returns:
      A `Schedule` with `alpha_bar[T] == 0`.

    Raises:
      ValueError: T < 2.

    Example:
      >>> import ddim_jax as ddim
      >>> float(ddim.rescale_zero_terminal_snr(ddim.linear_schedule(1000)).alpha_bar[-1])
      0.0
    """
    if schedule.num_steps < 2:
        raise ValueError("rescale_zero_terminal_snr needs T >= 2: with T = 1, ᾱ₁ is ᾱ_T")
    root = np.exp(np.asarray(schedule.log_alpha_bar, np.float64) / 2)
    scaled = (root[1:] - root[-1]) * (root[1] / (root[1] - root[-1]))
    return schedule_from_alpha_bar(np.append(1.0, scaled**2))


def _beta_range(
    num_steps: int, beta_start: float, beta_end: float, rescale: bool
) -> tuple[float, float]:
    """β₁ and β_T, checked and rescaled."""
    if num_steps < 1:
        raise ValueError(f"num_steps (T) must be at least 1, got {num_steps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"need 0 < beta_start <= beta_end < 1, got beta_start={beta_start}, beta_end={beta_end}"
        )
    factor = 1000 / num_steps if rescale else 1
    if not beta_end * factor < 1:
        raise ValueError(
            f"rescale_betas makes beta_end = {beta_end} * 1000/{num_steps} = "
            f"{beta_end * factor:.4g}, and it must stay below 1: take more than "
            f"{int(1000 * beta_end)} steps, or betas of your own"
        )
    return beta_start * factor, beta_end * factor


_MORE = "num_steps=1000, rescale_betas=True, zero_terminal_snr=True or larger betas"


def reaching_noise(schedule: Schedule, advice: str, zero_terminal_snr: bool) -> Schedule:
    """The schedule, with a warning if x_T is not noise; stacklevel 3 is the maker's caller."""
    if zero_terminal_snr:
        return rescale_zero_terminal_snr(schedule)
    if (alpha_bar_T := float(np.exp(schedule.log_alpha_bar[-1]))) > MOST_SIGNAL:
        warnings.warn(
            f"this schedule never reaches noise: alpha_bar_T = {alpha_bar_T:.3g} of the signal's "
            f"variance is left at T = {schedule.num_steps}, so samples started from N(0, I) will "
            f"be wrong. Take {advice}; if x_T is not drawn from N(0, I), schedule_from_betas does "
            "not warn",
            UserWarning,
            stacklevel=3,
        )
    return schedule
