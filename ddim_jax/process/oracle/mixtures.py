"""The exact denoisers of mixtures of Gaussians, and of a data set."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, is_concrete
from ddim_jax.process.oracle.inputs import HIGHEST, as_like, finite, flatten
from ddim_jax.process.schedule import Schedule


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
      weights: (K,) w_k ≥ 0, need not sum to 1; equal by default. They enter by their logarithms:
        where one is 0, gradients by weights are NaN; leave such components out.
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
        flat, a, b = flatten(schedule, x, t)
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
    flat, a, b = flatten(schedule, x, t)
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
    means, variance, log_weights = (as_like(v, x) for v in (means, variance, log_weights))
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
            old * sums.weighted + jnp.matmul(e / s, m, precision=HIGHEST),
            widest,
        ), None

    zero = jnp.zeros_like(x[:, :1])
    lowest = zero + jnp.finfo(x.dtype).min
    sums = _Sums(lowest, zero, zero, jnp.zeros_like(x), widest + zero)
    return jax.lax.scan(body, sums, jnp.arange(0, count, chunk))[0]


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
    variance = finite("variance", variance)
    weights = finite("weights", np.ones(count) if weights is None else weights)
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
