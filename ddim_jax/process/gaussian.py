"""The Gaussian family of DDIM: forward marginal, q_σ, σ(η), and the coefficients of a step.

Every function is a pure function of arrays. `t` and `s` count 0..T as in the paper, `s < t`, and
need not be neighbours. Where all of `schedule`, `t`, `s` and η are concrete, they are checked and
the coefficients are computed in float64 on the host; under a trace they cannot be checked: they are
computed from log ᾱ in the trace's own precision, and a t, η or σ out of range gives NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, is_concrete, per_image, wide
from ddim_jax.process.schedule import Schedule


class Coefficients(NamedTuple):
    """What one step t → s needs of the schedule and of σ; scalars, (B,), or (S,) for a scan."""

    sqrt_alpha_bar_t: ArrayLike  # √ᾱ_t
    sqrt_one_minus_alpha_bar_t: ArrayLike  # √(1 − ᾱ_t)
    sqrt_alpha_bar_s: ArrayLike  # √ᾱ_s
    direction: ArrayLike  # √(1 − ᾱ_s − σ²), what multiplies ε in Eq. 12
    sigma: Any  # what multiplies the noise z: σ, or σ̂; None in a plan without noise


def forward_marginal(schedule: Schedule, x_0: Array, t: ArrayLike, noise: Array) -> Array:
    """Draw x_t from q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) (DDIM Eq. 4).

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) z

    Args:
      schedule: the noise schedule.
      x_0: (B, ...) data, floating.
      t: int scalar or (B,) in 0..T.
      noise: z ~ N(0, I), shape of x_0.

    Returns:
      x_t, shape and dtype of x_0.

    Raises:
      TypeError: x_0 is not floating, or t is not integer.
      ValueError: t is out of range, or shapes do not agree.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> ddim.forward_marginal(schedule, jnp.ones((1, 2)), 2, jnp.ones((1, 2))).tolist()
      [[1.4..., 1.4...]]
    """
    check_arrays(x_0, noise=noise)
    a, b = _signal_and_noise(_log_alpha_bar(schedule, t, 0, "t"))
    check_per_image(x_0, t=t)
    x = wide(x_0)
    return (per_image(a, x) * x + per_image(b, x) * noise.astype(x.dtype)).astype(x_0.dtype)


def ddim_sigma(schedule: Schedule, t: ArrayLike, s: ArrayLike, eta: ArrayLike = 1.0) -> ArrayLike:
    """σ(η), the paper's one-parameter choice of noise (DDIM Eq. 16).

    σ(η) = η √((1 − ᾱ_s)/(1 − ᾱ_t)) √(1 − ᾱ_t/ᾱ_s); η = 0 is DDIM, η = 1 is DDPM.

    Args:
      schedule: the noise schedule.
      t: int scalar or array in 1..T.
      s: int scalar or array in 0..t − 1.
      eta: η ≥ 0, scalar or array.

    Returns:
      σ, float64 on the host where everything is concrete.

    Raises:
      ValueError: t, s or η is out of range.

    Example:
      >>> import ddim_jax as ddim
      >>> f"{ddim.ddim_sigma(ddim.linear_schedule(1000), 421, 401) ** 2:.4f}"
      '0.1477'
    """
    log_t, log_s = _pair(schedule, t, s)
    return _eta_sigma(log_t, log_s, eta)


def sigma_hat(schedule: Schedule, t: ArrayLike, s: ArrayLike) -> ArrayLike:
    """σ̂ = √(1 − ᾱ_t/ᾱ_s), the larger noise of Ho et al.'s DDPM (DDIM §5 and App. D.3).

    The direction term keeps σ(1); only the noise is scaled by σ̂.

    Args:
      schedule: the noise schedule.
      t: int scalar or array in 1..T.
      s: int scalar or array in 0..t − 1.

    Returns:
      σ̂, float64 on the host where everything is concrete.

    Raises:
      ValueError: t or s is out of range.

    Example:
      >>> import ddim_jax as ddim
      >>> f"{ddim.sigma_hat(ddim.linear_schedule(1000), 1000, 999) ** 2:.2f}"
      '0.02'
    """
    log_t, log_s = _pair(schedule, t, s)
    return _hat(log_t, log_s)


def posterior(
    schedule: Schedule,
    t: ArrayLike,
    s: ArrayLike,
    eta: ArrayLike = 0.0,
    *,
    sigma: ArrayLike | None = None,
) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
    """κ, λ, σ of q_σ(x_s | x_t, x_0) = N(κ x_t + λ x_0, σ² I) (DDIM Eq. 7, for any s < t).

    κ = √((1 − ᾱ_s − σ²)/(1 − ᾱ_t)), λ = √ᾱ_s − κ √ᾱ_t: the solution of κ√ᾱ_t + λ = √ᾱ_s and
    κ²(1 − ᾱ_t) + σ² = 1 − ᾱ_s, so that every σ keeps the marginals of Eq. 4 (Lemma 1).

    Args:
      schedule: the noise schedule.
      t: int scalar or (B,) in 1..T.
      s: int scalar or (B,) in 0..t − 1.
      eta: η ≥ 0 of Eq. 16.
      sigma: σ itself, in place of η: 0 ≤ σ² ≤ 1 − ᾱ_s.

    Returns:
      (κ, λ, σ), float64 on the host where everything is concrete.

    Raises:
      ValueError: t, s, η or σ is out of range (σ² > 1 − ᾱ_s has no real κ).

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> [round(float(v), 4) for v in ddim.posterior(schedule, t=2, s=1)]
      [0.75, 0.35, 0.0]
    """
    c = coefficients(schedule, t, s, eta, sigma=sigma)
    kappa = c.direction / c.sqrt_one_minus_alpha_bar_t
    return kappa, c.sqrt_alpha_bar_s - kappa * c.sqrt_alpha_bar_t, c.sigma


def coefficients(
    schedule: Schedule,
    t: ArrayLike,
    s: ArrayLike,
    eta: ArrayLike = 0.0,
    *,
    sigma: ArrayLike | None = None,
    use_sigma_hat: bool = False,
) -> Coefficients:
    """The five numbers of Eq. 12 for steps t → s.

    Args:
      schedule: the noise schedule.
      t: int scalar or array in 1..T.
      s: int scalar or array in 0..t − 1.
      eta: η ≥ 0 of Eq. 16, scalar or array.
      sigma: σ itself, in place of η.
      use_sigma_hat: scale the noise by σ̂ instead; the direction keeps σ (App. D.3).

    Returns:
      `Coefficients` with the broadcast shape of t, s and η, float64 where all are concrete.

    Raises:
      ValueError: t, s, η or σ is out of range. Under a trace a σ² > 1 − ᾱ_s yields NaN.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> round(float(ddim.coefficients(schedule, 2, 1, eta=1.0).direction), 4)
      0.3375
    """
    log_t, log_s = _pair(schedule, t, s)
    a_t, b_t = _signal_and_noise(log_t)
    a_s, b_s = _signal_and_noise(log_s)
    std = _eta_sigma(log_t, log_s, eta) if sigma is None else _given_sigma(sigma)
    xp = _namespace(log_t, log_s, std)
    radicand = b_s**2 - std**2
    tolerance = 8 * float(jnp.finfo(radicand.dtype).eps)  # σ² = 1 − ᾱ_s may round to above it
    if xp is np and np.any(radicand < -tolerance):
        t, s, std, limit = (
            v[np.unravel_index(np.argmin(radicand), radicand.shape)]
            for v in np.broadcast_arrays(t, s, std, b_s**2)
        )
        raise ValueError(
            f"sigma = {std:.6g} (eta = {eta}) is too large for the step t = {t} -> s = {s}: "
            f"sigma**2 must not exceed 1 - alpha_bar[s] = {limit:.6g}, which is 0 at s = 0; eta in "
            "[0, 1] always fits"
        )
    direction = _sqrt(xp, xp.where(radicand < -tolerance, xp.nan, xp.maximum(radicand, 0)))
    noise_scale = _hat(log_t, log_s) if use_sigma_hat else std
    return Coefficients(*xp.broadcast_arrays(a_t, b_t, a_s, direction, noise_scale))


def _namespace(*values: ArrayLike) -> Any:
    """NumPy (float64, on the host) while every value is concrete, jax.numpy under a trace."""
    return np if is_concrete(*values) else jnp


def _signal_and_noise(log_alpha_bar: Any) -> tuple[Any, Any]:
    """(√ᾱ, √(1 − ᾱ)), both to full relative precision."""
    xp = _namespace(log_alpha_bar)
    return xp.exp(log_alpha_bar / 2), _sqrt(xp, -xp.expm1(log_alpha_bar))


def _hat(log_t: Any, log_s: Any) -> Any:
    xp = _namespace(log_t, log_s)
    return xp.sqrt(-xp.expm1(log_t - log_s))  # > 0, as s < t


def _sqrt(xp: Any, x: Any) -> Any:
    """√x whose derivative at 0 is 0, not ∞: every 0 here stays 0 whatever η, σ and ᾱ are."""
    return xp.where(x == 0, 0, xp.sqrt(xp.where(x == 0, 1, x)))


def _eta_sigma(log_t: Any, log_s: Any, eta: Any) -> Any:
    if is_concrete(eta):
        eta = _namespace(log_t, log_s).asarray(np.asarray(eta, np.float64))
        if is_concrete(eta) and not (eta >= 0).all():
            raise ValueError(f"eta must be >= 0 (0 is DDIM, 1 is DDPM), got {eta}")
    return eta * _signal_and_noise(log_s)[1] / _signal_and_noise(log_t)[1] * _hat(log_t, log_s)


def _given_sigma(sigma: Any) -> Any:
    if is_concrete(sigma):
        sigma = np.asarray(sigma, np.float64)
        if not (sigma >= 0).all():
            raise ValueError(f"sigma must be >= 0, got {sigma}")
    return sigma


def _pair(schedule: Schedule, t: ArrayLike, s: ArrayLike) -> tuple[Any, Any]:
    if is_concrete(t, s) and not np.all(np.asarray(s) < np.asarray(t)):
        raise ValueError(f"a step goes from t down to s < t, got t = {t}, s = {s}")
    return _log_alpha_bar(schedule, t, 1, "t"), _log_alpha_bar(schedule, s, 0, "s")


def _log_alpha_bar(schedule: Schedule, t: ArrayLike, low: int, name: str) -> Any:
    """log ᾱ_t for checked t; traced ones out of range give NaN."""
    dtype = t.dtype if isinstance(t, jax.Array) else np.asarray(t).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer in {low}..T, got dtype {dtype}: {t}")
    if is_concrete(t):
        values = np.asarray(t)
        if values.size and (values.min() < low or values.max() > schedule.num_steps):
            raise ValueError(
                f"{name} must lie in {low}..T = {low}..{schedule.num_steps}, got {t} (this library "
                "counts t from 1 as the paper does: add 1 to a 0-based network index)"
            )
        if is_concrete(schedule):
            return np.asarray(schedule.log_alpha_bar, np.float64)[values]
    # Unsigned, so that −1 too is out of range: NaN rather than a neighbour's value.
    table = jnp.asarray(schedule.log_alpha_bar)
    return table.at[jnp.asarray(t).astype(jnp.uint32)].get(mode="fill", fill_value=jnp.nan)


def check_arrays(x: Array, **others: Array) -> None:
    """Require a floating x, and others of its shape."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(
            f"expected a floating array, got {getattr(x, 'dtype', type(x).__name__)}; scale uint8 "
            "images to [-1, 1] first: x / 127.5 - 1"
        )
    for name, other in others.items():
        if np.shape(other) != x.shape:
            raise ValueError(f"{name} must have the shape of x, {x.shape}, got {np.shape(other)}")


def check_per_image(x: Array, **values: ArrayLike | None) -> None:
    """Require scalars, or one value per image of x."""
    for name, value in values.items():
        shape = np.shape(value) if value is not None else ()
        if shape != () and (x.ndim == 0 or shape != x.shape[:1]):
            raise ValueError(
                f"{name} must be a scalar or one value per image, {x.shape[:1]}, got shape {shape}"
            )
