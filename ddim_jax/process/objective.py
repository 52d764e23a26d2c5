"""The training objective L_γ."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import (
    Array,
    ArrayLike,
    Denoiser,
    call,
    check_batch,
    image_keys,
    is_concrete,
    normal,
    per_image,
    wide,
)
from ddim_jax.process.gaussian import coefficients, forward_marginal
from ddim_jax.process.prediction import from_x0_eps
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule


def loss(
    denoise: Denoiser,
    schedule: Schedule,
    x_0: Array,
    key: Array,
    gamma: ArrayLike | None = None,
    *,
    indices: ArrayLike | None = None,
) -> Array:
    """One unbiased draw of L_γ/T per image, averaged over batch and pixels (DDIM Eq. 5).

    mean_k γ_{t_k} ‖ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t) − ε‖² / dim, t uniform in 1..T, ε ~ N(0, I).

    The paper's γ = 1 makes every pixel's error count alike at every t. Image k's t and ε come
    from `fold_in(key, k)`, so that they do not depend on how a batch is split over devices.

    Args:
      denoise: (x (B, ...), t (B,) in 1..T) → (B, ...), compared on what it predicts: ε, x_0, v or
        F, see `predicts`.
      schedule: the noise schedule.
      x_0: (B, ...) floating data, scaled to [−1, 1].
      key: a JAX random key; a new one each step.
      gamma: (T+1,) weights γ_t of the squared error of the output, γ_0 unused; None for γ = 1.
        `find_gamma` has them by name.
      indices: (B,) the numbers k of the images in their batch, for one that is worked through in
        parts; 0..B − 1 by default.

    Returns:
      A float32 scalar.

    Raises:
      TypeError: x_0 is not floating.
      ValueError: gamma is not (T+1,), finite and ≥ 0, or the output's shape is not the input's.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> zero = lambda x, t: jnp.zeros_like(x)  # predicts no noise: E‖ε‖²/dim = 1
      >>> schedule = ddim.linear_schedule(1000)
      >>> round(float(ddim.loss(zero, schedule, jnp.ones((512, 64)), jax.random.key(0))), 1)
      1.0
    """
    x_0 = check_batch(x_0)
    dtype = x_0.dtype
    t, noise = draws(x_0, key, schedule.num_steps, indices)
    x_0 = wide(x_0)
    output = call(denoise, forward_marginal(schedule, x_0, t, noise), t, dtype)
    prediction, target = prediction_of(denoise), noise
    if prediction.kind != "eps":
        target = from_x0_eps(coefficients(schedule, t, t * 0), x_0, noise, prediction)
    return weighted_error(schedule, output, target, t, gamma)


def draws(
    x_0: Array, key: Array, last: int, indices: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Of each image a number, uniform in 1..last, and ε ~ N(0, I), both from `fold_in(key, k)`.

    Returns:
      (int32 (B,), ε of x_0's shape, float32 at least).

    Example:
      >>> number, noise = draws(jnp.ones((4, 2)), jax.random.key(0), 1)
      >>> number.tolist(), noise.shape
      ([1, 1, 1, 1], (4, 2))
    """
    numbers = jnp.arange(x_0.shape[0]) if indices is None else jnp.asarray(indices)
    keys = jax.vmap(jax.random.split)(image_keys(key, numbers))
    number = jax.vmap(lambda k: jax.random.randint(k, (), 1, last + 1, jnp.int32))(keys[:, 0])
    draw: Callable[[Array], Array] = lambda k: normal(k, x_0.shape[1:], wide(x_0).dtype)  # noqa: E731
    return number, jax.vmap(draw)(keys[:, 1])


def weighted_error(
    schedule: Schedule, output: Array, target: Array, t: Array, gamma: ArrayLike | None
) -> Array:
    """mean_k γ_{t_k} ‖output − target‖²/dim, in float32.

    Raises:
      ValueError: gamma is not (T+1,), finite and ≥ 0.
    """
    if gamma is not None and np.shape(gamma) != (schedule.num_steps + 1,):
        raise ValueError(
            f"gamma must have shape (T+1,) = ({schedule.num_steps + 1},), got {np.shape(gamma)}"
        )
    if gamma is not None and is_concrete(gamma):
        fit = np.isfinite(w := np.asarray(gamma)[1:]) & (w >= 0)
        if not fit.all():
            i = int(np.argmin(fit))
            raise ValueError(f"gamma must be finite and >= 0, got gamma[{i + 1}] = {w[i]}")
    error = (output - target).astype(jnp.float32) ** 2
    if gamma is not None:
        error = error * per_image(jnp.asarray(gamma, jnp.float32)[t], error)
    return error.mean()
