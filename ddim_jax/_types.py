"""Array aliases and the one protocol that samplers ask of a network."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray | float | int


class Denoiser(Protocol):
    """Anything that maps `(x_t, t)` to ε_θ(x_t, t): `x` (B, ...), `t` (B,) int in 1..T → (B, ...).

    A plain function, a closure over Flax or Equinox weights, or an exact denoiser of
    `ddim_jax.oracle`. Combinators of `ddim_jax.guidance` map denoisers to denoisers.
    """

    def __call__(self, x: Array, t: Array, /) -> Array: ...


def is_concrete(*values: object) -> bool:
    """Whether no leaf of `values` is being traced, so that the host may look at numbers."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def per_image(coefficient: ArrayLike, like: Array) -> Array:
    """Cast a scalar or (B,) coefficient to `like`'s dtype, shaped to multiply `like` (B, ...)."""
    c = jax.numpy.asarray(coefficient).astype(like.dtype)
    return c.reshape(c.shape + (1,) * (like.ndim - c.ndim))
