"""Exact denoisers: the optimal ε for data whose noisy marginals are known in closed form.

ε*(x, t) = E[ε | x_t = x] = (x − √ᾱ_t E[x_0 | x_t = x])/√(1 − ᾱ_t) = −√(1 − ᾱ_t) ∇ log q_t(x)

It minimises the loss of Eq. 5 over all functions, so that every claim about samplers can be
checked with no training. Each is computed as √(1 − ᾱ_t) times an average of (x − √ᾱ_t m)/(…),
from log ᾱ and from differences x − √ᾱ_t m, never from ‖x‖² − 2 x·m + ‖m‖²: in float32 at t = 1
that expansion is wrong by about 10⁻⁷ ‖x‖²/(1 − ᾱ₁), several units in the exponent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, check_batch, is_concrete
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.schedule import Schedule

_HIGHEST = jax.lax.Precision.HIGHEST


def gaussian(schedule: Schedule, mean: ArrayLike, cov: ArrayLike = 1.0) -> Denoiser:
    """The exact denoiser of Gaussian data, x_0 ~ N(μ, Σ).

    ε*(x, t) = √(1 − ᾱ_t) (ᾱ_t Σ + (1 − ᾱ_t) I)⁻¹ (x − √ᾱ_t μ)

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
    mu, sigma = _finite("mean", mean), _finite("cov", cov)
    _check_covariance(sigma, mu)
    xp: Any = np if is_concrete(sigma) else jnp
    basis = None
    values = sigma
    if sigma.ndim == 2:
        values, basis = xp.linalg.eigh(sigma)  # Σ = Q diag(λ) Qᵀ: one Q for every t
        values = xp.maximum(values, 0)

    def denoise(x: Array, t: Array) -> Array:
        flat, a, b = _flatten(schedule, x, t)
        if sigma.ndim and sigma.shape[0] != flat.shape[1]:
            raise ValueError(f"cov is for {sigma.shape[0]} pixels, x has {flat.shape[1]} of them")
        if mu.ndim and mu.shape != x.shape[1:]:
            raise ValueError(f"mean has shape {mu.shape}, one image of x has {x.shape[1:]}")
        r = flat - a * _as(mu, flat).reshape(1, -1)
        scale = b / (a**2 * jnp.atleast_2d(_as(values, flat)) + b**2)
        if basis is None:
            return (scale * r).reshape(x.shape).astype(x.dtype)
        q = _as(basis, flat)
        eps = jnp.matmul(scale * jnp.matmul(r, q, precision=_HIGHEST), q.T, precision=_HIGHEST)
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
    mu, sigma = _finite("mean", mean), _finite("cov", cov)
    _check_covariance(sigma, mu)
    c = coefficients(schedule, t, 0)
    a, b = np.asarray(c.sqrt_alpha_bar_t), np.asarray(c.sqrt_one_minus_alpha_bar_t)
    return a * mu, a**2 * sigma + b**2 * (np.eye(len(sigma)) if sigma.ndim == 2 else 1)


def mixture(
    schedule: Schedule,
    means: ArrayLike,
    variance: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    *,
    chunk: int = 1024,
) -> Denoiser:
    """The exact denoiser of a mixture, x_0 ~ Σ_k w_k N(m_k, v_k I).

    ε*(x, t) = √(1 − ᾱ_t) Σ_k r_k (x − √ᾱ_t m_k)/s_k, with s_k = ᾱ_t v_k + 1 − ᾱ_t and
    r_k ∝ w_k s_k^(−d/2) exp(−‖x − √ᾱ_t m_k‖²/(2 s_k)), the posterior of component k

    The sum runs over chunks of components with a running maximum of the exponent, so that memory
    is that of `means` and of one chunk. Arrays may be traced: in a jitted function pass a large
    `means` as an argument (closing over it would compile it in).

    Args:
      schedule: the noise schedule.
      means: (K, ...) m_k, floating; a component has the shape of one image.
      variance: v_k ≥ 0, a scalar or (K,).
      weights: (K,) w_k ≥ 0, need not sum to 1; equal by default.
      chunk: number of components looked at together, ≥ 1.

    Returns:
      A `Denoiser`: x (B, ...), t int (B,) in 1..T → ε (B, ...), in x's dtype.

    Raises:
      TypeError: means is not floating.
      ValueError: a value is out of range, or shapes do not agree.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> denoise = ddim.oracle.mixture(schedule, jnp.array([[-1.0], [1.0]]), variance=0.01)
      >>> denoise(jnp.zeros((4, 1)), jnp.full((4,), 500)).shape
      (4, 1)
    """
    components = _check_mixture(means, variance, weights, chunk)

    def denoise(x: Array, t: Array) -> Array:
        flat, a, b = _flatten(schedule, x, t)
        sums = _posterior_sums(flat, a, b, *components, chunk)
        eps = b * (flat * sums.precision - a * sums.weighted) / sums.total
        return eps.reshape(x.shape).astype(x.dtype)

    return denoise


