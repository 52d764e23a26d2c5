"""The exact denoiser of one Gaussian."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, is_concrete
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.oracle.inputs import HIGHEST, as_like, finite, flatten
from ddim_jax.process.schedule import Schedule


def gaussian(schedule: Schedule, mean: ArrayLike, cov: ArrayLike = 1.0) -> Denoiser:
    """The exact denoiser of Gaussian data, x_0 ~ N(μ, Σ).

    ε*(x, t) = √(1 − ᾱ_t) (ᾱ_t Σ + (1 − ᾱ_t) I)⁻¹ (x − √ᾱ_t μ)

    A traced (d, d) Σ of equal eigenvalues has no gradient here (NaN, that of `eigh`): pass its
    diagonal.

    Args:
      schedule: the noise schedule.
      mean: μ, the shape of one image, or a scalar for all pixels.
      cov: Σ ≥ 0 over the flattened image, d pixels: a scalar, (d,) its diagonal, or (d, d).

    Returns:
      A `Denoiser`: x (B, ...), t int (B,) in 1..T → ε (B, ...), in x's dtype.

    Raises:
      ValueError: cov is not symmetric positive semi-definite, or shapes do not agree.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> denoise = ddim.oracle.gaussian(schedule, mean=0.0, cov=1.0)
      >>> round(denoise(jnp.ones((1, 1)), jnp.array([2])).item(), 4)  # √(1 − 0.36) · x
      0.8
    """
    mu, sigma = finite("mean", mean), finite("cov", cov)
    _check_covariance(sigma, mu)
    xp: Any = np if is_concrete(sigma) else jnp
    basis = None
    values = sigma
    if sigma.ndim == 2:
        values, basis = xp.linalg.eigh(sigma)  # Σ = Q diag(λ) Qᵀ: one Q for every t
        values = xp.maximum(values, 0)

    def denoise(x: Array, t: Array) -> Array:
        flat, a, b = flatten(schedule, x, t)
        if sigma.ndim and sigma.shape[0] != flat.shape[1]:
            raise ValueError(f"cov is for {sigma.shape[0]} pixels, x has {flat.shape[1]} of them")
        if mu.ndim and mu.shape != x.shape[1:]:
            raise ValueError(f"mean has shape {mu.shape}, one image of x has {x.shape[1:]}")
        r = flat - a * as_like(mu, flat).reshape(1, -1)
        scale = b / (a**2 * jnp.atleast_2d(as_like(values, flat)) + b**2)
        if basis is None:
            return (scale * r).reshape(x.shape).astype(x.dtype)
        q = as_like(basis, flat)
        eps = jnp.matmul(scale * jnp.matmul(r, q, precision=HIGHEST), q.T, precision=HIGHEST)
        return eps.reshape(x.shape).astype(x.dtype)

    return denoise


def gaussian_marginal(
    schedule: Schedule, mean: ArrayLike, cov: ArrayLike, t: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x_t for x_0 ~ N(μ, Σ): √ᾱ_t μ and ᾱ_t Σ + (1 − ᾱ_t) I (from Eq. 4).

    Args:
      schedule: the noise schedule.
      mean: μ, the shape of one image, or a scalar.
      cov: Σ: a scalar, (d,) its diagonal, or (d, d).
      t: int in 1..T.

    Returns:
      (mean, covariance) in float64, of the shapes of `mean` and `cov`.

    Raises:
      ValueError: as `gaussian`, or t is out of range.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> [round(float(v), 4) for v in ddim.oracle.gaussian_marginal(schedule, 1.0, 4.0, t=1)]
      [0.8, 2.92]
    """
    mu, sigma = finite("mean", mean), finite("cov", cov)
    _check_covariance(sigma, mu)
    c = coefficients(schedule, t, 0)
    a, b = np.asarray(c.sqrt_alpha_bar_t), np.asarray(c.sqrt_one_minus_alpha_bar_t)
    return a * mu, a**2 * sigma + b**2 * (np.eye(len(sigma)) if sigma.ndim == 2 else 1)


def _check_covariance(cov: Any, mean: Any) -> None:
    if cov.ndim > 2 or (cov.ndim == 2 and cov.shape[0] != cov.shape[1]):
        raise ValueError(f"cov must be a scalar, (d,) or (d, d), got shape {cov.shape}")
    if cov.ndim and mean.ndim and cov.shape[0] != mean.size:
        raise ValueError(f"cov is for {cov.shape[0]} pixels, mean has {mean.size} of them")
    if not is_concrete(cov):
        return
    if cov.ndim == 2 and not np.allclose(cov, cov.T, atol=1e-6 * np.abs(cov).max()):
        raise ValueError("cov must be symmetric; pass (cov + cov.T) / 2 if it is so up to rounding")
    values = np.linalg.eigvalsh(cov) if cov.ndim == 2 else cov
    if values.min() < -1e-6 * np.abs(values).max():
        raise ValueError(f"cov must be positive semi-definite, got an eigenvalue {values.min()}")
