"""Sampling: methods as tables, the scan that runs them, and all that is built on it."""

from ddim_jax.sampling.adams_bashforth import adams_bashforth, pf_euler
from ddim_jax.sampling.bound import Bound, variational_bound
from ddim_jax.sampling.clipping import clip_x0, dynamic_threshold
from ddim_jax.sampling.density import Density, dequantise, ode_density
from ddim_jax.sampling.dpm_solver import dpm_solver
from ddim_jax.sampling.editing import inpaint, start_from
from ddim_jax.sampling.encoding import encode, encoder, reconstruct, reconstruction_error
from ddim_jax.sampling.guidance import (
    autoguidance,
    classifier,
    classifier_free,
    classifier_free_labels,
)
from ddim_jax.sampling.inversion import Inversion, invert
from ddim_jax.sampling.latents import SameLatent, same_latent, slerp, spherical_grid
from ddim_jax.sampling.methods import METHODS, ddim, ddpm, find_method
from ddim_jax.sampling.multistep import multistep_sample, pf_euler_sample
from ddim_jax.sampling.parallel import ParallelSample, parallel_sample
from ddim_jax.sampling.plan import Method, Plan
from ddim_jax.sampling.sampler import (
    Network,
    Trajectory,
    initial_noise,
    make_sampler,
    sample,
    trajectory,
    watch,
)
from ddim_jax.sampling.stochastic_encoding import (
    StochasticCode,
    decode_stochastic,
    encode_stochastic,
)
from ddim_jax.sampling.tau_search import (
    StepErrors,
    optimise_timesteps,
    refine_timesteps,
    step_errors,
)
from ddim_jax.sampling.unipc import unipc
