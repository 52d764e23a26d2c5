"""What a network for categories is trained on: a step's KL, and a cross-entropy above it."""

from __future__ import annotations

import jax.numpy as jnp

from ddim_jax.arrays import Array, ArrayLike, per_image
from ddim_jax.categorical import mixing as _math
from ddim_jax.process.schedule import Schedule


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
