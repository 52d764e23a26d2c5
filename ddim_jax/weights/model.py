"""A trained network and all that sampling from it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser
from ddim_jax.networks.config import UNetConfig
from ddim_jax.process import (
    Prediction,
    Schedule,
    ScheduleConfig,
    as_timesteps,
    predicts,
    timesteps,
)
from ddim_jax.process.predictor import prediction_of
from ddim_jax.sampling import Method, ddim, make_sampler
from ddim_jax.weights.diffusers_recipe import recipe
from ddim_jax.weights.openai_config import openai_recipe
from ddim_jax.weights.openai_flags import check_flags


class Model(NamedTuple):
    """A trained network and all that sampling from it needs.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.Model(ddim.predicts(lambda w, x, t: w * x, "v"), 0.5, ddim.linear_schedule(1000))
      Model(1 parameters, T = 1000, predicts v)
    """

    apply_fn: Callable[..., Array]  # (params, x, t, labels=None), with what it predicts
    params: Any  # nested dict of float32 arrays, the moving average of training
    schedule: Schedule
    config: Any = None  # the UNetConfig of our network; None for networks of one's own
    facts: Mapping[str, Any] = MappingProxyType({})  # provenance: data, training, scores

    @property
    def prediction(self) -> Prediction:
        """What the network predicts, and what is done to x̂_0; `predicts(model, …)` changes it."""
        return prediction_of(self.apply_fn)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its images."""
        if self.config is None:
            raise AttributeError("a model without a config does not know the shape of its images")
        return self.config.image_shape

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What its classes 0..K − 1 are called, where the data that it learned from said so."""
        names = self.facts.get("label_names")
        classes = getattr(self.config, "num_classes", None)
        if names is None or classes is None:
            return None
        if len(names) != classes:
            raise ValueError(f"the model has {classes} classes, and its facts {len(names)} names")
        return tuple(map(str, names))

    @property
    def tau(self) -> np.ndarray | None:
        """(S,) the τ that a distilled model draws along; None of one that takes any."""
        tau = self.facts.get("tau")
        return None if tau is None else as_timesteps(tau, self.schedule.num_steps)

    def computed(self, params: Any) -> Any:
        """Such weights in the dtypes that the network computes with, for a loop to convert none.

        Those of a network of your own stay as they are, whatever `config` says of dtypes.

        Example:
          >>> import ddim_jax as ddim
          >>> model = ddim.load_model("digits")
          >>> model.computed(model.params) is model.params  # of a network in float32
          True
        """
        if getattr(self.config, "dtype", "float32") == "float32":
            return params
        from ddim_jax.networks.unet import abstract_params, computed  # here, as flax is slow

        ours: Any = jax.tree.structure(abstract_params(self.config))
        return computed(params, self.config) if ours == jax.tree.structure(params) else params

    def __repr__(self) -> str:
        shape = "" if self.config is None else "×".join(map(str, self.image_shape)) + ", "
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        return (
            f"Model({shape}{size:,} parameters, T = {self.schedule.num_steps}, predicts "
            f"{self.prediction.kind})"
        )

    def sampler(
        self,
        steps: int | None = None,
        *,
        eta: float | None = None,
        tau: ArrayLike | Sequence[int] | None = None,
        method: Method | None = None,
    ) -> Callable[..., Array]:
        """A jitted sampler `(x_T, key=None) → x_0` that draws what the model's own pipeline would.

        Of a diffusers folder that is what its scheduler says, see docs/weights.md: τ, method, and
        what is done to x̂_0 unless the model says that itself; of OpenAI's networks what their
        image_sample.py does with the flags; of a distilled one DDIM at η = 0 along its own τ,
        `Model.tau`, unless another is given. Where nothing is said, DDIM at η = 0 along
        `timesteps(T, steps)`.

        Args:
          steps: S; by default that of the pipeline (`DDPMPipeline` 1000, else 50).
          eta: of DDIM, 0 by default, where that is the method.
          tau: in place of steps and their spacing.
          method: in place of the stored one; τ and what is done to x̂_0 stay.

        Returns:
          What `make_sampler` returns: weights, keys and the table are arguments of one compiled
          function, and `sampler(x_T, key, eta=…, tau=…, method=…, params=…, **inputs)` changes
          them. It needs a key where the method adds noise.

        Raises:
          ValueError: the scheduler has settings that are not read, all of which are named; S is
            not in 1..T; two of the arguments contradict each other, or a distilled model.

        Example:
          >>> import ddim_jax as ddim
          >>> model = ddim.load_model("digits")
          >>> x_T = ddim.initial_noise(jax.random.key(0), 4, model.image_shape)
          >>> model.sampler(5)(x_T).shape
          (4, 8, 8, 1)
        """
        told, tau, method = stored(self, steps, eta=eta, tau=tau, method=method)
        return make_sampler(told, tau, method=method)

    @property
    def denoise(self) -> Denoiser:
        """(x, t) → prediction with the weights closed over, for `ddim.sample` outside of jit.

        Inside your own `jax.jit` pass `params` as an argument instead, or they become constants.
        """
        return predicts(partial(self.apply_fn, self.params))


def network_of(config: UNetConfig, prediction: Prediction, schedule: Schedule) -> Any:
    """The apply_fn of our U-Net with what it predicts, and with its variance if it learned one.

    It has learned one where `out_channels` is twice `in_channels`.

    Example:
      >>> import ddim_jax as ddim
      >>> from ddim_jax.process.predictor import variance_of
      >>> config = UNetConfig(out_channels=6)
      >>> network = network_of(config, Prediction(), ddim.linear_schedule(1000))
      >>> variance_of(network) is not None
      True
    """
    from ddim_jax.networks.unet import make_apply  # here, as flax takes half a second to import

    twice = config.out_channels == 2 * config.in_channels
    return predicts(make_apply(config), prediction, schedule=schedule, learned_variance=twice)


SAYING_HOW = {"sampling", "openai_flags"}  # the facts by which a model says how it is sampled


class Stored(NamedTuple):
    """How a model says that it is sampled."""

    model: Model  # with what is done to x̂_0
    tau: Any  # (S,)
    method: Method


def own_tau(model: Model, steps: int | None, usual: bool) -> np.ndarray | None:
    """`model.tau`, if it has one.

    Args:
      model: any.
      steps: S, as asked for.
      usual: that DDIM with η = 0 is asked for.

    Raises:
      ValueError: it has one, and other steps or another way are asked for.

    Example:
      >>> import ddim_jax as ddim
      >>> own_tau(ddim.load_model("digits"), 5, usual=True) is None
      True
    """
    tau = model.tau
    if tau is not None and (steps not in (None, len(tau)) or not usual):
        raise ValueError(
            f"the model is distilled to S = {len(tau)}, along tau = {','.join(map(str, tau))} by "
            "ddim with eta = 0: leave out steps, spacing, method and eta, or give a tau to draw it "
            "otherwise"
        )
    return tau


def stored(
    model: Model,
    steps: int | None = None,
    *,
    eta: float | None = None,
    tau: ArrayLike | Sequence[int] | None = None,
    method: Method | None = None,
) -> Stored:
    """What `Model.sampler` gives to `make_sampler`; arguments and errors are its own.

    Example:
      >>> import ddim_jax as ddim
      >>> stored(ddim.load_model("digits"), 5).tau.tolist()
      [200, 400, 600, 800, 1000]
    """
    if steps is not None and tau is not None:
        raise ValueError(f"give steps or tau, not both: got steps = {steps} and a tau")
    if eta is not None and method is not None:
        raise ValueError(f"give eta or a method, not both: got eta = {eta}; ddim(eta) is a method")
    if tau is None and (own := own_tau(model, steps, not eta and method is None)) is not None:
        return Stored(model, own, ddim())
    told, flags = model.facts.get("sampling"), model.facts.get("openai_flags")
    if isinstance(told, Mapping):
        how = recipe(told, eta, model.prediction.kind)
    elif isinstance(flags, Mapping):
        how = openai_recipe(check_flags(flags), eta)
    else:
        if tau is None:
            tau = timesteps(model.schedule.num_steps, 50 if steps is None else steps)
        return Stored(model, tau, method or ddim(eta or 0.0))
    if tau is None:
        most = model.schedule.num_steps
        tau = how.tau(model.schedule, min(how.steps, most) if steps is None else steps)
    if how.x0_fn is not None and model.prediction.x0_fn is None:
        model = predicts(model, x0_fn=how.x0_fn, rederive_eps=how.rederive_eps)
    return Stored(model, tau, method or how.method)


def to_facts(
    schedule: ScheduleConfig, model: UNetConfig, prediction: str | Prediction | None = None
) -> dict[str, Any]:
    """What a checkpoint or weights file must carry to rebuild schedule and network.

    What the network predicts is left out where None; `fit` adds it, and no word means ε.

    Example:
      >>> sorted(to_facts(ScheduleConfig(), UNetConfig(), "v"))
      ['model', 'prediction', 'schedule']
    """
    facts = {"model": model.facts(), "schedule": schedule.facts()}
    if isinstance(prediction, str):
        prediction = Prediction(prediction)
    return facts | (prediction.facts() if prediction else {})


def from_facts(facts: Mapping[str, Any]) -> tuple[ScheduleConfig, UNetConfig]:
    """Schedule and network configuration back from `to_facts`, through JSON or not.

    Args:
      facts: a dict with "model" and "schedule".

    Returns:
      (ScheduleConfig, UNetConfig).

    Raises:
      ValueError: a part is missing, or has fields this version does not know.

    Example:
      >>> facts = to_facts(ScheduleConfig(), UNetConfig(multipliers=(1, 2)))
      >>> schedule, model = from_facts(facts)
      >>> schedule.num_steps, model.multipliers
      (1000, (1, 2))
    """
    try:
        model: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in facts["model"].items()
        }
        return ScheduleConfig.from_facts(facts["schedule"]), UNetConfig(**model)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no model and schedule that this version understands: {error}") from error
