"""The arithmetic and the checks beneath `categorical`: kernels of Appendix A in log-space."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, is_concrete, per_image
from ddim_jax.process.schedule import Schedule


class Coefficients(NamedTuple):
    """What a step t → s needs, () or (B,); complements are computed apart, so nothing cancels."""

    x_t: Any  # σ                         ┐
    x_0: Any  # ᾱ_s − σᾱ_t                │ Eq. 19, adding to 1
    uniform: Any  # (1−ᾱ_s) − (1−ᾱ_t)σ    ┘
    transition: Any  # (a, 1−a), a = ᾱ_t/ᾱ_s
    marginal_s: Any  # (ᾱ_s, 1−ᾱ_s)
    marginal_t: Any  # (ᾱ_t, 1−ᾱ_t)
    eta: Any


def coefficients(
    schedule: Schedule,
    t: ArrayLike,
    s: ArrayLike,
    eta: ArrayLike = 0.0,
    sigma: ArrayLike | None = None,
) -> Coefficients:
    """In float64 on the host where all is concrete, else in JAX's default float."""
    log_t, log_s = log_alpha_bar(schedule, t), log_alpha_bar(schedule, s)
    transition, at_s, at_t = map(signal_and_noise, (log_t - log_s, log_s, log_t))
    sigma_max = at_s[1] / at_t[1]
    gap = 0 * sigma_max if sigma is None else _sigma_gap(sigma, sigma_max)
    return Coefficients(
        x_t=sigma_max - gap,
        x_0=at_s[0] * transition[1] / at_t[1] + gap * at_t[0],
        uniform=gap * at_t[1],
        transition=transition,
        marginal_s=at_s,
        marginal_t=at_t,
        eta=_check_eta(eta),
    )


def mixture(c: Coefficients, x_t: Array, log_x_0: Array) -> Array:
    """(1−η) Eq. 19 + η ancestral; linear in x_0, so that a distribution of x_0 is summed over."""
    family = per_image(1.0 - c.eta, log_x_0)
    return _log_sum(  # in one sum: the logarithm of a part that vanishes would lose its slope
        (family * per_image(c.x_t, log_x_0), one_hot(x_t, log_x_0)),
        (family * per_image(c.x_0, log_x_0), log_x_0),
        (family * per_image(c.uniform, log_x_0), _uniform(log_x_0)),
        (c.eta, ancestral(c, x_t, log_x_0)),
    )


def ancestral(c: Coefficients, x_t: Array, log_x_0: Array) -> Array:
    """q(x_t|x_s) Σ_{x_0} q(x_s|x_0) f(x_0)/q(x_t|x_0)."""
    at_x_t = one_hot(x_t, log_x_0)
    ratio = log_x_0 - mix(at_x_t, *c.marginal_t)  # q(x_t|x_0) is symmetric in x_t and x_0
    total = jax.nn.logsumexp(ratio, axis=-1, keepdims=True) - math.log(log_x_0.shape[-1])
    alpha_bar_s, noise_s = c.marginal_s
    return mix(at_x_t, *c.transition) + _log_sum((alpha_bar_s, ratio), (noise_s, total))


def mix(log_x: Array, weight: Any, noise: Any) -> Array:
    """log(weight·x + noise/K 1)."""
    return _log_sum((weight, log_x), (noise, _uniform(log_x)))


def _uniform(like: Array) -> Array:
    return jnp.full_like(like, -math.log(like.shape[-1]))


def _log_sum(*terms: tuple[Any, Array]) -> Array:
    """log Σ w eᵃ over terms (w, a), with its gradient at w = 0 too; 0 where all of them vanish.

    The weights multiply outside of the logarithm, whose slope at 0 is infinite. A term of weight
    0 that outweighs the others by e⁸⁰ or more counts as e⁸⁰ in the slope.
    """
    weighted = [(per_image(w, a), a) for w, a in terms]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [jnp.log(w) + a for w, a in weighted]))
    zero = top == -jnp.inf
    top = jnp.where(zero, 0, top)
    total: Any = sum(w * jnp.exp(jnp.minimum(a - top, 80)) for w, a in weighted)
    return jnp.where(zero, -jnp.inf, top + jnp.log(jnp.where(zero, 1, total)))


def one_hot(x: Array, like: Array) -> Array:
    """log of one-hot x (...), as `like` (..., K)."""
    categories = jax.lax.broadcasted_iota(x.dtype, like.shape, like.ndim - 1)
    return jnp.where(x[..., None] == categories, 0.0, -jnp.inf).astype(like.dtype)


def log_alpha_bar(schedule: Schedule, t: Any) -> Any:
    """log ᾱ_t; a traced t outside 0..T yields NaN, never another entry."""
    if is_concrete(schedule, t):
        return np.asarray(schedule.log_alpha_bar, np.float64)[np.asarray(t)]
    table, t = as_float(schedule.log_alpha_bar), jnp.asarray(t)
    return jnp.where((t >= 0) & (t < len(table)), table[t], jnp.nan)


