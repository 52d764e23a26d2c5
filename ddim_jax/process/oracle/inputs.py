"""What the exact denoisers share: images as vectors, checks of numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, check_batch, is_concrete
from ddim_jax.process.continuous import signal_and_noise
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.schedule import Schedule

HIGHEST = jax.lax.Precision.HIGHEST


def as_like(value: Any, like: Array) -> Array:
    return jnp.asarray(value).astype(like.dtype)


def flatten(schedule: Schedule, x: Array, t: ArrayLike) -> tuple[Array, Array, Array]:
    """x as (B, d) in at least float32, with √ᾱ_t and √(1 − ᾱ_t) as (B, 1)."""
    x = check_batch(x)
    if jnp.shape(t) not in ((), x.shape[:1]):
        raise ValueError(f"t must be a scalar or {x.shape[:1]}, got shape {jnp.shape(t)}")
    if is_concrete(t) and np.min(np.asarray(t), initial=1) < 1:
        raise ValueError(f"t must lie in 1..T = 1..{schedule.num_steps}, got {t}")
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    flat = x.reshape(x.shape[0], -1).astype(dtype)
    if jnp.issubdtype(jnp.result_type(t), jnp.floating):  # between the whole t: see `continuous`
        both: Any = signal_and_noise(schedule, t)
    else:
        c = coefficients(schedule, t, t * 0)
        both = c.sqrt_alpha_bar_t, c.sqrt_one_minus_alpha_bar_t
    a, b = (jnp.broadcast_to(as_like(v, flat), x.shape[:1])[:, None] for v in both)
    return flat, a, b


def finite(name: str, value: ArrayLike) -> Any:
    """`value` as an array, in float64 on the host unless traced."""
    if not is_concrete(value):
        return value
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array}")
    return array
