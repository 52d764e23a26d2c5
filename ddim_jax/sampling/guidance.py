"""Guidance: maps from denoisers to denoisers.

What these return predicts what they were given, and goes wherever a denoiser goes: `sample` with
any method, `trajectory`, `encode`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, call, is_concrete, per_image, root, wide
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.prediction import from_x0_eps
from ddim_jax.process.predictor import Predictor, prediction_of, same_prediction, variance_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.learned import with_variance


def classifier_free(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: ArrayLike,
    *,
    interval: Array | np.ndarray | tuple[int, int] | None = None,
    rescale: ArrayLike = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6, with w there equal to w − 1 here).

    ε = ε(x, t) + w (ε(x, t | y) − ε(x, t)): w = 0 is unconditional, w = 1 conditional, w > 1 guided

    Holds for ε-, x_0- and v-predictions alike, as the weights sum to one. With one network that
    takes labels, `classifier_free_labels` makes one call of twice the batch instead of two calls.

    Args:
      conditional: ε(x, t | y).
      unconditional: ε(x, t).
      scale: w, a finite scalar or (B,), may be traced.
      interval: (lo, hi) in t of 1..T, may be traced: guide where lo ≤ t ≤ hi only, and elsewhere
        take w = 1 (Kynkäänniemi et al. 2024, whose σ is √((1 − ᾱ_t)/ᾱ_t)). Both are called
        all the same: a scan has one body, and a branch there would compile the network twice.
      rescale: φ in [0, 1], a scalar or (B,), may be traced: the output is given back that share of
        the contrast that guidance changed, ε ← (1 − φ + φ std ε(x, t | y)/std ε) ε with std over
        the pixels of one image (Lin et al. 2024, §3.4, where 0.7 is chosen). Of the output itself:
        networks of ε, x_0 and v are rescaled differently. 0 is none.

    Returns:
      A `Denoiser`.

    Raises:
      ValueError: scale, interval or rescale is out of range, or the two predict different things.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> guided = ddim.classifier_free(lambda x, t: 2 * x, lambda x, t: x, scale=3.0)
      >>> guided(jnp.ones((1, 2)), jnp.array([500])).tolist()
      [[4.0, 4.0]]
    """
    weight, contrast = _scale_at(scale, interval), _rescaled(rescale)

    def denoise(x: Array, t: Array) -> Array:
        uncond, cond = call(unconditional, x, t), call(conditional, x, t)
        return contrast(uncond + weight(x, t) * (cond - uncond), cond)

    return Predictor(denoise, same_prediction(conditional, unconditional))


def classifier_free_labels(
    apply_fn: Callable[[Array, Array, Array], Array],
    labels: Array,
    null_label: ArrayLike,
    scale: ArrayLike,
    *,
    interval: Array | np.ndarray | tuple[int, int] | None = None,
    rescale: ArrayLike = 0.0,
) -> Denoiser:
    """`classifier_free` for one network that takes labels, in one call of twice the batch.

    ε = ε(x, t, ∅) + w (ε(x, t, y) − ε(x, t, ∅)): w = 1 is conditional (Ho & Salimans 2022, Eq. 6)

    Args:
      apply_fn: (x (2B, ...), t (2B,), labels (2B, ...)) → (2B, ...).
      labels: (B, ...) class numbers or embeddings y, one for each image.
      null_label: ∅, what the network was given in place of a label; broadcast to `labels`.
      scale: w, a finite scalar or (B,), may be traced.
      interval, rescale: as in `classifier_free`.

    Returns:
      A `Denoiser` for batches of B images.

    Raises:
      ValueError: scale, interval or rescale is out of range, ∅ does not fit the labels, or their
        number is not that of the images.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> network = lambda x, t, y: y[:, None] * x
      >>> guided = ddim.classifier_free_labels(network, jnp.array([2.0, 3.0]), 1.0, scale=3.0)
      >>> guided(jnp.ones((2, 1)), jnp.array([500, 500])).tolist()
      [[4.0], [7.0]]
    """
    weight, contrast = _scale_at(scale, interval), _rescaled(rescale)
    labels = jnp.asarray(labels)
    null = jnp.broadcast_to(jnp.asarray(null_label).astype(labels.dtype), labels.shape)
    both_labels = jnp.concatenate([labels, null])

    def denoise(x: Array, t: Array) -> Array:
        if labels.shape[:1] != x.shape[:1]:
            raise ValueError(f"got labels for {labels.shape[0]} images and {x.shape[0]} images")
        twice = call(
            lambda x, t: apply_fn(x, t, both_labels),
            jnp.concatenate([x, x]),
            jnp.concatenate([t, t]),
        )
        cond, uncond = jnp.split(twice, 2)
        return contrast(uncond + weight(x, t) * (cond - uncond), cond)

    return Predictor(denoise, prediction_of(apply_fn))