def empirical(
    schedule: Schedule, data: ArrayLike, variance: ArrayLike = 0.0, *, chunk: int = 1024
) -> Denoiser:
    """The exact denoiser of a given data set: x_0 uniform over its N images.

    ε*(x, t) = (x − √ᾱ_t Σ_n r_n x⁽ⁿ⁾)/√(1 − ᾱ_t), r = softmax(−‖x − √ᾱ_t x⁽ⁿ⁾‖²/(2(1 − ᾱ_t)))

    What a network of unlimited capacity would learn. With variance v > 0 each image stands for
    N(x⁽ⁿ⁾, v I), a smooth density. See `mixture`.

    Args:
      schedule: the noise schedule.
      data: (N, ...) floating, scaled as the sampler's images are.
      variance: v ≥ 0.
      chunk: number of images looked at together, ≥ 1.

    Returns:
      A `Denoiser`: x (B, ...), t int (B,) in 1..T → ε (B, ...), in x's dtype.

    Raises:
      TypeError: data is not floating.
      ValueError: a value is out of range, or shapes do not agree.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule, data = ddim.linear_schedule(1000), jnp.array([[-1.0, 1.0], [1.0, 0.5]])
      >>> x_T = ddim.initial_noise(jax.random.key(0), 1, (2,))
      >>> x_0 = ddim.sample(ddim.oracle.empirical(schedule, data), x_T, schedule, range(1, 1001))
      >>> bool(jnp.isclose(x_0, data, atol=1e-3).all(-1).any())  # it draws one of the data
      True
    """
    return mixture(schedule, data, variance, chunk=chunk)


def mixture_log_density(
    schedule: Schedule,
    x: Array,
    t: ArrayLike,
    means: ArrayLike,
    variance: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    *,
    chunk: int = 1024,
) -> Array:
    """log q_t(x) for x_0 ~ Σ_k w_k N(m_k, v_k I): the mixture of N(√ᾱ_t m_k, s_k I).

    log q_t(x) = log Σ_k w_k (2π s_k)^(−d/2) exp(−‖x − √ᾱ_t m_k‖²/(2 s_k)),
    with s_k = ᾱ_t v_k + 1 − ᾱ_t

    Args:
      schedule: the noise schedule.
      x: (B, ...) floating.
      t: int scalar or (B,) in 1..T.
      means, variance, weights, chunk: as in `mixture`.

    Returns:
      (B,) log q_t(x), at least float32.

    Raises:
      TypeError, ValueError: as `mixture`.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> x = jnp.zeros((1, 1))
      >>> log_q = ddim.oracle.mixture_log_density(schedule, x, 1, jnp.zeros((1, 1)), 1.0)
      >>> round(log_q.item(), 4)  # −log √2π
      -0.9189
    """
    components = _check_mixture(means, variance, weights, chunk)
    flat, a, b = _flatten(schedule, x, t)
    sums = _posterior_sums(flat, a, b, *components, chunk)
    log_normal = -flat.shape[1] / 2 * jnp.log(2 * np.pi * sums.widest)
    return (sums.top + jnp.log(sums.total) + log_normal)[:, 0]


class _Sums(NamedTuple):
    """Σ_k over the posterior weights e_k = exp(logit_k − top), for each image."""

    top: Array  # (B, 1) max_k logit_k
    total: Array  # (B, 1) Σ e_k
    precision: Array  # (B, 1) Σ e_k/s_k
    weighted: Array  # (B, d) Σ e_k m_k/s_k
    widest: Array  # (B, 1) max_k s_k, to which the logits' factor s_k^(−d/2) is relative


