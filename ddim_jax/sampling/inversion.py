"""The exact inverse of the η = 0 sampler: each step solved for the state that it came from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import (
    Array,
    ArrayLike,
    Denoiser,
    call,
    check_batch,
    is_concrete,
    per_image,
    wide,
)
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.stepping import step
from ddim_jax.sampling.anderson import solve
from ddim_jax.sampling.methods import ddim
from ddim_jax.sampling.plan import Plan, rows
from ddim_jax.sampling.sampler import sample


class Inversion(NamedTuple):
    """An exact encoding, and what is needed to trust it."""

    x_T: Array  # (B, ...) the latents
    residual: Array  # (B,) max |sample(x_T) − x_0| over one image: decoded once and compared
    converged: Array  # (B,) bool, residual ≤ tol
    iterations: Array  # (S,) int32 network calls that each step took, in τ's order

    def check(self) -> Array:
        """x_T if every image converged, else a `RuntimeError`. For concrete results."""
        if failure := _failure(self):
            raise RuntimeError(failure)
        return self.x_T


def invert(
    denoise: Denoiser,
    x_0: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    *,
    tol: float = 1e-4,
    max_iterations: int = 200,
) -> Inversion:
    """The x_T that `sample` at η = 0 decodes to x_0, to round-off (DDIM Eq. 13, made implicit).

    x_t/√ᾱ_t = x_s/√ᾱ_s + (√((1 − ᾱ_t)/ᾱ_t) − √((1 − ᾱ_s)/ᾱ_s)) ε_θ(x_t, t), solved for x_t

    Each step is a fixed-point equation, solved for each image by Anderson-accelerated iterations
    with a safeguard: damped steps from the best iterate where the extrapolation goes astray. For
    an exact ε the step down is the gradient of a convex function, so that it has one solution, and
    damped iterations reach it; a trained network may have none, or several. Small steps are easier:
    raise S where images fail. The result is decoded once, and the difference reported; round-off
    in x_T itself can be amplified beyond `tol` where decoding is that sensitive.

    Args:
      denoise, x_0, schedule, tau: as in `encode`.
      tol: the largest round-trip error of an image that counts as converged, > 0.
      max_iterations: most network calls a step may take, ≥ 1.

    Returns:
      An `Inversion`; read `converged`, or use `check()`. Memory is about 2·5 copies of x_0.

    Raises:
      TypeError: x_0 is not floating.
      ValueError: as `encode`, or `tol` or `max_iterations` is out of range.

    Warns:
      RuntimeWarning: images did not converge. Under a trace nothing can be raised or warned of.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule, tau = ddim.linear_schedule(1000), ddim.timesteps(1000, 10)
      >>> denoise = ddim.oracle.gaussian(schedule, mean=0.5, cov=0.1)
      >>> x_0 = jnp.linspace(-1, 1, 8).reshape(4, 2)
      >>> x_T = ddim.invert(denoise, x_0, schedule, tau).check()
      >>> bool(jnp.abs(ddim.sample(denoise, x_T, schedule, tau) - x_0).max() < 1e-5)
      True
    """
    x_0 = check_batch(x_0)
    if not tol > 0 or max_iterations < 1:
        raise ValueError(
            f"need tol > 0 and max_iterations >= 1, got tol={tol}, max_iterations={max_iterations}"
        )
    plan = ddim()(schedule, tau)
    prediction_of(denoise).check(plan.steps)
    if is_concrete(plan) and not np.all(np.asarray(plan.steps.sqrt_alpha_bar_t) > 0):
        raise ValueError(
            "alpha_bar[t] = 0 (zero terminal SNR): x_t is pure noise there, whatever x_s is, so "
            "that the step has no inverse; use a tau that stops before T"
        )
    upwards = jax.tree.map(lambda v: v[::-1], rows(plan, wide(x_0).dtype))

    def body(x_s: Array, row: Plan) -> tuple[Array, Array]:
        return invert_step(denoise, x_s, row, max_iterations, x_0.dtype)

    x_T, iterations = jax.lax.scan(body, wide(x_0), upwards)
    x_T = x_T.astype(x_0.dtype)
    decoded = sample(denoise, x_T, schedule, tau)
    error = jnp.abs(decoded - x_0).reshape(x_0.shape[0], -1).max(axis=1)
    result = Inversion(x_T, error, error <= tol, iterations)
    if is_concrete(result) and (failure := _failure(result)):
        warnings.warn(failure, RuntimeWarning, stacklevel=2)
    return result


def invert_step(
    denoise: Denoiser, x_s: Array, row: Plan, max_iterations: int, dtype: Any
) -> tuple[Array, Array]:
    """(x_t, network calls) such that the step down from x_t ends in x_s: one of `invert`'s.

    Args:
      denoise: as in `invert`.
      x_s: (B, ...) in float32 at least.
      row: of one step, its t and coefficients scalars.
      max_iterations: as in `invert`.
      dtype: in which the network is given x.
    """
    c, prediction = row.steps, prediction_of(denoise)

    def residual(x_t: Array) -> Array:  # zero where the step down from x_t ends in x_s
        output = call(denoise, x_t, jnp.full(x_t.shape[:1], row.t), dtype)
        down = step(c, x_t, output, prediction=prediction)[0]
        return (x_s - down) * per_image(c.sqrt_alpha_bar_t / c.sqrt_alpha_bar_s, x_t)

    return solve(residual, x_s, max_iterations)


def _failure(result: Inversion) -> str | None:
    failed = ~np.asarray(result.converged)
    if not failed.any():
        return None
    return (
        f"{failed.sum()} of {failed.size} images did not converge: decoding x_T misses x_0 by up "
        f"to {np.max(np.asarray(result.residual)):.2g}; take more steps (a larger S), raise "
        "max_iterations, or keep the images where `converged` holds"
    )