def autoguidance(
    denoise: Denoiser,
    weak: Denoiser,
    scale: ArrayLike,
    *,
    interval: tuple[int, int] | None = None,
) -> Denoiser:
    """Guidance of a network by a bad version of itself (Karras et al. 2024, Eq. 3).

    ε = ε_weak(x, t) + w (ε(x, t) − ε_weak(x, t)): w = 0 is the weak one, w = 1 none, w > 1 guided

    Of the same condition, if any, but smaller or less trained: where the two differ the weak one is
    worse in the direction in which the other is wrong too, so that one goes beyond it. Unlike
    `classifier_free`, whose formula it is, it does not move towards a class.

    Args:
      denoise: the network.
      weak: the weaker one, which predicts the same.
      scale, interval: as in `classifier_free`.

    Returns:
      A `Denoiser`.

    Raises:
      ValueError: scale or interval is out of range, or the two predict different things.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule, means = ddim.linear_schedule(1000), jnp.array([[-1.0], [1.0]])
      >>> good, bad = (ddim.oracle.mixture(schedule, means, variance=v) for v in (0.09, 0.36))
      >>> x_T, tau = ddim.initial_noise(jax.random.key(0), 500, (1,)), ddim.timesteps(1000, 20)
      >>> for w in (0.0, 1.0, 2.0):
      ...     x_0 = ddim.sample(ddim.autoguidance(good, bad, w), x_T, schedule, tau)
      ...     print(w, f"{jnp.std(jnp.abs(x_0)):.1f}")  # both modes become narrower
      0.0 0.5
      1.0 0.3
      2.0 0.1
    """
    return classifier_free(denoise, weak, scale, interval=interval)


