"""What a network predicts, as one value that travels with it: ε, x_0 or v, and what becomes of x̂_0.

Two of x_t, x_0, ε and v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 fix the other two (Eq. 4; Salimans & Ho 2022,
App. D), so that every sampler takes every prediction type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ddim_jax.arrays import Array, is_concrete, per_image, wide
from ddim_jax.process.gaussian import Coefficients

PREDICTIONS = ("eps", "x_0", "v")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network's output stands for.

    Attributes:
      kind: `"eps"`, `"x_0"` or `"v"`.
      x0_fn: applied to each x̂_0: `clip_x0(1.0)`, `dynamic_threshold()`; None leaves x̂_0 alone, as
        the authors do.
      rederive_eps: after x0_fn, recompute ε = (x_t − √ᾱ_t x̂_0)/√(1 − ᾱ_t), so that a step is Eq. 7
        with x̂_0 for x_0; False keeps the network's own ε.

    Raises:
      ValueError: the kind is unknown.

    Example:
      >>> Prediction("v").kind
      'v'
    """

    kind: str = "eps"
    x0_fn: Callable[[Array], Array] | None = None
    rederive_eps: bool = True

    def __post_init__(self) -> None:
        if self.kind not in PREDICTIONS:
            raise ValueError(f"unknown prediction type {self.kind!r}; choose one of {PREDICTIONS}")

    def check(self, c: Coefficients) -> None:
        """Refuse ε-prediction where ᾱ_t = 0: x̂_0 = (x_t − ε)/0."""
        a = c.sqrt_alpha_bar_t
        if self.kind == "eps" and is_concrete(a) and not np.all(np.asarray(a) > 0):
            raise ValueError(
                "alpha_bar[t] = 0 (zero terminal SNR): ε leaves x_0 undefined there; use a network "
                'that predicts "v" or "x_0", or a tau that stops before T'
            )

    def x0_eps(self, c: Coefficients, x_t: Array, output: Array) -> tuple[Array, Array]:
        """(x̂_0, ε) of an output at x_t, each (B, ...); of `c` only the numbers of t are used."""
        a, b = per_image(c.sqrt_alpha_bar_t, x_t), per_image(c.sqrt_one_minus_alpha_bar_t, x_t)
        if self.kind == "eps":
            self.check(c)
            x_0, eps = (x_t - b * output) / a, output
        elif self.kind == "x_0":
            x_0, eps = output, (x_t - a * output) / b
        else:
            x_0, eps = a * x_t - b * output, b * x_t + a * output
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
      output: (B, ...) ε, x̂_0 or v, as `prediction` says.
      prediction: `"eps"`, `"x_0"`, `"v"`, or a `Prediction`.

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
      prediction: `"eps"`, `"x_0"` or `"v"` = √ᾱ_t ε − √(1 − ᾱ_t) x_0.

    Returns:
      (B, ...) ε, x_0 or v.

    Raises:
      ValueError: the prediction type is unknown.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> c = ddim.coefficients(ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36]), 2, 1)
      >>> round(ddim.from_x0_eps(c, jnp.ones((1, 1)), jnp.ones((1, 1)), "v").item(), 4)
      -0.2
    """
    kind = _as_prediction(prediction).kind
    if kind != "v":
        return {"eps": eps, "x_0": x_0}[kind]
    x = wide(x_0)
    a, b = per_image(c.sqrt_alpha_bar_t, x), per_image(c.sqrt_one_minus_alpha_bar_t, x)
    return (a * eps.astype(x.dtype) - b * x).astype(x_0.dtype)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A function of a network, with what it predicts."""

    function: Callable[..., Array]
    prediction: Prediction

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        return self.function(*args, **kwargs)


def predicts(
    network: Any,
    kind: str | None = None,
    *,
    x0_fn: Callable[[Array], Array] | None = None,
    rederive_eps: bool = True,
) -> Any:
    """The network, with what it predicts: every sampler, encoder and combinator reads it there.

    A bare function predicts ε. `functools.partial` and `jax.jit` keep what the function inside
    says; a lambda around it does not, so put `predicts` outermost.

    Args:
      network: a `Denoiser`, an apply_fn (params, x, t, …), or a `Model`.
      kind: `"eps"`, `"x_0"` or `"v"`; by default what the network says itself, else `"eps"`.
      x0_fn: applied to each x̂_0, such as `clip_x0(1.0)`.
      rederive_eps: whether ε is recomputed from x̂_0 after x0_fn.

    Returns:
      What was given, of the same signature; it has an attribute `prediction`.

    Raises:
      ValueError: the kind is unknown, or the network says that it predicts another.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> denoise = ddim.predicts(lambda x, t: 0.5 * x, "x_0", x0_fn=ddim.clip_x0(1.0))
      >>> ddim.sample(denoise, jnp.full((1, 2), 4.0), ddim.linear_schedule(1000), [1000]).tolist()
      [[1.0, 1.0]]
    """
    if hasattr(network, "apply_fn") and hasattr(network, "_replace"):  # a model
        clipped = predicts(network.apply_fn, kind, x0_fn=x0_fn, rederive_eps=rederive_eps)
        return network._replace(apply_fn=clipped)
    said = _said(network)
    if said is not None and kind not in (None, said.kind):
        raise ValueError(f"this network predicts {said.kind!r}, and cannot be read as {kind!r}")
    kind = kind or (said.kind if said else "eps")
    if x0_fn is None and said is not None:
        x0_fn, rederive_eps = said.x0_fn, said.rederive_eps
    function = network.function if isinstance(network, Predictor) else network
    return Predictor(function, Prediction(kind, x0_fn, rederive_eps))


def prediction_of(network: Any) -> Prediction:
    """What a network says that it predicts, through `functools.partial` and `jax.jit`; else ε.

    Example:
      >>> prediction_of(partial(predicts(lambda w, x, t: w * x, "v"), 2.0)).kind
      'v'
    """
    return _said(network) or Prediction()


def same_prediction(*networks: Any) -> Prediction:
    """The one prediction of networks whose outputs are about to be added.

    Raises:
      ValueError: they differ.
    """
    first, *others = (prediction_of(network) for network in networks)
    if any(other != first for other in others):
        raise ValueError(
            f"networks that are combined must predict the same, got {[first, *others]}"
        )
    return first


def _said(network: Any) -> Prediction | None:
    while network is not None:
        said = getattr(network, "prediction", None)
        if isinstance(said, str):
            return Prediction(said)
        if isinstance(said, Prediction):
            return said
        network = (
            network.func if isinstance(network, partial) else getattr(network, "__wrapped__", None)
        )
    return None


def _as_prediction(prediction: str | Prediction) -> Prediction:
    return prediction if isinstance(prediction, Prediction) else Prediction(prediction)
