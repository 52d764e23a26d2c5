"""`sample` by the methods of `adams_bashforth`, in one word."""

from __future__ import annotations

from collections.abc import Sequence

from ddim_jax.arrays import Array, ArrayLike, Denoiser
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.adams_bashforth import adams_bashforth, pf_euler
from ddim_jax.sampling.sampler import sample


def multistep_sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    order: int = 2,
    *,
    variable: str = "angle",
) -> Array:
    """`sample(..., method=adams_bashforth(order, variable=variable))`.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> denoise, schedule = (lambda x, t: x / 2), ddim.linear_schedule(1000)
      >>> ddim.multistep_sample(denoise, jnp.ones((4, 2)), schedule, [10, 500, 1000]).shape
      (4, 2)
    """
    method = adams_bashforth(order, variable=variable)
    return sample(denoise, x_T, schedule, tau, method=method)


def pf_euler_sample(
    denoise: Denoiser, x_T: Array, schedule: Schedule, tau: ArrayLike | Sequence[int]
) -> Array:
    """`sample(..., method=pf_euler())` (DDIM Eq. 15).

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> denoise, schedule = (lambda x, t: x / 2), ddim.linear_schedule(1000)
      >>> ddim.pf_euler_sample(denoise, jnp.ones((4, 2)), schedule, [10, 500, 1000]).shape
      (4, 2)
    """
    return sample(denoise, x_T, schedule, tau, method=pf_euler())
