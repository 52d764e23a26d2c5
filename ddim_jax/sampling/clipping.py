"""What may be done to x̂_0 in a step: the `x0_fn` of the samplers."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from ddim_jax.arrays import Array, wide


def clip_x0(bound: float = 1.0) -> Callable[[Array], Array]:
    """An `x0_fn` that clips x̂_0 to [−bound, bound], the range of the data.

    Its gradient is 1 within the bounds, 0 beyond, and between the two exactly at a bound.

    Args:
      bound: > 0; 1 for images scaled to [−1, 1].

    Returns:
      A function x̂_0 → clipped x̂_0.

    Raises:
      ValueError: bound is not positive.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> ddim.clip_x0(1.0)(jnp.array([-3.0, 0.5])).tolist()
      [-1.0, 0.5]
    """
    if not bound > 0:
        raise ValueError(f"clip_x0 needs a bound > 0, got {bound}")
    return lambda x_0: jnp.clip(x_0, -bound, bound)


def dynamic_threshold(
    quantile: float = 0.995, bound: float = 1.0, *, most: float = math.inf
) -> Callable[[Array], Array]:
    """An `x0_fn` that clips each x̂_0 at its own quantile and rescales (Saharia et al. 2022, §2.3).

    With m = max(bound, the quantile of |x̂_0| over one image): x̂_0 → clip(x̂_0, −m, m)·bound/m.
    Some cap m, at `most`.

    Args:
      quantile: in (0, 1].
      bound: > 0, the range of the data.
      most: > 0, of m.

    Returns:
      A function x̂_0 (B, ...) → x̂_0 (B, ...) in [−bound, bound].

    Raises:
      ValueError: quantile, bound or most is out of range.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> ddim.dynamic_threshold(1.0)(jnp.array([[-4.0, 2.0]])).tolist()
      [[-1.0, 0.5]]
    """
    if not 0 < quantile <= 1 or not bound > 0 or not most > 0:
        raise ValueError(
            "need 0 < quantile <= 1, bound > 0 and most > 0, got "
            f"quantile={quantile}, bound={bound}, most={most}"
        )

    def threshold(x_0: Array) -> Array:
        x = wide(x_0)
        m = jnp.quantile(jnp.abs(x), quantile, axis=tuple(range(1, x_0.ndim)), keepdims=True)
        m = jnp.minimum(jnp.maximum(m, bound), most)
        return (jnp.clip(x, -m, m) * (bound / m)).astype(x_0.dtype)

    return threshold
