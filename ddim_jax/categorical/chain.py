"""Discrete DDIM: the multinomial process of the paper's Appendix A, in exact log-probabilities.

A state holds categories 0..K−1, in an array of any shape. Every entry is noised on its own,
q(x_t|x_0) = Cat(ᾱ_t x_0 + (1−ᾱ_t)/K 1) with x_0 one-hot, and for any s < t the family

    q_σ(x_s|x_t,x_0) = Cat(σ x_t + (ᾱ_s − σᾱ_t) x_0 + ((1−ᾱ_s) − (1−ᾱ_t)σ)/K 1)      (Eq. 19)

keeps those marginals for every σ. The three weights add to 1 and are a mixture (keep x_t, jump to
x_0, draw uniformly) for 0 ≤ σ ≤ (1−ᾱ_s)/(1−ᾱ_t). The upper end never draws uniformly: least
stochastic, the discrete DDIM. The lower end forgets x_t: x_s ~ q(x_s|x_0) afresh.

**The ancestral kernel is not a member of this family for K ≥ 3.** The marginals of x_0 = 0..K−1
are linearly independent, so exactly one Markov chain has them, q(x_t|x_s) = Cat(a x_s + (1−a)/K 1)
with a = ᾱ_t/ᾱ_s, and its Bayes posterior weighs x_t differently where x_t = x_0
(`ancestral_posterior`). Only for K = 2 are the two one: σ = a(1−ᾱ_s²)/(1−ᾱ_t²). Marginals are
linear in the posterior, so the mixture (1−η) q_σ + η q_ancestral keeps them too; that is the knob
`eta`: 0 is the discrete DDIM, 1 the ancestral sampler (multinomial diffusion, uniform D3PM).

The reverse kernel p_θ(x_s|x_t) = Σ_{x_0} q(x_s|x_t,x_0) f_θ(x_0|x_t) is summed exactly, entry by
entry. Hence with the true f(x_t,t) = p(x_0|x_t): a single variable, or several independent ones,
have exactly the marginals of q at every step, whatever τ, η and σ, and the samples the
distribution of the data (up to ᾱ_T(1−1/K) per variable in total variation, since x_T is drawn
uniformly). For dependent variables the product over entries is an approximation whose error
vanishes in proportion to the step size, at every η, with the default σ; at σ = 0, η < 1 it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, is_concrete, per_image
from ddim_jax.categorical import mixing as _math
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps


def log_one_hot(x: ArrayLike, num_categories: int) -> Array:
    """Log-probabilities of a known state: 0 at its category, −inf elsewhere.

    Args:
      x: (...) integers in 0..K−1.
      num_categories: K ≥ 2.

    Returns:
      (..., K) float.

    Raises:
      TypeError: x does not hold integers.
      ValueError: a category is not in 0..K−1, or K < 2.

    Example:
      >>> from ddim_jax import categorical
      >>> categorical.log_one_hot(1, 3).tolist()
      [-inf, 0.0, -inf]
    """
    x = _math.check_categories("x", x, num_categories)
    return _math.one_hot(x, jnp.zeros((*x.shape, num_categories)))


def forward_marginal(schedule: Schedule, logits: ArrayLike, t: ArrayLike) -> Array:
    """q(x_t|x_0) = Cat(ᾱ_t x_0 + (1−ᾱ_t)/K 1) (DDIM App. A, Eq. 17).

    Args:
      schedule: ᾱ₀..ᾱ_T.
      logits: (..., K) logits of the distribution of x_0; `log_one_hot(x_0, K)` if it is known.
      t: () or (B,) in 0..T.

    Returns:
      (..., K) log-probabilities of x_t; draw with `jax.random.categorical`.

    Raises:
      TypeError: t does not hold integers, or logits does not hold floats.
      ValueError: t is not in 0..T, or the shapes do not fit.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> schedule = ddim.schedule_from_betas([0.4, 0.5])
      >>> log_q = categorical.forward_marginal(schedule, categorical.log_one_hot(0, 3), 1)
      >>> [round(p, 4) for p in jnp.exp(log_q).tolist()]
      [0.7333, 0.1333, 0.1333]
    """
    log_x_0 = _math.check_logits(logits)
    _math.check_times(schedule, "t", t, 0)
    _math.check_lengths(log_x_0.shape[:-1][:1], "example", t=t)
    return _math.mix(log_x_0, *_math.signal_and_noise(_math.log_alpha_bar(schedule, t)))


def least_stochastic_sigma(schedule: Schedule, t: ArrayLike, s: ArrayLike) -> np.ndarray | Array:
    """σ_max = (1−ᾱ_s)/(1−ᾱ_t), the largest σ for which Eq. 19 is a mixture (DDIM App. A).

    Args:
      schedule: ᾱ₀..ᾱ_T.
      t: () or (B,) in 1..T.
      s: () or (B,) in 0..t−1.

    Returns:
      σ_max in [0, 1), float64 on the host unless an argument is traced.

    Raises:
      TypeError: t or s does not hold integers.
      ValueError: not 0 ≤ s < t ≤ T.

    Example:
      >>> import ddim_jax as ddim
      >>> from ddim_jax import categorical
      >>> schedule = ddim.schedule_from_betas([0.5, 0.5])
      >>> round(float(categorical.least_stochastic_sigma(schedule, 2, 1)), 4)
      0.6667
    """
    _math.check_pair(schedule, t, s)
    return _math.coefficients(schedule, t, s).x_t


def posterior(
    schedule: Schedule,
    x_t: ArrayLike,
    logits: ArrayLike,
    t: ArrayLike,
    s: ArrayLike,
    eta: ArrayLike = 0.0,
    *,
    sigma: ArrayLike | None = None,
) -> Array:
    """q(x_s|x_t,x_0) = (1−η) Cat(σ x_t + (ᾱ_s−σᾱ_t) x_0 + ((1−ᾱ_s)−(1−ᾱ_t)σ)/K 1) + η ancestral.

    Eq. 19 of DDIM App. A at η = 0, `ancestral_posterior` at η = 1; every η and σ keep the
    marginals. With a network's output for `logits` this is the reverse kernel p_θ(x_s|x_t),
    Eq. 20, summed exactly over x_0.

    Args:
      schedule: ᾱ₀..ᾱ_T.
      x_t: (...) integers in 0..K−1.
      logits: (..., K) logits of the distribution of x_0; `log_one_hot(x_0, K)` if it is known.
      t: () or (B,) in 1..T.
      s: () or (B,) in 0..t−1.
      eta: η in [0, 1], () or (B,), may be traced.
      sigma: () or (B,) in [0, σ_max]; None is σ_max, `least_stochastic_sigma`.

    Returns:
      (..., K) log-probabilities of x_s.

    Raises:
      TypeError: t, s or x_t does not hold integers, or logits does not hold floats.
      ValueError: a value is out of range, or the shapes do not fit.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> schedule = ddim.schedule_from_betas([0.5, 0.5])
      >>> log_q = categorical.posterior(schedule, 2, categorical.log_one_hot(0, 3), t=2, s=1)
      >>> [round(p, 4) for p in jnp.exp(log_q).tolist()]
      [0.3333, 0.0, 0.6667]
    """
    x_t, log_x_0 = _math.check_state("x_t", x_t, logits)
    _math.check_pair(schedule, t, s)
    _math.check_lengths(x_t.shape[:1], "example", t=t, s=s, eta=eta, sigma=sigma)
    return _math.mixture(_math.coefficients(schedule, t, s, eta, sigma), x_t, log_x_0)


def ancestral_posterior(
    schedule: Schedule, x_t: ArrayLike, logits: ArrayLike, t: ArrayLike, s: ArrayLike
) -> Array:
    """q(x_s|x_t,x_0) = q(x_t|x_s) q(x_s|x_0)/q(x_t|x_0), q(x_t|x_s) = Cat(a x_s + (1−a)/K 1).

    Bayes' rule for the one Markov chain with the marginals of Eq. 17, a = ᾱ_t/ᾱ_s (Hoogeboom et
    al. 2021, §4). With a network's output for `logits` the sum over x_0 is exact, as
    in D3PM (Austin et al. 2021, §3); putting f_θ in the place of x_0 before normalising, as
    Hoogeboom et al. do, is another kernel, and leaves the data distribution even for exact f.

    Args:
      schedule, x_t, logits, t, s: as in `posterior`.

    Returns:
      (..., K) log-probabilities of x_s.

    Raises:
      TypeError, ValueError: as in `posterior`.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> schedule = ddim.schedule_from_betas([0.5, 0.5])
      >>> x_0 = categorical.log_one_hot(0, 3)
      >>> log_q = categorical.ancestral_posterior(schedule, 2, x_0, t=2, s=1)
      >>> [round(p, 4) for p in jnp.exp(log_q).tolist()]
      [0.4444, 0.1111, 0.4444]
    """
    x_t, log_x_0 = _math.check_state("x_t", x_t, logits)
    _math.check_pair(schedule, t, s)
    _math.check_lengths(x_t.shape[:1], "example", t=t, s=s)
    return _math.ancestral(_math.coefficients(schedule, t, s), x_t, log_x_0)


def variational_loss(
    schedule: Schedule,
    logits: ArrayLike,
    x_0: ArrayLike,
    x_t: ArrayLike,
    t: ArrayLike,
    s: ArrayLike,
    eta: ArrayLike = 0.0,
    *,
    sigma: ArrayLike | None = None,
) -> Array:
    """KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t)) per entry (DDIM App. A); −log f_θ(x_0|x_t) at s = 0.

    Summed over the entries and over the pairs of (0, τ₁, …, τ_S), and with
    KL(q(x_T|x_0) ‖ uniform) added, it is the negative evidence lower bound in nats.

    Args:
      schedule, t, s: as in `posterior`.
      logits: (..., K) the network's f_θ(x_t, t).
      x_0: (...) integers in 0..K−1, the data.
      x_t: (...) integers in 0..K−1, drawn from `forward_marginal`.
      eta, sigma: those of the sampler that the network is trained for.

    Returns:
      (...) nats, ≥ 0 up to rounding.

    Raises:
      TypeError, ValueError: as in `posterior`, or x_0 and x_t differ in shape.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> schedule = ddim.schedule_from_betas([0.5, 0.5])
      >>> nats = categorical.variational_loss(schedule, jnp.zeros(3), x_0=0, x_t=2, t=1, s=0)
      >>> round(float(nats), 4)  # log 3
      1.0986
    """
    x_t, log_f = _math.check_state("x_t", x_t, logits)
    x_0 = _math.check_categories("x_0", x_0, log_f.shape[-1])
    if x_0.shape != x_t.shape:
        raise ValueError(f"x_0 and x_t must have one shape, got {x_0.shape} and {x_t.shape}")
    _math.check_pair(schedule, t, s)
    _math.check_lengths(x_t.shape[:1], "example", t=t, s=s, eta=eta, sigma=sigma)
    c = _math.coefficients(schedule, t, s, eta, sigma)
    log_q, log_p = _math.mixture(c, x_t, _math.one_hot(x_0, log_f)), _math.mixture(c, x_t, log_f)
    return jnp.sum(jnp.exp(log_q) * jnp.where(log_q > -jnp.inf, log_q - log_p, 0), axis=-1)


def cross_entropy_bound(
    schedule: Schedule,
    logits: ArrayLike,
    x_0: ArrayLike,
    t: ArrayLike,
    s: ArrayLike,
    *,
    sigma: ArrayLike | None = None,
) -> Array:
    """(ᾱ_s − σᾱ_t)·(−log f_θ(x_0|x_t)), above the KL of Eq. 19 by convexity (DDIM App. A).

    Both kernels are one mixture that differs in its x_0 part alone, so the network can be trained
    as a classifier of x_0, weighted. It bounds `variational_loss` at η = 0 and equals it at s = 0.

    Args:
      schedule, logits, x_0, t, s, sigma: as in `variational_loss`.

    Returns:
      (...) nats.

    Raises:
      TypeError, ValueError: as in `variational_loss`.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> from ddim_jax import categorical
      >>> schedule = ddim.schedule_from_betas([0.5, 0.5])
      >>> round(float(categorical.cross_entropy_bound(schedule, jnp.zeros(3), 0, t=2, s=1)), 4)
      0.3662
    """
    x_0, log_f = _math.check_state("x_0", x_0, logits)
    _math.check_pair(schedule, t, s)
    _math.check_lengths(x_0.shape[:1], "example", t=t, s=s, sigma=sigma)
    weight = per_image(_math.coefficients(schedule, t, s, 0.0, sigma).x_0, log_f)
    return -(weight * jnp.take_along_axis(log_f, x_0[..., None], axis=-1))[..., 0]


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
      TypeError: indices does not hold integers.
      ValueError: indices is no vector or holds a negative number, or K < 2.

    Example:
      >>> import jax
      >>> from ddim_jax import categorical
      >>> categorical.initial(jax.random.key(0), 4, (8, 8), 3).shape
      (4, 8, 8)
    """
    _math.check_num_categories(num_categories)
    # t = 0 is no step that `sample` folds in, so that the two may share a key.
    keys = _math.fold_in(_math.example_keys(key, indices), 0)
    draw = partial(jax.random.randint, shape=tuple(shape), minval=0, maxval=num_categories)
    return jax.vmap(draw)(keys).astype(jnp.int32)


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
      TypeError: x_T or tau does not hold integers, or denoise does not return floats.
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
    keys = _math.example_keys(key, batch[0] if indices is None else indices)
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
