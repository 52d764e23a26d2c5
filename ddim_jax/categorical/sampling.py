"""Drawing categories: x_T, the walk down τ, and an exact denoiser to check it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, image_keys, is_concrete
from ddim_jax.categorical import mixing as _math
from ddim_jax.categorical.kernels import forward_marginal, log_one_hot
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps


def initial(key: Array, indices: ArrayLike, shape: Sequence[int], num_categories: int) -> Array:
    """x_T ~ Cat(1/K 1), the limit of Eq. 17 as ᾱ_T → 0; example i depends on (key, i) alone.

    Args:
      key: a JAX random key; `sample` may be given the same one.
      indices: (B,) integers ≥ 0, the examples' global numbers, or an int n for 0..n−1.
      shape: the shape of one example.
      num_categories: K ≥ 2.

    Returns:
      (B, *shape) int32 in 0..K−1.

    Raises:
      TypeError: key is no JAX key.
      ValueError: indices is no vector of integers in 0..2³² − 1, or K < 2.

    Example:
      >>> import jax
      >>> from ddim_jax import categorical
      >>> categorical.initial(jax.random.key(0), 4, (8, 8), 3).shape
      (4, 8, 8)
    """
    _math.check_num_categories(num_categories)
    # t = 0 is no step that `sample` folds in, so that the two may share a key.
    keys = _math.fold_in(image_keys(key, indices), 0)
    # In int32 whatever JAX's default: another width would be another draw.
    draw = partial(
        jax.random.randint, shape=tuple(shape), minval=0, maxval=num_categories, dtype=jnp.int32
    )
    return jax.vmap(draw)(keys)


def sample(
    denoise: Callable[[Array, Array], Array],
    x_T: ArrayLike,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    indices: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
) -> Array:
    """Walk x_T down τ to x_0 by x_s ~ p_θ(x_s|x_t) = Σ_{x_0} q(x_s|x_t,x_0) f_θ(x_0|x_t) (Eq. 20).

    One `lax.scan`; η, σ, τ's values and the weights in `denoise` may be traced. Even η = 0 is
    random (an entry changes by jumping to a draw of x̂_0); the last step, to s = 0, draws from f_θ.

    Args:
      denoise: (x_t (B, ...) int32, t (B,) int32 in 1..T) → (B, ..., K) logits of x_0.
      x_T: (B, ...) integers in 0..K−1, from `initial`.
      schedule: ᾱ₀..ᾱ_T.
      tau: (S,) strictly increasing in 1..T.
      eta: η in [0, 1], () or (S,) along τ: 0 least stochastic, 1 ancestral.
      key: a JAX random key; example i draws x_s with fold_in(fold_in(key, indices[i]), t).
      indices: (B,) the examples' global numbers; 0..B−1 by default.
      sigma: σ of Eq. 19, () or (S,) along τ, 0 for the step to s = 0; `least_stochastic_sigma` by
        default.

    Returns:
      x_0 (B, ...) int32; −1 where a step's probabilities were NaN.

    Raises:
      TypeError: x_T does not hold integers, key is no JAX key, or denoise does not return floats.
      ValueError: a value is out of range, the key is missing, or shapes do not fit.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> schedule, key = ddim.linear_schedule(1000), jax.random.key(0)
      >>> denoise = categorical.joint_denoiser(schedule, jnp.array([0.7, 0.2, 0.1]))
      >>> x_T = categorical.initial(key, 1000, (1,), 3)
      >>> x_0 = categorical.sample(denoise, x_T, schedule, ddim.timesteps(1000, 10), key=key)
      >>> bool(abs((x_0 == 0).mean() - 0.7) < 0.05)
      True
    """
    if np.ndim(x_T) == 0:
        raise ValueError("x_T must have a batch axis (B, ...), got a scalar; pass x_T[None]")
    if key is None:
        raise ValueError("sampling categories is random at every eta: pass key=jax.random.key(...)")
    batch = np.shape(x_T)[:1]
    keys = image_keys(key, batch[0] if indices is None else indices)
    if keys.shape != batch:
        raise ValueError(f"indices must number the {batch[0]} examples, got shape {keys.shape}")
    xp: Any = np if is_concrete(tau) else jnp
    t: Any = as_timesteps(np.asarray(tau), schedule.num_steps) if is_concrete(tau) else tau
    if np.ndim(t) != 1 or not jnp.issubdtype(t.dtype, jnp.integer):
        raise ValueError(f"tau must be an int vector (S,), got {t.dtype}{t.shape}")
    _math.check_lengths(t.shape, "element of tau", eta=eta, sigma=sigma)
    c = _math.coefficients(schedule, t, xp.concatenate([xp.zeros_like(t[:1]), t[:-1]]), eta, sigma)
    c = jax.tree.map(lambda v: jnp.broadcast_to(_math.as_float(v), t.shape), c)

    def step(x_t: Array, inputs: tuple[Array, _math.Coefficients]) -> tuple[Array, None]:
        t, c = inputs
        _, log_f = _math.check_state("x_t", x_t, denoise(x_t, jnp.full(batch, t, jnp.int32)))
        _math.check_categories("x_T", x_T, log_f.shape[-1])
        log_p = _math.mixture(c, x_t, log_f)
        x_s = jax.vmap(jax.random.categorical)(_math.fold_in(keys, t), log_p).astype(jnp.int32)
        return jnp.where((x_t < 0) | jnp.isnan(log_p).any(axis=-1), -1, x_s), None

    return jax.lax.scan(
        step, jnp.asarray(x_T).astype(jnp.int32), (jnp.asarray(t), c), reverse=True
    )[0]


def joint_denoiser(schedule: Schedule, probs: ArrayLike) -> Callable[[Array, ArrayLike], Array]:
    """The exact f(x_t, t)_i = p(x_0,i|x_t) of d variables with a known joint distribution.

    Bayes' rule over all K^d states, p(x_0|x_t) ∝ p(x_0) Π_i q(x_t,i|x_0,i) (Eq. 17): the optimum
    of `variational_loss`, which checks samplers with no training.

    Args:
      schedule: ᾱ₀..ᾱ_T.
      probs: (K,)*d joint probabilities of x_0; small, K^d numbers are kept for every example.
        The logarithm has no slope at 0: where one is 0, gradients by probs are NaN.

    Returns:
      denoise(x_t (B, d), t () or (B,)) → (B, d, K) log-probabilities.

    Raises:
      ValueError: probs is not (K,)*d with K ≥ 2, is negative, or does not add to 1.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> twins = categorical.joint_denoiser(ddim.linear_schedule(1000), jnp.eye(2) / 2)
      >>> jnp.exp(twins(jnp.array([[0, 0]]), 1)).round(3).tolist()
      [[[1.0, 0.0], [1.0, 0.0]]]
    """
    shape = np.shape(probs)
    if not shape or len(set(shape)) != 1 or shape[0] < 2:
        raise ValueError(f"probs must have shape (K,)*d with K >= 2 and d >= 1, got {shape}")
    if is_concrete(probs):
        low, total = np.min(probs), np.sum(probs)
        if not (low >= 0 and abs(total - 1) < 1e-5):
            raise ValueError(
                f"probs must be >= 0 and add to 1, got minimum {low} and sum {total}; "
                "pass probs / probs.sum()"
            )
    p = _math.as_float(probs)
    K, d = p.shape[0], p.ndim

    def denoise(x_t: Array, t: ArrayLike) -> Array:
        if np.shape(x_t)[1:] != (d,):
            raise ValueError(f"x_t must be (B, {d}), a column per variable, got {np.shape(x_t)}")
        log_q = forward_marginal(schedule, log_one_hot(x_t, K), t)  # symmetric in x_t and x_0
        log_joint = jnp.log(p)[None]
        for i in range(d):
            others = tuple(1 + j for j in range(d) if j != i)
            log_joint = log_joint + jnp.expand_dims(log_q[:, i], others)
        marginals = [
            jax.nn.logsumexp(log_joint, axis=tuple(1 + j for j in range(d) if j != i))
            for i in range(d)
        ]
        return jax.nn.log_softmax(jnp.stack(marginals, axis=1))

    return denoise
