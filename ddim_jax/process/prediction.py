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
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, is_concrete, per_image, wide
from ddim_jax.process.continuous import signal_and_noise
from ddim_jax.process.gaussian import Coefficients, coefficients
from ddim_jax.process.schedule import Schedule

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
            d, s = self.sigma_data, _scale(a, b, self.sigma_data)
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
    return ((b * x - a * d**2 * z) / (_scale(a, b, d) * d)).astype(x_0.dtype)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A function of a network, with what it predicts, and its variance if it learned one."""

    function: Callable[..., Array]
    prediction: Prediction
    with_variance: Callable[..., tuple[Array, Array]] | None = None  # see `variance_of`

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        return self.function(*args, **kwargs)


def predicts(
    network: Any,
    kind: str | Prediction | None = None,
    *,
    x0_fn: Callable[[Array], Array] | None = None,
    rederive_eps: bool = True,
    sigma_data: float | None = None,
    schedule: Schedule | None = None,
    learned_variance: bool = False,
) -> Any:
    """The network, with what it predicts: every sampler, encoder and combinator reads it there.

    A bare function predicts ε. `functools.partial` and `jax.jit` keep what the function inside
    says; a lambda around it does not, so put `predicts` outermost.

    Args:
      network: a `Denoiser`, an apply_fn (params, x, t, …), or a `Model`.
      kind: `"eps"`, `"x_0"`, `"v"`, `"edm"` or a whole `Prediction`; by default what the network
        says itself, else `"eps"`. One that becomes `"edm"` here is fed x_t/s in the place of x_t,
        the argument before t, its first one of integers.
      x0_fn: applied to each x̂_0, such as `clip_x0(1.0)`.
      rederive_eps: whether ε is recomputed from x̂_0 after x0_fn.
      sigma_data: of `"edm"`, σ_d of the data; by default what the network says, else 0.5.
      schedule: gives s to `"edm"`: that of training; a `Model` has it. The others need none.
      learned_variance: the network returns twice as many channels, on the last axis: after those of
        its prediction 2 v − 1, where v is the share of log β in the log of its variance (Nichol &
        Dhariwal 2021, Eq. 15). What is returned gives the first half, and `variance_of` it both.

    Returns:
      What was given, of the same signature; it has an attribute `prediction`.

    Raises:
      ValueError: the kind is unknown, the network says that it predicts another, or `"edm"` is
        without a schedule.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> denoise = ddim.predicts(lambda x, t: 0.5 * x, "x_0", x0_fn=ddim.clip_x0(1.0))
      >>> ddim.sample(denoise, jnp.full((1, 2), 4.0), ddim.linear_schedule(1000), [1000]).tolist()
      [[1.0, 1.0]]
    """
    if isinstance(kind, Prediction):
        x0_fn, rederive_eps = kind.x0_fn, kind.rederive_eps
        sigma_data, kind = kind.facts().get("sigma_data"), kind.kind
    if hasattr(network, "apply_fn") and hasattr(network, "_replace"):  # a model
        how: dict[str, Any] = {"x0_fn": x0_fn, "rederive_eps": rederive_eps}
        how |= {"sigma_data": sigma_data, "schedule": schedule or network.schedule}
        how |= {"learned_variance": learned_variance}
        return network._replace(apply_fn=predicts(network.apply_fn, kind, **how))
    said = _said(network)
    if said is not None and kind not in (None, said.kind):
        raise ValueError(f"this network predicts {said.kind!r}, and cannot be read as {kind!r}")
    kind = kind or (said.kind if said else "eps")
    if sigma_data is not None and kind != "edm":
        raise ValueError(f'sigma_data is of "edm", and this network predicts {kind!r}')
    if said is not None and sigma_data not in (None, said.sigma_data):
        raise ValueError(f"this network has sigma_data = {said.sigma_data}, and not {sigma_data}")
    if x0_fn is None and said is not None:
        x0_fn, rederive_eps = said.x0_fn, said.rederive_eps
    if sigma_data is None:
        sigma_data = said.sigma_data if said else SIGMA_DATA
    both = variance_of(network)
    if learned_variance and both is not None:
        raise ValueError("this network's learned variance is known already")
    function = network.function if isinstance(network, Predictor) else network
    prediction = Prediction(kind, x0_fn, rederive_eps, sigma_data)
    if kind == "edm" and said is None:
        if schedule is None:
            raise ValueError('"edm" divides x_t by its standard deviation: give its schedule=...')
        function = partial(_fed, network, schedule, sigma_data)
    if learned_variance:
        function, both = partial(_first, function), partial(_halves, function)
    return Predictor(function, prediction, both)


def prediction_of(network: Any) -> Prediction:
    """What a network says that it predicts, through `functools.partial` and `jax.jit`; else ε.

    Example:
      >>> prediction_of(partial(predicts(lambda w, x, t: w * x, "v"), 2.0)).kind
      'v'
    """
    return _said(network) or Prediction()


def variance_of(network: Any) -> Callable[..., tuple[Array, Array]] | None:
    """The function of a network that gives its learned variance too, or None where it has none.

    Args:
      network: a `Denoiser` or apply_fn, be it inside `functools.partial` and `jax.jit`.

    Returns:
      A function of the same arguments that returns (output, v), each (B, ...), in one call of the
      network; log σ² = v log β + (1 − v) log β̃ (Nichol & Dhariwal 2021, Eq. 15).

    Example:
      >>> import ddim_jax as ddim
      >>> network = lambda x, t: jnp.concatenate([0.5 * x, 0 * x], axis=-1)
      >>> both = variance_of(ddim.predicts(network, learned_variance=True))
      >>> [out.tolist() for out in both(jnp.ones((1, 2)), jnp.array([9]))]
      [[[0.5, 0.5]], [[0.5, 0.5]]]
    """
    if isinstance(network, Predictor):
        return network.with_variance
    if isinstance(network, partial):
        inner = variance_of(network.func)
        return None if inner is None else partial(inner, *network.args, **network.keywords)
    return variance_of(network.__wrapped__) if hasattr(network, "__wrapped__") else None


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


def _scale(a: Any, b: Any, sigma_data: float) -> Any:
    """s = √(ᾱ σ_d² + 1 − ᾱ), the standard deviation of x_t."""
    return jnp.sqrt(a**2 * sigma_data**2 + b**2)


def _halves(network: Any, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    output = network(*args, **kwargs)
    if output.shape[-1] % 2:
        raise ValueError(
            "a network that learned its variance returns twice the channels of its input, got "
            f"{output.shape[-1]} channels"
        )
    predicted, v = jnp.split(output, 2, axis=-1)
    return predicted, (v + 1) / 2


def _first(network: Any, *args: Any, **kwargs: Any) -> Array:
    return _halves(network, *args, **kwargs)[0]


def _fed(network: Any, schedule: Schedule, sigma_data: float, *args: Any, **kwargs: Any) -> Array:
    """The network's output where x_t, the argument before t, is divided by s."""
    is_t = (jnp.issubdtype(getattr(a, "dtype", float), jnp.integer) for a in args)
    i = next((i for i, found in enumerate(is_t) if found), 0)
    real = i == 0 and len(args) > 1 and np.ndim(args[-1]) == 1  # t between the whole ones
    i = len(args) - 1 if real else i
    if i == 0:
        raise TypeError('an "edm" network is called with x and, after it, t of integers')
    x, t = wide(args[i - 1]), args[i]
    if real:
        both: Any = signal_and_noise(schedule, t)
    else:
        c = coefficients(schedule, t, t * 0)
        both = c.sqrt_alpha_bar_t, c.sqrt_one_minus_alpha_bar_t
    s = _scale(per_image(both[0], x), per_image(both[1], x), sigma_data)
    return network(*args[: i - 1], (x / s).astype(args[i - 1].dtype), *args[i:], **kwargs)


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
