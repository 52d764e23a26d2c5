"""The discrete case: categorical x_0 of K classes, in exact log-probabilities (DDIM App. A)."""

from ddim_jax.categorical.chain import (
    ancestral_posterior,
    cross_entropy_bound,
    forward_marginal,
    initial,
    joint_denoiser,
    least_stochastic_sigma,
    log_one_hot,
    posterior,
    sample,
    variational_loss,
)
