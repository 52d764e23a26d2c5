"""Guidance and conditioning: combinators Denoiser → Denoiser, inpainting, and partly noised starts.

What these return goes wherever a denoiser goes: `sample`, `multistep_sample`, `encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax._types import Array, ArrayLike, Denoiser, is_concrete, per_image
from ddim_jax.process import PREDICTIONS, coefficients, forward_marginal
from ddim_jax.sampling import call, check_batch, initial_noise, sample
from ddim_jax.schedule import Schedule
from ddim_jax.timesteps import as_timesteps


def classifier_free(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: ArrayLike,
    *,
    interval: tuple[int, int] | None = None,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6, with w there equal to w − 1 here).

    ε = ε(x, t) + w (ε(x, t | y) − ε(x, t)): w = 0 is unconditional, w = 1 conditional, w > 1 guided

    Holds for ε-, x_0- and v-predictions alike, as the weights sum to one. With one network that
    takes labels, `classifier_free_labels` makes one call of twice the batch instead of two calls.

    Args:
      conditional: ε(x, t | y).
      unconditional: ε(x, t).
      scale: w, a finite scalar or (B,), may be traced.
      interval: (lo, hi): guide where lo ≤ t ≤ hi only, and elsewhere take w = 1 (Kynkäänniemi
        et al. 2024). Both denoisers are called all the same.

    Returns:
      A `Denoiser`.

    Raises:
      ValueError: scale or interval is out of range.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> guided = ddim.classifier_free(lambda x, t: 2 * x, lambda x, t: x, scale=3.0)
      >>> guided(jnp.ones((1, 2)), jnp.array([500])).tolist()
      [[4.0, 4.0]]
    """
    weight = _scale_at(scale, interval)

    def denoise(x: Array, t: Array) -> Array:
        uncond = call(unconditional, x, t)
        return uncond + weight(x, t) * (call(conditional, x, t) - uncond)

    return denoise


def classifier_free_labels(
    apply_fn: Callable[[Array, Array, Array], Array],
    labels: Array,
    null_label: ArrayLike,
    scale: ArrayLike,
    *,
    interval: tuple[int, int] | None = None,
) -> Denoiser:
    """`classifier_free` for one network that takes labels, in one call of twice the batch.

    ε = ε(x, t, ∅) + w (ε(x, t, y) − ε(x, t, ∅)): w = 1 is conditional (Ho & Salimans 2022, Eq. 6)

    Args:
      apply_fn: (x (2B, ...), t (2B,), labels (2B, ...)) → (2B, ...).
      labels: (B, ...) class numbers or embeddings y, one for each image.
      null_label: ∅, what the network was given in place of a label; broadcast to `labels`.
      scale: w, a finite scalar or (B,), may be traced.
      interval: (lo, hi), as in `classifier_free`.

    Returns:
      A `Denoiser` for batches of B images.

    Raises:
      ValueError: scale or interval is out of range, ∅ does not fit the labels, or their number is
        not that of the images.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> network = lambda x, t, y: y[:, None] * x
      >>> guided = ddim.classifier_free_labels(network, jnp.array([2.0, 3.0]), 1.0, scale=3.0)
      >>> guided(jnp.ones((2, 1)), jnp.array([500, 500])).tolist()
      [[4.0], [7.0]]
    """
    weight = _scale_at(scale, interval)
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
        return uncond + weight(x, t) * (cond - uncond)

    return denoise


