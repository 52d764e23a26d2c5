"""Better τ: choose the S timesteps by what their steps cost, instead of by a formula.

`step_errors` looks once at one fine trajectory per latent and tells the error of every single
step t → s of DDIM; `optimise_timesteps` finds, for any S, the τ of least total by dynamic
programming (no more network calls), which serves the other methods too; `refine_timesteps` improves
a τ on the error of the whole run of any method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, call, check_batch, root, wide
from ddim_jax.process.gaussian import Coefficients, coefficients
from ddim_jax.process.prediction import to_x0_eps
from ddim_jax.process.predictor import Predictor, prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps, timesteps
from ddim_jax.sampling.sampler import trajectory


class StepErrors(NamedTuple):
    """What every single step between candidate timesteps costs; see `step_errors`."""

    t: ArrayLike  # (G,) int32, the candidates, increasing
    error: ArrayLike  # (G, G+1) of the step t[i] → s, s = 0, t[0], …, t[G−1]; +inf where s ≥ t[i]
    start: ArrayLike  # (G,) of starting at t[i] instead of T


def step_errors(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    candidates: Sequence[int] | np.ndarray | None = None,
) -> StepErrors:
    """The error of every step t → s of DDIM at η = 0, started on the fine trajectory.

    e(t, s) = mean over latents of the RMS over pixels of x̄_t + (σ_s − σ_t) ε_θ(x_t, t) − x̄_s,
    where x̄ = x/√ᾱ, σ = √((1 − ᾱ)/ᾱ) (Eq. 13–14) and x_T, …, x_0 is the fine solution, τ = 1..T.
    A sampler that starts at t < T takes x_T for x_t: its start costs the RMS of x_T − x_t (not
    of x̄: in the noise at the start, most of the difference is forgotten again).

    T network calls and memory for one trajectory; under `jax.jit` weights can be arguments.

    Args:
      denoise: as in `sample`: the network, with what it predicts.
      x_T: (B, ...) floating latents; 64 give a good τ. See `initial_noise`.
      schedule: the noise schedule.
      candidates: (G,) strictly increasing ints in 1..T that τ may be made of; by default
        `timesteps(T, min(T, 200))`. Work grows with G², memory with G.

    Returns:
      `StepErrors`, float32, for `optimise_timesteps`.

    Raises:
      TypeError: x_T is not floating.
      ValueError: candidates are not strictly increasing ints in 1..T.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(100, rescale_betas=True)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 8, (2,))
      >>> ddim.step_errors(exact, x_T, schedule, candidates=range(10, 101, 10)).error.shape
      (10, 11)
    """
    T = schedule.num_steps
    t = timesteps(T, min(T, 200)) if candidates is None else as_timesteps(list(candidates), T)
    dtype, x_T = check_batch(x_T).dtype, wide(check_batch(x_T))  # the network alone is given x_T's
    network = Predictor(lambda x, t: call(denoise, x, t, dtype), prediction_of(denoise))
    path = trajectory(network, x_T, schedule, np.arange(1, T + 1), at=t.tolist())
    x_t, x_0 = path.x_t[::-1], path.x_0[::-1]  # (G, B, ...), t increasing
    c = coefficients(schedule, t, t * 0)
    eps = jax.vmap(lambda c, x_t, x_0: to_x0_eps(c, x_t, x_0, "x_0")[1])(_cast(c, x_t), x_t, x_0)
    a, b = (
        jnp.asarray(np.append(end, v)).astype(x_t.dtype)[(...,) + (None,) * (x_t.ndim - 1)]
        for end, v in ((1, c.sqrt_alpha_bar_t), (0, c.sqrt_one_minus_alpha_bar_t))
    )
    x_s = jnp.concatenate([path.sample[None], x_t])

    def from_one(inputs: tuple[Array, Array]) -> Array:
        return _mean_rms((a * inputs[0][None] + b * inputs[1][None] - x_s) / a)  # Eq. 12 over √ᾱ_s

    error = jax.lax.map(from_one, (x_0, eps))
    later = np.append(0, t)[None, :] >= t[:, None]
    return StepErrors(t, jnp.where(later, jnp.inf, error), _mean_rms(x_T[None] - x_t))


def optimise_timesteps(errors: StepErrors, steps: int) -> np.ndarray:
    """The S timesteps whose steps have the least total squared error, by dynamic programming.

    τ = argmin e(T, τ_S)² + Σ_i e(τ_i, τ_{i−1})², with τ_0 = 0, the minimum over all τ of
    candidates. It minimises the errors of single DDIM steps: what becomes of them on the way to
    x_0 is left out, and a multistep method has other errors. See `refine_timesteps` for both.

    Args:
      errors: from `step_errors`; one estimate serves every S.
      steps: S in 1..G.

    Returns:
      (S,) int32 τ, as `timesteps` returns; τ_S may be below T.

    Raises:
      ValueError: S is not in 1..G, or an error is NaN.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(100, rescale_betas=True)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 8, (2,))
      >>> errors = ddim.step_errors(exact, x_T, schedule)
      >>> [len(ddim.optimise_timesteps(errors, S)) for S in (5, 10, 20)]
      [5, 10, 20]
    """
    t, error, start = (np.asarray(v) for v in errors)
    if isinstance(steps, bool) or not 1 <= steps <= len(t):
        raise ValueError(f"steps (S) must be in 1..{len(t)}, the number of candidates, got {steps}")
    if np.isnan(error).any() or np.isnan(start).any():
        raise ValueError("errors hold NaN: the denoiser's trajectory is not finite")
    cost = np.where(np.tri(len(t), len(t) + 1, dtype=bool), error.astype(np.float64) ** 2, np.inf)
    best = np.append(0.0, np.full(len(t), np.inf))  # least total from s down to 0 in k steps
    choices = []
    for _ in range(steps):
        total = cost + best
        choices.append(total.argmin(1))
        best = np.append(np.inf, total.min(1))
    i = int((best[1:] + start.astype(np.float64) ** 2).argmin()) + 1
    tau = []
    for choice in reversed(choices):
        tau.append(t[i - 1])
        i = choice[i - 1]
    return np.array(tau[::-1], np.int32)


def refine_timesteps(
    sampler: Callable[[Array, np.ndarray], Array],
    x_T: Array,
    x_0: Array,
    tau: ArrayLike | Sequence[int],
    num_steps: int,
    *,
    sweeps: int = 10,
) -> np.ndarray:
    """Improve τ for one sampler, of any method, by coordinate descent on the error of whole runs.

    Minimises the RMS over pixels and latents of sampler(x_T, τ) − x_0. A sweep tries to move each
    τ_i by a share of the gap to either neighbour, and keeps what helps; the share starts at 1/4
    and is halved after a sweep that gained less than 1 %. At most 2 S runs of the sampler a sweep.

    Use many latents, 500 or so: with few, it fits them instead of the distribution.

    Args:
      sampler: (x_T, τ (S,) int32) → x_0, jitted with τ as an argument, of any kind.
      x_T: (B, ...) latents.
      x_0: (B, ...) what they should become, e.g. `sample` with τ = 1..T, η = 0.
      tau: (S,) where to start, such as `optimise_timesteps` gives; or several, (K, S), of which
        the best on these latents is the start.
      num_steps: T.
      sweeps: at most so many, ≥ 0.

    Returns:
      (S,) int32 τ, never worse on these latents than any one given.

    Raises:
      ValueError: τ is out of range, sweeps is negative, the shapes of x_T and x_0 differ, or no
        first run is finite.

    Example:
      >>> import ddim_jax as ddim, jax, numpy as np
      >>> schedule = ddim.linear_schedule(100, rescale_betas=True)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 8, (2,))
      >>> sampler = jax.jit(lambda x_T, tau: ddim.sample(exact, x_T, schedule, tau))
      >>> x_0 = sampler(x_T, np.arange(1, 101))
      >>> ddim.refine_timesteps(sampler, x_T, x_0, [30, 60, 90], 100, sweeps=2).shape
      (3,)
    """
    try:
        several = np.atleast_2d(np.asarray(tau))
    except ValueError as ragged:
        raise ValueError(f"several tau must have one S, (K, S): {ragged}") from ragged
    starts = [as_timesteps(one, num_steps) for one in several]
    if jnp.shape(x_T) != jnp.shape(x_0):
        raise ValueError(f"x_T and x_0 must have one shape, got {x_T.shape} and {x_0.shape}")
    if not np.size(x_0):
        raise ValueError(f"x_T must hold an image at least, got shape {x_T.shape}")
    if sweeps < 0:
        raise ValueError(f"sweeps must be >= 0, got {sweeps}")
    target = np.asarray(x_0, np.float64)

    def error(tau: np.ndarray) -> float:
        drawn = np.asarray(sampler(x_T, tau), np.float64)
        if drawn.shape != target.shape:
            raise ValueError(f"the sampler must return {target.shape}, as x_0, got {drawn.shape}")
        return float(np.sqrt(np.mean((drawn - target) ** 2)))

    errors = [error(start) for start in starts]
    if not np.isfinite(errors).any():
        raise ValueError(f"the sampler's error with the given tau is {errors[0]}")
    best, least = starts[int(np.nanargmin(errors))], float(np.nanmin(errors))
    share = 4
    for _ in range(sweeps):
        before = least
        for i in range(len(best)):
            for side in (-1, 1):
                bounds = np.concatenate([[0], best, [num_steps + 1]])
                gap = int(bounds[i + 1 + side] - bounds[i + 1])
                moved = best.copy()
                moved[i] += side * max(abs(gap) // share, 1)
                if abs(gap) > 1 and (trial := error(moved)) < least:
                    best, least = moved, trial
                    break
        if least > 0.99 * before:
            share *= 2
    return best


def _mean_rms(x: Array) -> Array:
    """(S, B, ...) → (S,): RMS over pixels, mean over images."""
    return root((x**2).mean(axis=tuple(range(2, x.ndim)))).mean(axis=1)


def _cast(c: Coefficients, like: Array) -> Any:
    return jax.tree.map(lambda v: jnp.asarray(v).astype(like.dtype), c)
