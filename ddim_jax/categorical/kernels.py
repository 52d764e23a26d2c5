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

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike
from ddim_jax.categorical import mixing as _math
from ddim_jax.process.schedule import Schedule


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
