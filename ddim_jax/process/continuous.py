"""Real t between the whole ones: ᾱ interpolated in its log-SNR, which is linear in log σ.

σ = √((1 − ᾱ)/ᾱ) is the time of the ODE (Eq. 14). A schedule is a table of T of them; in between,
log σ = −½ log SNR is taken as linear in t, so that t and σ fix each other.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, is_concrete
from ddim_jax.process.schedule import Schedule


def log_sigma(schedule: Schedule) -> Any:
    """(T,) log σ_t for t = 1..T, σ_t = √((1 − ᾱ_t)/ᾱ_t) (DDIM Eq. 14).

    Raises:
      ValueError: ᾱ_T = 0, where σ is infinite.

    Example:
      >>> import ddim_jax as ddim
      >>> [round(float(u), 4) for u in log_sigma(ddim.schedule_from_alpha_bar([1, 0.4, 0.1]))]
      [0.2027, 1.0986]
    """
    if is_concrete(schedule) and np.isneginf(np.asarray(schedule.log_alpha_bar)[-1]):
        raise ValueError(
            "alpha_bar_T = 0 (zero terminal SNR): sigma is infinite there, and x / sqrt(alpha_bar) "
            "of Eq. 14 is not defined; take a schedule that leaves some signal at T"
        )
    return -schedule.log_snr[1:] / 2


def time_at(schedule: Schedule, log_sigma_t: Array) -> Array:
    """The real t in 1..T at which log σ has this value; beyond the ends, the ends.

    Args:
      schedule: the noise schedule, ᾱ_T > 0.
      log_sigma_t: log σ, of any shape.

    Returns:
      t, floating, of log_sigma_t's shape and dtype.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1, 0.5, 0.1])
      >>> round(float(time_at(schedule, jnp.float32(0.5493))), 3)
      1.5
    """
    table, t = _tables(schedule, log_sigma_t)
    return jnp.interp(log_sigma_t, table, t)


def signal_and_noise(schedule: Schedule, t: ArrayLike) -> tuple[Array, Array]:
    """(√ᾱ_t, √(1 − ᾱ_t)) at real t in 1..T, ᾱ interpolated in log-SNR.

    Args:
      schedule: the noise schedule, ᾱ_T > 0.
      t: floating, of any shape; whole ones give the schedule's own.

    Returns:
      Two arrays of t's shape and dtype; NaN where a traced t is out of range.

    Raises:
      ValueError: t is not in 1..T.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1, 0.8, 0.2])
      >>> [round(float(v) ** 2, 4) for v in signal_and_noise(schedule, jnp.float32(1.5))]
      [0.5, 0.5]
    """
    if is_concrete(t):
        times = np.asarray(t)
        if not ((times >= 1) & (times <= schedule.num_steps)).all():
            raise ValueError(f"t must lie in 1..T = 1..{schedule.num_steps}, got {t}")
    t = jnp.asarray(t)
    table, whole = _tables(schedule, t)
    log = jnp.interp(t, whole, table, left=jnp.nan, right=jnp.nan)
    a = jnp.exp(-jnp.logaddexp(2 * log, jnp.zeros_like(log)) / 2)  # ᾱ = 1/(1 + σ²)
    return a, jnp.exp(log) * a


def _tables(schedule: Schedule, like: Array) -> tuple[Array, Array]:
    table = jnp.asarray(log_sigma(schedule)).astype(like.dtype)
    return table, jnp.arange(1, schedule.num_steps + 1, dtype=like.dtype)
