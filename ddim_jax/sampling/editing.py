"""Editing: in-painting as a map of denoisers, and starts from a partly noised image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, check_batch, image_keys, is_concrete
from ddim_jax.process.gaussian import forward_marginal
from ddim_jax.process.predictor import Predictor, prediction_of, variance_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps
from ddim_jax.sampling.plan import step_noise


def inpaint(
    denoise: Denoiser, known: Array, mask: Array, schedule: Schedule, key: Array | None = None
) -> Denoiser:
    """The denoiser of the unknown region given the known one (Song et al. 2021, App. I.2).

    x_t ← m ⊙ (√ᾱ_t k + √(1 − ᾱ_t) z_t) + (1 − m) ⊙ x_t for the network, and x̂_0 ← k where m = 1

    Any sampler and method takes the result. Exact: the known pixels of x_0 are `known`, bit for
    bit. The known region of x_t that the network sees has the marginal q(x_t | k) of Eq. 4.
    Approximate: the unknown region, because the network's guess for it does not look ahead to how
    the known region will be denoised (Lugmayr et al. 2022). For two Gaussian pixels of correlation
    0.9 and k = 2 the exact mean of the other is 1.8; long τ give 1.25 at η = 1 and 0.89 at η = 0.
    Prefer η = 1, and see `classifier` for conditioning that is exact where log p(y | x_t) is.

    Args:
      denoise: the network, with what it predicts; its x0_fn is applied before k is put in.
      known: k, (B, ...) the known images; what they hold where m = 0 is not used.
      mask: m, bool, True where known; of the shape of `known` or one that broadcasts to it.
      schedule: the noise schedule.
      key: a JAX random key, or one for each image: a new z_t is drawn for every t, which depends on
        (key, image, t) alone, and is not the noise that a sampler draws from the same key. None:
        the known region keeps the z of x_T and moves by the sampler's step itself, with k in the
        place of x̂_0 (Eq. 7 exactly).

    Returns:
      A `Denoiser` for batches of B images.

    Raises:
      TypeError: known is not floating, or mask is not bool.
      ValueError: shapes do not agree, or known is not finite where m = 1.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule, tau = ddim.linear_schedule(1000), ddim.timesteps(1000, 100)
      >>> denoise = ddim.oracle.gaussian(schedule, 0.0, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
      >>> key, known, mask = jax.random.key(0), jnp.full((500, 2), 2.0), jnp.array([[True, False]])
      >>> given = ddim.inpaint(denoise, known, mask, schedule, key)
      >>> x_T = ddim.initial_noise(key, 500, (2,))
      >>> x_0 = ddim.sample(given, x_T, schedule, tau, 1.0, jax.random.key(1))
      >>> bool((x_0[:, 0] == 2).all()), bool(x_0[:, 1].mean() > 1.2)
      (True, True)
    """
    known, mask = check_batch(known), jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, True where known, got {mask.dtype}")
    if np.broadcast_shapes(mask.shape, known.shape) != known.shape:
        raise ValueError(f"mask must broadcast to known, {known.shape}, got shape {mask.shape}")
    mask = jnp.broadcast_to(mask, known.shape)
    known = jnp.where(mask, known, 0)
    if is_concrete(known) and not np.isfinite(np.asarray(known)).all():
        raise ValueError("known must be finite where mask is True")
    keys = None
    if key is not None:  # samplers fold in t >= 1
        keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(key, known.shape[0]), 0)
    prediction = prediction_of(denoise)

    def replace(x_0: Array) -> Array:
        if x_0.shape != known.shape:
            raise ValueError(f"known is for images {known.shape}, the sampler's are {x_0.shape}")
        x_0 = x_0 if prediction.x0_fn is None else prediction.x0_fn(x_0)
        return jnp.where(mask, known.astype(x_0.dtype), x_0)

    def given(function: Any, x: Array, t: Array) -> Any:
        if keys is None:
            return function(x, t)
        k = known.astype(x.dtype)
        noisy = forward_marginal(schedule, k, t, step_noise(keys, t[0], k))
        return function(jnp.where(mask, noisy, x), t)

    both = variance_of(denoise)
    return Predictor(
        partial(given, denoise),
        dataclasses.replace(prediction, x0_fn=replace, rederive_eps=True),
        None if both is None else partial(given, both),
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


def _nearest(tau: np.ndarray, t: int) -> int:
    return int(tau[np.abs(tau - t).argmin()])
