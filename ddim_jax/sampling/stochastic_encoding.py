"""The chain with noise made to return a given image: its z instead of its x_T alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddim_jax.arrays import (
    Array,
    ArrayLike,
    Denoiser,
    call,
    check_batch,
    image_keys,
    wide,
)
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.stepping import towards
from ddim_jax.sampling.plan import Method, Plan, rows, step_noise
from ddim_jax.sampling.sampler import plan_of, sample


class StochasticCode(NamedTuple):
    """An image as the noise of the chain that ends in it."""

    x_T: Array  # (B, ...) where the chain starts, from q(x_T | x_0)
    noise: Array  # (S, B, ...) float32 at least, z of each step in the order of sampling
    residual: Array  # (B, ...) float32 at least, x_0 less the chain's own end: what σ = 0 leaves


def encode_stochastic(
    denoise: Denoiser,
    x_0: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    method: Method | None = None,
) -> StochasticCode:
    """The z with which the chain of η > 0 returns x_0 (Huberman-Spiegelglas et al. 2024, Alg. 1).

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) n_t for each t of τ, the n_t independent of each other, and
    z = (x_s − √ᾱ_s x̂_0 − √(1 − ᾱ_s − σ²) ε)/σ, which is Eq. 12 solved for z

    The x_t are drawn apart from each other and not along the chain, so that neighbours differ more
    than the chain's own: z has a variance above 1 and holds more of the image. Decoded by another
    denoiser (another label, another guidance) it keeps more of it than a chain with other noise.
    Each step's mean is taken where the chain really is, so that rounding does not add up; where
    σ = 0 the chain goes its own way, and z of the next step brings it back.

    The last step has σ = 0, whatever η is: there is no z that makes it end in x_0. What is missing,
    x_0 − x̂_0(x_τ₁), is kept as `residual` and added at the end. It is of the size √(1 − ᾱ_τ₁), the
    detail that the network cannot see at τ₁, and small where τ₁ is. `ddpm("large",
    final_noise=True)` has noise there, and a residual of rounding alone.

    Args:
      denoise, x_0, schedule, tau: as in `encode`.
      eta: η > 0 of Eq. 16, as in `sample`.
      key: a JAX random key, or one for each image. Image k's code depends on (key, k) alone.
      method: in place of η: `ddpm("large")`, or another with noise and without a memory.

    Returns:
      A `StochasticCode`, for `decode_stochastic`; S + 2 images in memory for each.

    Raises:
      TypeError: x_0 is not floating.
      ValueError: as `sample`; the method adds no noise, or has a memory.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule, tau = ddim.linear_schedule(1000), ddim.timesteps(1000, 10)
      >>> left, right = (ddim.oracle.gaussian(schedule, jnp.array([m, 0.0]), 0.1) for m in (-1, 1))
      >>> x_0 = jnp.array([[-1.2, 0.3], [-0.9, -0.4]])
      >>> code = ddim.encode_stochastic(left, x_0, schedule, tau, 1.0, jax.random.key(0))
      >>> bool(jnp.allclose(ddim.decode_stochastic(left, code, schedule, tau, 1.0), x_0, atol=1e-5))
      True
      >>> ddim.decode_stochastic(right, code, schedule, tau, 1.0).round(1).tolist()  # moved by 2
      [[0.8..., 0.3...], [1.1..., -0.4...]]
    """
    x_0 = check_batch(x_0)
    plan = plan_of(method, eta, schedule, tau)
    if plan.steps.sigma is None:
        raise ValueError(
            f"this code is of noise, and eta = {eta} adds none; take eta > 0 or `invert`"
        )
    if plan.weights is not None or plan.told is not None or plan.learned is not None:
        raise ValueError(
            "encode_stochastic knows no methods with a memory or a learned variance; use `ddim` or "
            "`ddpm`"
        )
    if key is None:
        raise ValueError("encode_stochastic draws x_t and needs key=jax.random.key(...)")
    prediction, goal = prediction_of(denoise), wide(x_0)
    prediction.check(plan.steps)
    keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(key, len(x_0)), 0)  # samplers: t >= 1
    table = rows(plan, goal.dtype)
    a_t, b_t = table.steps[:2]
    b_s, after = (jnp.append(jnp.asarray(v)[1:], 0) for v in (b_t, table.t))

    def draw(t: Any, a: Any, b: Any) -> Array:
        return a * goal + b * step_noise(keys, t, goal)

    def body(x_t: Array, row: tuple[Plan, Array, Array]) -> tuple[Array, Array]:
        now, b, s = row
        c = now.steps
        output = call(denoise, x_t, jnp.full(x_t.shape[:1], now.t), x_0.dtype)
        mean = towards(c, *prediction.x0_eps(c, x_t, output))
        noisy = c.sigma > 0
        z = (draw(s, c.sqrt_alpha_bar_s, b) - mean) / jnp.where(noisy, c.sigma, 1)
        z = jnp.where(noisy, z, 0)
        return mean + c.sigma * z, z

    first = (jnp.asarray(v)[0] for v in (table.t, a_t, b_t))
    x_T = draw(*first).astype(x_0.dtype)
    end, noise = jax.lax.scan(body, wide(x_T), (table, b_s, after))
    return StochasticCode(x_T, noise, goal - end)


def decode_stochastic(
    denoise: Denoiser,
    code: StochasticCode,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    *,
    method: Method | None = None,
) -> Array:
    """The image of a code: `sample` with its noise, and its residual (see `encode_stochastic`).

    x_0 = `sample(denoise, x_T, …, noise=z)` + residual

    Args:
      denoise: the network of the code, for the image itself; another one, for an edited image.
      code: of `encode_stochastic`.
      schedule, tau, eta, method: those of the code.

    Returns:
      (B, ...) in x_T's dtype.

    Raises:
      ValueError: as `sample`, or the code is of another S.

    Example: see `encode_stochastic`.
    """
    x_0 = sample(denoise, code.x_T, schedule, tau, eta, method=method, noise=code.noise)
    return (wide(x_0) + code.residual).astype(x_0.dtype)
