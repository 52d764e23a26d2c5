"""One step of DDIM, t → s (Eq. 12)."""

from __future__ import annotations

import numpy as np

from ddim_jax.arrays import Array, ArrayLike, is_concrete, per_image, wide
from ddim_jax.process.gaussian import Coefficients, check_arrays, check_per_image, coefficients
from ddim_jax.process.prediction import Prediction, to_x0_eps
from ddim_jax.process.schedule import Schedule


def step(
    c: Coefficients,
    x_t: Array,
    output: Array,
    noise: Array | None = None,
    *,
    prediction: str | Prediction = "eps",
) -> tuple[Array, Array]:
    """One step t → s from precomputed coefficients (DDIM Eq. 12).

    x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε + σ z

    Args:
      c: `coefficients(schedule, t, s, eta)`.
      x_t: (B, ...).
      output: (B, ...) the network's output at (x_t, t).
      noise: z ~ N(0, I) of x_t's shape, or None for σ = 0.
      prediction: what the output is: `"eps"`, `"x_0"`, `"v"`, or a `Prediction`.

    Returns:
      (x_s, x̂_0), each (B, ...), in x_t's dtype.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> c = ddim.coefficients(ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36]), 2, 1)
      >>> x_s, x_0 = ddim.step(c, jnp.full((1, 1), 1.4), jnp.ones((1, 1)))
      >>> round(x_s.item(), 4), round(x_0.item(), 4)
      (1.4, 1.0)
    """
    x = wide(x_t)
    x_0, eps = to_x0_eps(c, x, output, prediction)
    x_s = towards(c, x_0, eps, noise)
    return x_s.astype(x_t.dtype), x_0.astype(x_t.dtype)


def towards(c: Coefficients, x_0: Array, eps: Array, noise: Array | None = None) -> Array:
    """√ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε + σ z, in x̂_0's dtype (DDIM Eq. 12)."""
    x_s = per_image(c.sqrt_alpha_bar_s, x_0) * x_0 + per_image(c.direction, x_0) * eps
    if noise is None:
        return x_s
    return x_s + per_image(c.sigma, x_0) * noise.astype(x_0.dtype)


def ddim_step(
    schedule: Schedule,
    x_t: Array,
    eps: Array,
    t: ArrayLike,
    s: ArrayLike,
    eta: ArrayLike = 0.0,
    noise: Array | None = None,
    *,
    sigma: ArrayLike | None = None,
    prediction: str | Prediction = "eps",
) -> Array:
    """One DDIM step t → s (DDIM Eq. 12).

    x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε + σ z, with x̂_0 = (x_t − √(1 − ᾱ_t) ε)/√ᾱ_t (Eq. 9).

    Args:
      schedule: the noise schedule.
      x_t: (B, ...) floating.
      eps: (B, ...) ε_θ(x_t, t), or what `prediction` names.
      t: int scalar or (B,) in 1..T.
      s: int scalar or (B,) in 0..t − 1: the next element of τ, not t − 1.
      eta: η ≥ 0 of Eq. 16.
      noise: z ~ N(0, I), shape of x_t; needed unless σ = 0.
      sigma: σ itself, in place of η.
      prediction: `"eps"`, `"x_0"`, `"v"`, or a `Prediction`.

    Returns:
      x_s, shape and dtype of x_t.

    Raises:
      TypeError: x_t is not floating, or t or s is not integer.
      ValueError: t, s, η or σ is out of range, shapes do not agree, or σ > 0 without noise.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> x_2 = jnp.full((1, 1), 1.4)
      >>> round(ddim.ddim_step(schedule, x_2, jnp.ones((1, 1)), t=2, s=1).item(), 4)
      1.4
    """
    check_arrays(x_t, eps=eps, **({} if noise is None else {"noise": noise}))
    check_per_image(x_t, t=t, s=s, eta=eta, sigma=sigma)
    c = coefficients(schedule, t, s, eta, sigma=sigma)
    if noise is None and not (is_concrete(c.sigma) and not np.any(c.sigma)):
        raise ValueError(
            f"eta = {eta}, sigma = {sigma} may add noise: pass noise=jax.random.normal(key, "
            "x_t.shape, x_t.dtype), or eta = 0 for the deterministic step"
        )
    return step(c, x_t, eps, noise, prediction=prediction)[0]
