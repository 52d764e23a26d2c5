"""The process: schedules, τ, Gaussian equations, what a network predicts, objective, oracles."""

from ddim_jax.process import oracle
from ddim_jax.process.distillation import (
    distillation_loss,
    distillation_target,
    halve_timesteps,
)
from ddim_jax.process.gamma import GAMMAS, Gamma, find_gamma
from ddim_jax.process.gaussian import (
    Coefficients,
    coefficients,
    ddim_sigma,
    forward_marginal,
    posterior,
    sigma_hat,
)
from ddim_jax.process.objective import loss
from ddim_jax.process.prediction import PREDICTIONS, Prediction, from_x0_eps, to_x0_eps
from ddim_jax.process.predictor import predicts
from ddim_jax.process.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    rescale_zero_terminal_snr,
    scaled_linear_schedule,
    schedule_from_alpha_bar,
    schedule_from_betas,
)
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.process.spacing import as_timesteps, timesteps
from ddim_jax.process.stepping import ddim_step, step
