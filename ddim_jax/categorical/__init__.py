"""The discrete case: categorical x_0 of K classes, in exact log-probabilities (DDIM App. A)."""

from ddim_jax.categorical.bound import cross_entropy_bound, variational_loss
from ddim_jax.categorical.kernels import (
    ancestral_posterior,
    forward_marginal,
    least_stochastic_sigma,
    log_one_hot,
    posterior,
)
from ddim_jax.categorical.sampling import initial, joint_denoiser, sample
