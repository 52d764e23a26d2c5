"""Networks that say what they predict: `predicts` puts it there, `prediction_of` reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, per_image, wide
from ddim_jax.process.continuous import signal_and_noise
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.prediction import SIGMA_DATA, Prediction, std_of_x_t
from ddim_jax.process.schedule import Schedule


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
    s = std_of_x_t(per_image(both[0], x), per_image(both[1], x), sigma_data)
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