def _posterior_sums(
    x: Array, a: Array, b: Array, means: Any, variance: Any, log_weights: Any, chunk: int
) -> _Sums:
    """The sums over components, `chunk` at a time; the last chunk overlaps and is masked."""
    if means.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"a component has {means.shape[1:]} pixels, one image of x has {x.shape[1:]}"
        )
    means, variance, log_weights = (_as(v, x) for v in (means, variance, log_weights))
    count, chunk = len(means), min(chunk, len(means))
    widest = a**2 * variance.max() + b**2

    def body(sums: _Sums, first: Array) -> tuple[_Sums, None]:
        start = jnp.minimum(first, count - chunk)
        m, v, log_w = (
            jax.lax.dynamic_slice_in_dim(z, start, chunk) for z in (means, variance, log_weights)
        )
        log_w = jnp.where(start + jnp.arange(chunk) < first, -jnp.inf, log_w)
        s = a**2 * v[None] + b**2
        squared = ((x[:, None] - a[:, None] * m[None]) ** 2).sum(-1)
        logit = log_w[None] - squared / (2 * s) - x.shape[1] / 2 * jnp.log(s / widest)
        top = jnp.maximum(sums.top, logit.max(1, keepdims=True))
        old, e = jnp.exp(sums.top - top), jnp.exp(logit - top)
        return _Sums(
            top,
            old * sums.total + e.sum(1, keepdims=True),
            old * sums.precision + (e / s).sum(1, keepdims=True),
            old * sums.weighted + jnp.matmul(e / s, m, precision=_HIGHEST),
            widest,
        ), None

    zero = jnp.zeros_like(x[:, :1])
    lowest = zero + jnp.finfo(x.dtype).min
    sums = _Sums(lowest, zero, zero, jnp.zeros_like(x), widest + zero)
    return jax.lax.scan(body, sums, jnp.arange(0, count, chunk))[0]


def _as(value: Any, like: Array) -> Array:
    return jnp.asarray(value).astype(like.dtype)


def _flatten(schedule: Schedule, x: Array, t: ArrayLike) -> tuple[Array, Array, Array]:
    """x as (B, d) in at least float32, with √ᾱ_t and √(1 − ᾱ_t) as (B, 1)."""
    x = check_batch(x)
    if jnp.shape(t) not in ((), x.shape[:1]):
        raise ValueError(f"t must be a scalar or {x.shape[:1]}, got shape {jnp.shape(t)}")
    if is_concrete(t) and np.min(np.asarray(t), initial=1) < 1:
        raise ValueError(f"t must lie in 1..T = 1..{schedule.num_steps}, got {t}")
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    flat = x.reshape(x.shape[0], -1).astype(dtype)
    c = coefficients(schedule, t, t * 0)
    a, b = (
        jnp.broadcast_to(_as(v, flat), x.shape[:1])[:, None]
        for v in (c.sqrt_alpha_bar_t, c.sqrt_one_minus_alpha_bar_t)
    )
    return flat, a, b


def _finite(name: str, value: ArrayLike) -> Any:
    """`value` as an array, in float64 on the host unless traced."""
    if not is_concrete(value):
        return value
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array}")
    return array


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


def _check_mixture(means: Any, variance: Any, weights: Any, chunk: int) -> tuple[Any, Any, Any]:
    """means (K, d), variance (K,), log w (K,)."""
    if not hasattr(means, "dtype"):
        means = np.asarray(means)
    if not jnp.issubdtype(means.dtype, jnp.floating):
        raise TypeError(
            f"means (or data) must be floating, got {means.dtype}; scale uint8 images to [-1, 1] "
            "first: x / 127.5 - 1"
        )
    if means.ndim < 1 or means.shape[0] == 0:
        raise ValueError(f"means (or data) must be a non-empty (K, ...), got shape {means.shape}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be an int >= 1, got {chunk!r}")
    count = means.shape[0]
    variance = _finite("variance", variance)
    weights = _finite("weights", np.ones(count) if weights is None else weights)
    if variance.shape not in ((), (count,)) or weights.shape != (count,):
        raise ValueError(
            f"with {count} components variance must be a scalar or ({count},) and weights "
            f"({count},), got shapes {variance.shape} and {weights.shape}"
        )
    if is_concrete(variance) and variance.min() < 0:
        raise ValueError(f"variance must be >= 0, got {variance.min()}")
    if is_concrete(weights) and (weights.min() < 0 or weights.sum() == 0):
        raise ValueError(f"weights must be >= 0 and not all 0, got {weights}")
    xp: Any = np if is_concrete(variance, weights) else jnp
    with np.errstate(divide="ignore"):
        log_weights = xp.log(weights / weights.sum())
    return means.reshape(count, -1), xp.broadcast_to(variance, (count,)), log_weights
