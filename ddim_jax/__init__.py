"""ddim_jax: Denoising Diffusion Implicit Models (Song, Meng & Ermon, ICLR 2021) in JAX."""

from ddim_jax import categorical, oracle
from ddim_jax._types import Denoiser
from ddim_jax.clipping import clip_x0, dynamic_threshold
from ddim_jax.guidance import (
    classifier,
    classifier_free,
    classifier_free_labels,
    inpaint,
    start_from,
)
from ddim_jax.inversion import Inversion, encode, invert, reconstruct, reconstruction_error
from ddim_jax.latents import SameLatent, same_latent, slerp, spherical_grid
from ddim_jax.multistep import multistep_sample, pf_euler_sample
from ddim_jax.objective import loss
from ddim_jax.pretrained import Model, load_model, save_diffusers, save_model
from ddim_jax.process import (
    Coefficients,
    coefficients,
    ddim_sigma,
    ddim_step,
    forward_marginal,
    from_x0_eps,
    posterior,
    sigma_hat,
    step,
    to_x0_eps,
)
from ddim_jax.sampling import (
    Trajectory,
    initial_noise,
    make_sampler,
    sample,
    trajectory,
)
from ddim_jax.schedule import (
    Schedule,
    ScheduleConfig,
    cosine_schedule,
    linear_schedule,
    rescale_zero_terminal_snr,
    scaled_linear_schedule,
    schedule_from_alpha_bar,
    schedule_from_betas,
)
from ddim_jax.tau_search import StepErrors, optimise_timesteps, refine_timesteps, step_errors
from ddim_jax.timesteps import as_timesteps, timesteps
from ddim_jax.torch_files import load_torch

__version__ = "0.1.0"
