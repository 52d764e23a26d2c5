"""What a network predicts, as one value that travels with it, and what becomes of x̂_0.

Two of x_t, x_0, ε and v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 fix the other two (Eq. 4; Salimans & Ho 2022,
App. D), so that every sampler takes every prediction type.

"edm" is F_θ of Karras et al. (2022), Eq. 7: D = c_skip y + c_out F_θ(c_in y) at noise level σ.
With y = x_t/√ᾱ_t, σ² = (1 − ᾱ_t)/ᾱ_t, and s² = ᾱ_t σ_d² + 1 − ᾱ_t the variance of x_t for data of
variance σ_d²,

    x̂_0 = √ᾱ_t σ_d²/s² · x_t + √(1 − ᾱ_t) σ_d/s · F_θ(x_t/s, t)

so that the network's input and target have variance 1 at every t; t stands for c_noise. At σ_d = 1,
s = 1 and F = −v.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, is_concrete, per_image, wide
from ddim_jax.process.gaussian import Coefficients

PREDICTIONS = ("eps", "x_0", "v", "edm")
SIGMA_DATA = 0.5  # of images in [−1, 1] (Karras et al. 2022, Table 1)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network's output stands for.

    Attributes:
      kind: `"eps"`, `"x_0"`, `"v"` or `"edm"`.
      x0_fn: applied to each x̂_0: `clip_x0(1.0)`, `dynamic_threshold()`; None leaves x̂_0 alone, as
        the authors do.
      rederive_eps: after x0_fn, recompute ε = (x_t − √ᾱ_t x̂_0)/√(1 − ᾱ_t), so that a step is Eq. 7
        with x̂_0 for x_0; False keeps the network's own ε.
      sigma_data: of `"edm"` alone, the standard deviation σ_d of the data.

    Raises:
      ValueError: the kind is unknown, or sigma_data is not positive and finite.

    Example:
      >>> Prediction("v").kind
      'v'
    """

    kind: str = "eps"
    x0_fn: Callable[[Array], Array] | None = None
    rederive_eps: bool = True
    sigma_data: float = SIGMA_DATA

    def __post_init__(self) -> None:
        if self.kind not in PREDICTIONS:
            raise ValueError(f"unknown prediction type {self.kind!r}; choose one of {PREDICTIONS}")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {self.sigma_data!r}")

    def facts(self) -> dict[str, Any]:
        """Kind and σ_d for JSON, as checkpoints and weights files hold them.

        Example:
          >>> Prediction("v").facts(), Prediction("edm").facts()
          ({'prediction': 'v'}, {'prediction': 'edm', 'sigma_data': 0.5})
        """
        facts: dict[str, Any] = {"prediction": self.kind}
        return facts | ({"sigma_data": self.sigma_data} if self.kind == "edm" else {})

    def check(self, c: Coefficients) -> None:
        """Refuse ε-prediction where ᾱ_t = 0: x̂_0 = (x_t − ε)/0."""
        a = c.sqrt_alpha_bar_t
        if self.kind == "eps" and is_concrete(a) and not np.all(np.asarray(a) > 0):
            raise ValueError(
                "alpha_bar[t] = 0 (zero terminal SNR): ε leaves x_0 undefined there; use a network "
                'that predicts "v", "x_0" or "edm", or a tau that stops before T'
            )

    def x0_eps(self, c: Coefficients, x_t: Array, output: Array) -> tuple[Array, Array]:
        """(x̂_0, ε) of an output at x_t, each (B, ...); of `c` only the numbers of t are used."""
        a, b = per_image(c.sqrt_alpha_bar_t, x_t), per_image(c.sqrt_one_minus_alpha_bar_t, x_t)
        if self.kind == "eps":
            self.check(c)
            x_0, eps = (x_t - b * output) / a, output
        elif self.kind == "x_0":
            x_0, eps = output, (x_t - a * output) / b
        elif self.kind == "v":
            x_0, eps = a * x_t - b * output, b * x_t + a * output
        else:
            d, s = self.sigma_data, std_of_x_t(a, b, self.sigma_data)
            x_0 = a * d**2 / s**2 * x_t + b * d / s * output
            eps = b / s**2 * x_t - a * d / s * output
        if self.x0_fn is not None:
            x_0 = self.x0_fn(x_0)
            if self.rederive_eps:
                eps = (x_t - a * x_0) / b
        return x_0, eps


def to_x0_eps(
    c: Coefficients, x_t: Array, output: Array, prediction: str | Prediction = "eps"
) -> tuple[Array, Array]:
    """Turn a network's output of any prediction type into (x̂_0, ε).

    From x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Eq. 4) and v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho
    2022, App. D): two of the four fix the others.

    Args:
      c: `coefficients(schedule, t, s)`; only those of t are used.
      x_t: (B, ...) the noisy input.
      output: (B, ...) ε, x̂_0, v or F, as `prediction` says.
      prediction: `"eps"`, `"x_0"`, `"v"`, `"edm"`, or a `Prediction`.

    Returns:
      (x̂_0, ε), each (B, ...), in x_t's dtype.

    Raises:
      ValueError: the prediction type is unknown, or ε is used where ᾱ_t = 0.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> c = ddim.coefficients(ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36]), 2, 1)
      >>> x_0, eps = ddim.to_x0_eps(c, jnp.full((1, 1), 1.4), jnp.ones((1, 1)))
      >>> round(x_0.item(), 4), eps.item()
      (1.0, 1.0)
    """
    x = wide(x_t)
    both = _as_prediction(prediction).x0_eps(c, x, output.astype(x.dtype))
    return both[0].astype(x_t.dtype), both[1].astype(x_t.dtype)


def from_x0_eps(
    c: Coefficients, x_0: Array, eps: Array, prediction: str | Prediction = "eps"
) -> Array:
    """The network output of type `prediction` that stands for (x_0, ε): `to_x0_eps` undone.

    Args:
      c: `coefficients(schedule, t, s)`; only those of t are used.
      x_0: (B, ...) data.
      eps: (B, ...) noise.
      prediction: `"eps"`, `"x_0"`, `"v"` = √ᾱ_t ε − √(1 − ᾱ_t) x_0, `"edm"` =
        (√(1 − ᾱ_t) x_0 − √ᾱ_t σ_d² ε)/(s σ_d), or a `Prediction`.

    Returns:
      (B, ...) ε, x_0, v or F.

    Raises:
      ValueError: the prediction type is unknown.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> c = ddim.coefficients(ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36]), 2, 1)
      >>> round(ddim.from_x0_eps(c, jnp.ones((1, 1)), jnp.ones((1, 1)), "v").item(), 4)
      -0.2
    """
    prediction = _as_prediction(prediction)
    if prediction.kind in ("eps", "x_0"):
        return {"eps": eps, "x_0": x_0}[prediction.kind]
    x, z = wide(x_0), wide(eps)
    a, b = per_image(c.sqrt_alpha_bar_t, x), per_image(c.sqrt_one_minus_alpha_bar_t, x)
    if prediction.kind == "v":
        return (a * z - b * x).astype(x_0.dtype)
    d = prediction.sigma_data
    return ((b * x - a * d**2 * z) / (std_of_x_t(a, b, d) * d)).astype(x_0.dtype)


def std_of_x_t(a: Any, b: Any, sigma_data: float) -> Any:
    """s = √(ᾱ σ_d² + 1 − ᾱ), the standard deviation of x_t."""
    return jnp.sqrt(a**2 * sigma_data**2 + b**2)


def _as_prediction(prediction: str | Prediction) -> Prediction:
    return prediction if isinstance(prediction, Prediction) else Prediction(prediction)