def classifier(
    denoise: Denoiser,
    log_prob_fn: Callable[[Array, Array], Array],
    schedule: Schedule,
    scale: ArrayLike = 1.0,
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, Algorithm 2).

    ε̂ = ε(x, t) − w √(1 − ᾱ_t) ∇_x log p(y | x_t)

    At w = 1 with exact parts this is the exact denoiser of p(x_0 | y). In terms of the other
    predictions it is x̂_0 + w (1 − ᾱ_t)/√ᾱ_t ∇, v − w √((1 − ᾱ_t)/ᾱ_t) ∇, and F of "edm" with
    that change of x̂_0. A learned variance stays as it is.

    Args:
      denoise: the unconditional denoiser.
      log_prob_fn: (x (B, ...), t (B,)) → (B,) log p(y | x_t), differentiable; image i's value may
        depend on image i alone.
      schedule: the noise schedule.
      scale: w, a finite scalar or (B,), may be traced.

    Returns:
      A `Denoiser`.

    Raises:
      ValueError: scale is not finite, or log_prob_fn does not return one value per image.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> log_prob = lambda x, t: -((x - 1) ** 2).sum(axis=1) / 2
      >>> guided = ddim.classifier(lambda x, t: 0 * x, log_prob, schedule)
      >>> round(guided(jnp.zeros((1, 1)), jnp.array([2])).item(), 4)
      -0.8
    """
    prediction = prediction_of(denoise)
    weight = _scale_at(scale, None)

    def total(x: Array, t: Array) -> Array:
        log_prob = log_prob_fn(x, t)
        if jnp.shape(log_prob) != x.shape[:1]:
            raise ValueError(
                f"log_prob_fn must return one log-probability per image, {x.shape[:1]}, got shape "
                f"{jnp.shape(log_prob)}"
            )
        return log_prob.sum()

    def shift(x: Array, t: Array) -> Array:
        c = coefficients(schedule, t, t * 0)
        a, b = per_image(c.sqrt_alpha_bar_t, x), per_image(c.sqrt_one_minus_alpha_bar_t, x)
        step = -b * weight(x, t) * jax.grad(total)(x, t)
        # ε moves by `step` at a fixed x_t, so x̂_0 by −√(1 − ᾱ_t)/√ᾱ_t of it; the output is linear.
        return from_x0_eps(c, -b / a * step, step, prediction)

    def guided(x: Array, t: Array) -> Array:
        return call(denoise, x, t) + shift(x, t)

    def with_its_variance(x: Array, t: Array) -> tuple[Array, Array]:
        output, v = with_variance(denoise)(x, t)
        return output + shift(x, t), v

    learned = variance_of(denoise) is not None
    return Predictor(guided, prediction, with_its_variance if learned else None)


def _scale_at(
    scale: ArrayLike, interval: Array | np.ndarray | tuple[int, int] | None
) -> Callable[[Array, Array], Array]:
    """(x, t) → w, shaped to multiply x, and 1 outside the interval."""
    if is_concrete(scale) and not np.isfinite(np.asarray(scale)).all():
        raise ValueError(f"scale must be finite, got {scale}")
    if jnp.ndim(scale) > 1:
        raise ValueError(f"scale must be a scalar or (B,), got shape {jnp.shape(scale)}")
    if interval is not None and is_concrete(interval):
        ends = np.asarray(interval)
        whole = ends.shape == (2,) and np.issubdtype(ends.dtype, np.number)
        if not (whole and (ends == np.floor(ends)).all() and ends[0] <= ends[1]):
            raise ValueError(
                "interval must be (lo, hi) with lo <= hi, whole t of 1..T (parts of T times T), "
                f"got {interval}"
            )

    def weight(x: Array, t: Array) -> Array:
        if jnp.shape(scale) not in ((), x.shape[:1]):
            raise ValueError(f"scale is for {jnp.shape(scale)} images, x has {x.shape[:1]}")
        w = jnp.broadcast_to(jnp.asarray(scale).astype(x.dtype), x.shape[:1])
        if interval is not None:
            low, high = jnp.asarray(interval).astype(t.dtype)
            w = jnp.where((low <= t) & (t <= high), w, 1)
        return per_image(w, x)

    return weight


def _rescaled(rescale: ArrayLike) -> Callable[[Array, Array], Array]:
    """(guided, conditional) → guided, with its share of the conditional's contrast."""
    if is_concrete(rescale):
        phi = np.asarray(rescale)
        if not ((phi >= 0) & (phi <= 1)).all():
            raise ValueError(f"rescale must be in [0, 1], got {rescale}")
        if not phi.any():
            return lambda guided, cond: guided
    if jnp.ndim(rescale) > 1:
        raise ValueError(f"rescale must be a scalar or (B,), got shape {jnp.shape(rescale)}")

    def contrast(guided: Array, cond: Array) -> Array:
        if jnp.shape(rescale) not in ((), guided.shape[:1]):
            raise ValueError(f"rescale is for {jnp.shape(rescale)} images, x has {len(guided)}")
        std, wanted = (root(wide(v).reshape(len(v), -1).var(axis=1)) for v in (guided, cond))
        ratio = jnp.where(std > 0, wanted / jnp.where(std > 0, std, 1), 1)
        phi = jnp.asarray(rescale).astype(ratio.dtype)
        return per_image(1 - phi + phi * ratio, guided) * guided

    return contrast
