"""What the latents x_T mean: interpolation on the sphere, and images that share an x_T."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import (
    Array,
    ArrayLike,
    Denoiser,
    check_batch,
    is_concrete,
    per_image,
    root,
    wide,
)
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.plan import Method
from ddim_jax.sampling.sampler import sample


class SameLatent(NamedTuple):
    """The images of one set of latents under several τ."""

    images: Array  # (K, B, ...) one batch for each τ, in the order given
    distance: Array  # (K, B) root mean squared distance to the image of the longest τ


def slerp(a: Array, b: Array, weight: ArrayLike) -> Array:
    """Spherical linear interpolation, image by image (DDIM App. D.5; Shoemake 1985).

    sin((1 − w)θ)/sin θ · a + sin(wθ)/sin θ · b, with θ = arccos(a·b/(‖a‖ ‖b‖)) of each image

    Norms and angles are those of one whole image, never of the batch. The end points are exact.
    For equal norms the path has that norm; for unequal ones the formula is applied as it stands.
    Parallel latents give linear interpolation, the limit θ → 0. Opposite latents (θ = π) have no
    shortest arc between them, and latents that are all zero no angle: an error, or NaN for that
    image under a trace; so have latents that are opposite but for their dtype's rounding. Near
    θ = π the arc itself is ill-conditioned: errors of a and b grow by 1/sin θ. Computed in float32
    at least.

    Args:
      a: (B, ...) floating latents.
      b: (B, ...) of the same shape.
      weight: w in [0, 1], a scalar or (B,): 0 gives a, 1 gives b.

    Returns:
      (B, ...) in a's dtype.

    Raises:
      TypeError: a or b is not floating.
      ValueError: shapes do not agree, w is out of range, or two latents have no arc.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> middle = ddim.slerp(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), 0.5)
      >>> [round(v, 4) for v in middle[0].tolist()]
      [0.7071, 0.7071]
    """
    a, b = check_batch(a), check_batch(b)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"a and b must be batches (B, ...) of one shape, got {a.shape} and {b.shape}; give a "
            "single latent a leading axis: a[None]"
        )
    if jnp.shape(weight) not in ((), a.shape[:1]):
        raise ValueError(
            f"weight must be a scalar or one value per image, {a.shape[:1]}, got shape "
            f"{jnp.shape(weight)}"
        )
    if is_concrete(weight) and not ((np.asarray(weight) >= 0) & (np.asarray(weight) <= 1)).all():
        raise ValueError(f"weight must lie in [0, 1], got {weight}")
    dtype, a, b = a.dtype, wide(a), wide(b)
    unit_a, unit_b = _unit(a), _unit(b)
    apart, together = _norm(unit_a - unit_b), _norm(unit_a + unit_b)
    theta = 2 * jnp.arctan2(apart, together)  # accurate near 0 and π, where arccos is not
    has_arc = (together > 8 * float(jnp.finfo(dtype).eps)) & (_norm(a) > 0) & (_norm(b) > 0)
    if is_concrete(has_arc) and not np.all(has_arc):
        i = int(np.argmin(np.asarray(has_arc)))
        raise ValueError(
            f"the latents of image {i} are opposite or all zero: no shortest arc joins them; move "
            "one of them a little, or go through a third latent"
        )
    w = jnp.broadcast_to(jnp.asarray(weight).astype(a.dtype), theta.shape)
    whole = jnp.where(has_arc, _sinc(theta), jnp.nan)
    from_a, from_b = (v * _sinc(v * theta) / whole for v in (1 - w, w))
    return (per_image(from_a, a) * a + per_image(from_b, b) * b).astype(dtype)


def spherical_grid(corners: Array, rows: int, columns: int) -> Array:
    """A grid of latents between four, by `slerp` down the sides, then across (DDIM Figure 6, D.5).

    grid[i, j] = slerp(slerp(c₀₀, c₁₀, u), slerp(c₀₁, c₁₁, u), v), u = i/(R − 1), v = j/(C − 1)

    Args:
      corners: (4, ...) floating: top left, top right, bottom left, bottom right.
      rows: ≥ 2.
      columns: ≥ 2.

    Returns:
      (rows, columns, ...) latents; flatten the first two axes to sample them.

    Raises:
      TypeError: corners is not floating.
      ValueError: there are not four corners, rows or columns is below 2, or as `slerp`.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> corners = ddim.initial_noise(jax.random.key(0), 4, (8, 8, 1))
      >>> ddim.spherical_grid(corners, 11, 7).shape
      (11, 7, 8, 8, 1)
    """
    dtype, corners = check_batch(corners).dtype, wide(check_batch(corners))
    if corners.shape[0] != 4:
        raise ValueError(f"corners must hold four latents (4, ...), got shape {corners.shape}")
    if rows < 2 or columns < 2:
        raise ValueError(f"need rows >= 2 and columns >= 2, got {rows} and {columns}")
    shape = corners.shape[1:]
    down = jnp.linspace(0, 1, rows, dtype=corners.dtype)
    across = jnp.linspace(0, 1, columns, dtype=corners.dtype)
    left, right = (
        slerp(
            jnp.broadcast_to(corners[top], (rows, *shape)),
            jnp.broadcast_to(corners[top + 2], (rows, *shape)),
            down,
        )
        for top in (0, 1)
    )
    grid = slerp(
        jnp.repeat(left, columns, axis=0),
        jnp.repeat(right, columns, axis=0),
        jnp.tile(across, rows),
    )
    return grid.reshape(rows, columns, *shape).astype(dtype)


def same_latent(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    taus: Sequence[ArrayLike],
    *,
    method: Method | None = None,
    feature: Callable[[Array], Array] | None = None,
) -> SameLatent:
    """The images of the same x_T under several τ, and how far apart they are (DDIM Figure 5, §5.2).

    d_k = √(mean (φ(x_0 by τ_k) − φ(x_0 by the longest τ))²) for each image

    Args:
      denoise, x_T, schedule: as in `sample`; η = 0.
      method: without noise, such as `adams_bashforth(2)`, in place of DDIM at η = 0.
      taus: K sequences τ, such as `[timesteps(1000, s) for s in (10, 20, 50, 100)]`.
      feature: φ: images (B, ...) → (B, ...); by default the pixels themselves.

    Returns:
      A `SameLatent`: images (K, B, ...) and distances (K, B), zero for the longest τ.

    Raises:
      TypeError: x_T is not floating.
      ValueError: there is no τ, or as `sample`.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> denoise = ddim.oracle.gaussian(schedule, mean=0.5, cov=0.1)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> taus = [ddim.timesteps(1000, s) for s in (10, 100, 1000)]
      >>> distance = ddim.same_latent(denoise, x_T, schedule, taus).distance
      >>> [round(d, 2) for d in distance.mean(axis=1).tolist()]
      [0.15, 0.02, 0.0]
    """
    if len(taus) == 0 or np.ndim(taus[0]) != 1:
        raise ValueError("taus must be a list of at least one tau, such as [timesteps(1000, 10)]")
    images = jnp.stack([sample(denoise, x_T, schedule, tau, method=method) for tau in taus])
    features = [wide(feature(x) if feature else x) for x in images]
    longest = int(np.argmax([len(np.asarray(tau)) for tau in taus]))
    squares = [jnp.square(f - features[longest]).reshape(f.shape[0], -1) for f in features]
    return SameLatent(images, jnp.stack([root(s.mean(axis=1)) for s in squares]))


def _norm(x: Array) -> Array:
    """(B,) Euclidean norms of whole images."""
    return root(jnp.square(x).reshape(x.shape[0], -1).sum(axis=1))


def _unit(x: Array) -> Array:
    norm = _norm(x)
    return x / per_image(jnp.where(norm > 0, norm, 1), x)


def _sinc(theta: Array) -> Array:
    """sin θ/θ; near 0 by its series, as the quotient's derivative cancels there."""
    near = jnp.abs(theta) < 0.02
    x, square = jnp.where(near, 1, theta), theta**2
    return jnp.where(near, 1 - square / 6 * (1 - square / 20 * (1 - square / 42)), jnp.sin(x) / x)
