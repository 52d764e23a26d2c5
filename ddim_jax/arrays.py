"""Arrays: their aliases, the one protocol that samplers ask of a network, keys by image number."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray | float | int


class Denoiser(Protocol):
    """Anything that maps `(x_t, t)` to ε_θ(x_t, t): `x` (B, ...), `t` (B,) int in 1..T → (B, ...).

    A plain function, a closure over Flax or Equinox weights, or an exact denoiser of
    `ddim_jax.process.oracle`. `ddim_jax.sampling.guidance` maps denoisers to denoisers.
    """

    def __call__(self, x: Array, t: Array, /) -> Array: ...


def is_concrete(*values: object) -> bool:
    """Whether no leaf of `values` is being traced, so that the host may look at numbers."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def per_image(coefficient: ArrayLike, like: Array) -> Array:
    """Cast a scalar or (B,) coefficient to `like`'s dtype, shaped to multiply `like` (B, ...)."""
    c = jnp.asarray(coefficient).astype(like.dtype)
    return c.reshape(c.shape + (1,) * (like.ndim - c.ndim))


def check_batch(x: Array) -> Array:
    """Require a floating batch (B, ...)."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(
            f"expected a floating array (B, ...), got {getattr(x, 'dtype', type(x).__name__)}; "
            "scale uint8 images to [-1, 1] first (x / 127.5 - 1), and lists by jnp.asarray"
        )
    if x.ndim < 1:
        raise ValueError("expected a batch (B, ...), got a scalar; add a leading axis")
    return jnp.asarray(x)


def wide(x: Array) -> Array:
    """x in float32 at least: the precision of states and coefficients, whatever a network's is."""
    return x.astype(_wide(x.dtype))


def root(x: Array) -> Array:
    """√x with gradient 0 at 0, where that of √ is infinite: for norms that may vanish."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), x)


def call(denoise: Denoiser, x: Array, t: Array, dtype: Any = None) -> Array:
    """denoise(x, t) with x given as `dtype`; the output is checked and cast to x's own dtype."""
    output = denoise(x if dtype is None else x.astype(dtype), t)
    if np.shape(output) != x.shape:
        raise ValueError(
            f"the network must return the shape of its input, {x.shape}, got {np.shape(output)}; "
            "wrap one that returns more: lambda x, t: network(x, t)[..., :channels]"
        )
    return output.astype(x.dtype)


def image_keys(key: Array, indices: ArrayLike) -> Array:
    """One key per image, `fold_in(key, number)`: what every sampler's noise derives from.

    Args:
      key: a JAX random key; or the keys themselves (B,), which are returned as they are.
      indices: (B,) ints in 0..2³² − 1, the images' global numbers, or an int n for 0..n − 1.

    Returns:
      (B,) keys.

    Raises:
      TypeError: key is no JAX key.
      ValueError: indices is neither a positive int nor a vector of such numbers, or there are as
        many keys as numbers of another count.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> ddim.image_keys(jax.random.key(0), [5, 6]).shape
      (2,)
    """
    dtype = getattr(key, "dtype", None)
    if dtype == jnp.uint32 and key.shape == (2,):
        key = jax.random.wrap_key_data(key)  # as jax.random.PRNGKey makes them
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or key.ndim > 1:
        raise TypeError(f"key must be one JAX key, such as jax.random.key(0), got {key!r}")
    if isinstance(indices, int | np.integer):
        if indices < 1:
            raise ValueError(f"indices must be a number of images >= 1 or a vector, got {indices}")
        indices = np.arange(indices)
    numbers: Any = np.asarray(indices) if is_concrete(indices) else indices
    if numbers.ndim != 1 or not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(f"indices must be an int or a vector of ints, got {indices}")
    if key.ndim == 1:
        if key.shape != numbers.shape:
            raise ValueError(f"got keys of {key.shape[0]} images for {numbers.shape[0]} images")
        return key
    if is_concrete(numbers):
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < 2**32:
            raise ValueError(
                f"indices must lie in 0..2**32 - 1, got {numbers.min()}..{numbers.max()}; for more "
                "images take another key"
            )
        numbers = numbers.astype(np.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(numbers))


def normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """N(0, 1) drawn in float32 (float64 for float64) and rounded: the same image in any dtype."""
    return jax.random.normal(key, shape, _wide(dtype)).astype(dtype)


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def import_name(text: str, what: str) -> Any:
    """What `module:attribute` names: how a command takes a user's own methods, data and presets.

    Raises:
      ValueError: the module has no such attribute.
      ModuleNotFoundError: there is no such module.

    Example:
      >>> import_name("math:pi", "number")
      3.14...
    """
    module, _, attribute = text.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ValueError(f"module {module} has no {what} {attribute!r}") from error