def signal_and_noise(log_alpha_bar: Any) -> tuple[Any, Any]:
    xp: Any = jnp if isinstance(log_alpha_bar, jax.Array) else np
    return xp.exp(log_alpha_bar), -xp.expm1(log_alpha_bar)


def as_float(x: ArrayLike) -> Array:
    return jnp.asarray(x).astype(jnp.result_type(float))


def fold_in(keys: Array, t: ArrayLike) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)


def check_num_categories(num_categories: int) -> None:
    if num_categories < 2:
        raise ValueError(f"the number of categories K must be at least 2, got {num_categories}")


def check_integers(name: str, x: Any) -> None:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {dtype}")


def check_categories(name: str, x: ArrayLike, num_categories: int) -> Array:
    check_num_categories(num_categories)
    check_integers(name, x)
    values = np.asarray(x) if is_concrete(x) else np.zeros(1, int)
    if values.size and not 0 <= values.min() <= values.max() < num_categories:
        raise ValueError(
            f"{name} must lie in 0..K-1 = 0..{num_categories - 1}, got "
            f"{values.min()}..{values.max()}"
        )
    return jnp.asarray(x)


def check_logits(logits: ArrayLike) -> Array:
    """Log-probabilities of logits, in float32 or better (a no-op on log-probabilities)."""
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be floating, got {logits.dtype}; pass log_one_hot(x_0, K) for a known x_0"
        )
    if logits.ndim == 0:
        raise ValueError("logits must be (..., K), got a scalar")
    check_num_categories(logits.shape[-1])
    half = jnp.finfo(logits.dtype).bits < 32
    return jax.nn.log_softmax(logits.astype(jnp.float32) if half else logits)


def check_state(name: str, x: ArrayLike, logits: ArrayLike) -> tuple[Array, Array]:
    log_x_0 = check_logits(logits)
    x = check_categories(name, x, log_x_0.shape[-1])
    if log_x_0.shape[:-1] != x.shape:
        raise ValueError(
            f"logits must have the shape of {name} and a last axis of K categories, got "
            f"{log_x_0.shape} for {name} of shape {x.shape}"
        )
    return x, log_x_0


def check_times(schedule: Schedule, name: str, t: ArrayLike, low: int) -> None:
    check_integers(name, t)
    T = schedule.num_steps
    if is_concrete(t) and not np.all((np.asarray(t) >= low) & (np.asarray(t) <= T)):
        raise ValueError(f"{name} must lie in {low}..T = {low}..{T}, got {t}")


def check_pair(schedule: Schedule, t: ArrayLike, s: ArrayLike) -> None:
    check_times(schedule, "t", t, 1)
    check_times(schedule, "s", s, 0)
    if is_concrete(t, s) and not np.all(np.asarray(s) < np.asarray(t)):
        raise ValueError(f"need s < t (s is the less noisy time), got t = {t} and s = {s}")


def check_lengths(length: tuple[int, ...], what: str, **values: ArrayLike | None) -> None:
    for name, value in values.items():
        if value is not None and np.shape(value) not in ((), length):
            raise ValueError(
                f"{name} must be a scalar or one value per {what}, {length}, got shape "
                f"{np.shape(value)}"
            )


def _check_eta(eta: ArrayLike) -> ArrayLike:
    if is_concrete(eta) and not np.all((np.asarray(eta) >= 0) & (np.asarray(eta) <= 1)):
        raise ValueError(f"eta must lie in [0, 1] (0 least stochastic, 1 ancestral), got {eta}")
    return eta


def _sigma_gap(sigma: ArrayLike, sigma_max: Any) -> Any:
    """σ_max − σ ≥ 0 up to float32 rounding of σ; a traced σ out of range yields NaN."""
    if is_concrete(sigma, sigma_max):
        gap = sigma_max - np.asarray(sigma, np.float64)
        if not np.all((gap >= -1e-6) & (np.asarray(sigma) >= 0)):
            raise ValueError(
                f"sigma must lie in [0, (1-alpha_bar_s)/(1-alpha_bar_t)] = [0, {sigma_max}], got "
                f"{sigma}; outside it Eq. 19 has a negative weight"
            )
        return np.clip(gap, 0, sigma_max)
    sigma, sigma_max = as_float(sigma), as_float(sigma_max)
    gap = sigma_max - sigma
    rounded = gap + jax.lax.stop_gradient(jnp.maximum(-gap, 0))  # ≥ 0, of full slope at 0 too
    return jnp.where((gap >= -1e-6) & (sigma >= 0), rounded, jnp.nan)
