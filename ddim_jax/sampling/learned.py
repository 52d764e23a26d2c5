"""A variance that the network learned, as the σ of a step.

Nichol & Dhariwal (2021), Eq. 15: between the two variances of DDPM, by a share v for each pixel,

    log σ² = v log β + (1 − v) log β̃,   β = σ̂² = 1 − ᾱ_t/ᾱ_s,   β̃ = σ(1)² of Eq. 16,

where s is the next element of τ, so that β is that of the shorter chain (their §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, Denoiser, per_image, root
from ddim_jax.process.gaussian import Coefficients, ddim_sigma, sigma_hat
from ddim_jax.process.predictor import variance_of
from ddim_jax.process.schedule import Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedVariance:
    """What the network chooses its variance from, a row a step.

    Attributes:
      low: (S,) log β̃; where s = 0 and β̃ = 0 that of the step before, as in their code.
      high: (S,) log β.
      in_family: whether the direction of ε is √(1 − ᾱ_s − σ²) with the learned σ, as Eq. 7 has it
        and as keeps the marginals of Eq. 4; else that of σ(1), as in Nichol & Dhariwal's chain,
        whose mean does not depend on the variance.
    """

    low: Any
    high: Any
    in_family: bool = dataclasses.field(default=False, metadata={"static": True})

    def log_variance(self, v: Array) -> Array:
        """log σ² of shares v (B, ...), in the shape of v."""
        low, high = per_image(self.low, v), per_image(self.high, v)
        return low + v * (high - low)

    def steps(self, c: Coefficients, v: Array) -> Coefficients:
        """The step's numbers with σ for each pixel, 0 where the step's own is.

        In the family σ² ends at 1 − ᾱ_s, beyond which Eq. 7 has no real κ: β is above it in the
        last steps of fine τ.
        """
        noisy = per_image(c.sigma, v) > 0
        variance = jnp.where(noisy, jnp.exp(self.log_variance(v)), 0)
        if not self.in_family:
            return c._replace(sigma=root(variance))
        limit = per_image(c.direction**2 + c.sigma**2, v)  # 1 − ᾱ_s, of σ(1) too
        variance = jnp.minimum(variance, limit)
        return c._replace(sigma=root(variance), direction=root(limit - variance))


def learned_variance(
    schedule: Schedule, t: Any, s: Any, *, in_family: bool = False
) -> LearnedVariance:
    """The rows of the steps (t, s), which go down to s = 0.

    Example:
      >>> import ddim_jax as ddim
      >>> rows = learned_variance(ddim.linear_schedule(1000), np.array([9, 4]), np.array([4, 0]))
      >>> np.exp(rows.low).round(5).tolist(), np.exp(rows.high).round(5).tolist()
      ([0.00035, 0.00035], [0.0011, 0.00052])
    """
    high = 2 * np.log(sigma_hat(schedule, t, s))
    with np.errstate(divide="ignore"):
        low = 2 * np.log(ddim_sigma(schedule, t, s))
    low = np.where(s > 0, low, low[-2] if len(low) > 1 else high[-1])
    return LearnedVariance(low, high, in_family)


def with_variance(denoise: Denoiser) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(x (B, ...), t (B,)) → (output, v) of a network, each of x's shape and dtype.

    Raises:
      ValueError: it has no learned variance, or returns another shape.
    """
    both = variance_of(denoise)
    if both is None:
        raise ValueError(
            "this network has no learned variance: take another method, or say that it returns one "
            "by predicts(network, learned_variance=True)"
        )

    def checked(x: Array, t: Array) -> tuple[Array, Array]:
        output, v = both(x, t)
        if output.shape != x.shape:
            raise ValueError(
                "a network that learned its variance must return twice the channels of its input, "
                f"{x.shape}, got {output.shape} and {v.shape}"
            )
        return output.astype(x.dtype), v.astype(x.dtype)

    return checked