def classifier(
    denoise: Denoiser,
    log_prob_fn: Callable[[Array, Array], Array],
    schedule: Schedule,
    scale: ArrayLike = 1.0,
    *,
    prediction: str = "eps",
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, Algorithm 2).

    ε̂ = ε(x, t) − w √(1 − ᾱ_t) ∇_x log p(y | x_t)

    At w = 1 with exact parts this is the exact denoiser of p(x_0 | y). In terms of the other
    predictions it is x̂_0 + w (1 − ᾱ_t)/√ᾱ_t ∇ and v − w √((1 − ᾱ_t)/ᾱ_t) ∇.

    Args:
      denoise: the unconditional denoiser.
      log_prob_fn: (x (B, ...), t (B,)) → (B,) log p(y | x_t), differentiable; image i's value may
        depend on image i alone.
      schedule: the noise schedule.
      scale: w, a finite scalar or (B,), may be traced.
      prediction: what `denoise` predicts, and so does the result: `"eps"`, `"x_0"` or `"v"`.

    Returns:
      A `Denoiser`.

    Raises:
      ValueError: scale is not finite, the prediction type is unknown, or log_prob_fn does not
        return one value per image.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> log_prob = lambda x, t: -((x - 1) ** 2).sum(axis=1) / 2
      >>> guided = ddim.classifier(lambda x, t: 0 * x, log_prob, schedule)
      >>> round(guided(jnp.zeros((1, 1)), jnp.array([2])).item(), 4)
      -0.8
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction type {prediction!r}; choose one of {PREDICTIONS}")
    weight = _scale_at(scale, None)

    def total(x: Array, t: Array) -> Array:
        log_prob = log_prob_fn(x, t)
        if jnp.shape(log_prob) != x.shape[:1]:
            raise ValueError(
                f"log_prob_fn must return one log-probability per image, {x.shape[:1]}, got shape "
                f"{jnp.shape(log_prob)}"
            )
        return log_prob.sum()

    def guided(x: Array, t: Array) -> Array:
        c = coefficients(schedule, t, t * 0)
        a, b = per_image(c.sqrt_alpha_bar_t, x), per_image(c.sqrt_one_minus_alpha_bar_t, x)
        change = {"eps": -b, "x_0": b**2 / a, "v": -b / a}[prediction]
        return call(denoise, x, t) + weight(x, t) * change * jax.grad(total)(x, t)

    return guided


def inpaint(
    denoise: Denoiser,
    x_T: Array,
    known: Array,
    mask: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    fresh_noise: bool = True,
    indices: ArrayLike | None = None,
    prediction: str = "eps",
    x0_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Sample the unknown region given the known one, by replacement (Song et al. 2021, App. I.2).

    x_t ← m ⊙ (√ᾱ_t k + √(1 − ᾱ_t) z_t) + (1 − m) ⊙ x_t before each step, and x̂_0 ← k where m = 1

    Exact: the known pixels of the result are `known`, bit for bit. The known region of x_t that
    the network sees has the marginal q(x_t | k) of Eq. 4. Approximate: the unknown region, because
    the network's guess for it does not look ahead to how the known region will be denoised (Lugmayr
    et al. 2022). For two Gaussian pixels of correlation 0.9 and k = 2 the exact mean of the other
    is 1.8; long τ give 1.25 at η = 1 and 0.89 at η = 0. Prefer η = 1, and see `classifier` for
    conditioning that is exact where log p(y | x_t) is.

    Args:
      denoise, x_T, schedule, tau, eta, indices, prediction: as in `sample`.
      known: k, (B, ...) the known image; what it holds where m = 0 is not used.
      mask: m, bool, True where known; of the shape of x_T or one that broadcasts to it.
      key: a JAX random key, for z_t and for η > 0; image i's z_t depends on (key, i, t) alone.
      fresh_noise: draw a new z_t for every t. If False the known region keeps the z of x_T and
        moves by the DDIM step itself, with k in the place of x̂_0 (Eq. 7 exactly); at η = 0 no key
        is needed.
      x0_fn: applied to each x̂_0 first, as in `sample`.

    Returns:
      x_0, shape and dtype of x_T.

    Raises:
      TypeError: x_T is not floating, or mask is not bool.
      ValueError: shapes do not agree, known is not finite, a key is missing, or as `sample`.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> denoise = ddim.oracle.gaussian(schedule, 0.0, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
      >>> key = jax.random.key(0)
      >>> x_T = ddim.initial_noise(key, 500, (2,))
      >>> known, mask = jnp.full((500, 2), 2.0), jnp.array([[True, False]])
      >>> tau = ddim.timesteps(1000, 100)
      >>> x_0 = ddim.inpaint(denoise, x_T, known, mask, schedule, tau, 1.0, jax.random.key(1))
      >>> bool((x_0[:, 0] == 2).all()), bool(x_0[:, 1].mean() > 1.2)
      (True, True)
    """
    x_T = check_batch(x_T)
    if jnp.asarray(mask).dtype != bool:
        raise TypeError(f"mask must be bool, True where known, got {jnp.asarray(mask).dtype}")
    if jnp.shape(known) != x_T.shape:
        raise ValueError(f"known must have the shape of x_T, {x_T.shape}, got {jnp.shape(known)}")
    mask = jnp.broadcast_to(jnp.asarray(mask), x_T.shape)
    known = jnp.where(mask, known, 0).astype(x_T.dtype)
    if is_concrete(known) and not np.isfinite(np.asarray(known)).all():
        raise ValueError("known must be finite where mask is True")
    start, step_key = denoise, key
    if fresh_noise:
        if key is None:
            raise ValueError("fresh_noise needs key=jax.random.key(...), or pass fresh_noise=False")
        step_key, known_key = jax.random.split(key)
        numbers = x_T.shape[0] if indices is None else indices

        def start(x: Array, t: Array) -> Array:
            noise = initial_noise(
                jax.random.fold_in(known_key, t[0]), numbers, x.shape[1:], x.dtype
            )
            return denoise(jnp.where(mask, forward_marginal(schedule, known, t, noise), x), t)

    def replace(x_0: Array) -> Array:
        return jnp.where(mask, known, x_0 if x0_fn is None else x0_fn(x_0))

    return sample(
        start,
        x_T,
        schedule,
        tau,
        eta,
        step_key,
        indices=indices,
        prediction=prediction,
        x0_fn=replace,
    )


def start_from(
    schedule: Schedule, x_0: Array, tau: ArrayLike | Sequence[int], t: int, noise: Array
) -> tuple[Array, np.ndarray]:
    """A partly noised image and the rest of τ, to sample from (SDEdit, Meng et al. 2022).

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) z and τ₁ < … < τ_k = t

    Args:
      schedule: the noise schedule.
      x_0: (B, ...) the images to start from.
      tau: (S,) the whole τ.
      t: where to start, an element of τ: small keeps x_0, τ_S forgets it.
      noise: z ~ N(0, I), shape of x_0; see `initial_noise`.

    Returns:
      (x_t, τ up to t), for `sample(denoise, x_t, schedule, tau_up_to_t)`.

    Raises:
      TypeError: x_0 is not floating.
      ValueError: τ is out of range, t is not in it, or shapes do not agree.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule, x_0 = ddim.linear_schedule(1000), jnp.zeros((4, 2))
      >>> noise = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> x_t, rest = ddim.start_from(schedule, x_0, ddim.timesteps(1000, 10), 300, noise)
      >>> x_t.shape, rest.tolist()
      ((4, 2), [100, 200, 300])
    """
    if not is_concrete(tau, t):
        raise TypeError("start_from needs a concrete tau and t: the length of the result is static")
    steps = as_timesteps(np.asarray(tau), schedule.num_steps)
    if t not in steps:
        raise ValueError(
            f"t must be an element of tau, got {t}; the nearest is {_nearest(steps, t)}"
        )
    return forward_marginal(schedule, x_0, int(t), noise), steps[steps <= t]


def _scale_at(
    scale: ArrayLike, interval: tuple[int, int] | None
) -> Callable[[Array, Array], Array]:
    """(x, t) → w, shaped to multiply x, and 1 outside the interval."""
    if is_concrete(scale) and not np.isfinite(np.asarray(scale)).all():
        raise ValueError(f"scale must be finite, got {scale}")
    if jnp.ndim(scale) > 1:
        raise ValueError(f"scale must be a scalar or (B,), got shape {jnp.shape(scale)}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval must be (lo, hi) with lo <= hi, got {interval}")

    def weight(x: Array, t: Array) -> Array:
        if jnp.shape(scale) not in ((), x.shape[:1]):
            raise ValueError(f"scale is for {jnp.shape(scale)} images, x has {x.shape[:1]}")
        w = jnp.broadcast_to(jnp.asarray(scale).astype(x.dtype), x.shape[:1])
        if interval is not None:
            w = jnp.where((interval[0] <= t) & (t <= interval[1]), w, 1)
        return per_image(w, x)

    return weight


def _nearest(tau: np.ndarray, t: int) -> int:
    return int(tau[np.abs(tau - t).argmin()])
