"""Trained models by name or path: the shipped one, a run folder, or a weights file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from ddim_jax import unet
from ddim_jax._types import Array, Denoiser
from ddim_jax.schedule import Schedule, ScheduleConfig
from ddim_jax.weights import load_weights

SHIPPED = pathlib.Path(__file__).parent / "models"


class Model(NamedTuple):
    """A trained network and all that sampling from it needs."""

    apply_fn: Callable[..., Array]  # (params, x, t, dropout_key=None, labels=None) → ε
    params: Any  # nested dict of float32 arrays, the moving average of training
    schedule: Schedule
    config: unet.UNetConfig
    facts: dict[str, Any]  # provenance: data, training, scores

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its images."""
        return (self.config.image_size, self.config.image_size, self.config.in_channels)

    @property
    def denoise(self) -> Denoiser:
        """(x, t) → ε with the weights closed over, for `ddim.sample` outside of jit.

        Inside your own `jax.jit` pass `params` as an argument instead, or they become constants.
        """
        return partial(self.apply_fn, self.params)


def load_model(source: str | os.PathLike[str]) -> Model:
    """Load a trained model.

    Args:
      source: "digits", the model that ships with the package; a run folder of `ddim-jax train`
        (its latest checkpoint's moving average); or a weights file of `save_weights`.

    Returns:
      A `Model`, its weights on the default device.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: what is there is not a model, is damaged, or is from a newer version.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> model = ddim.load_model("digits")
      >>> x_T = ddim.initial_noise(jax.random.key(0), 2, model.image_shape)
      >>> ddim.sample(model.denoise, x_T, model.schedule, ddim.timesteps(1000, 5)).shape
      (2, 8, 8, 1)
    """
    path = pathlib.Path(source)
    shipped = SHIPPED / f"{source}.safetensors"
    if not path.exists() and shipped.parent == SHIPPED and shipped.is_file():
        path = shipped
    if path.is_dir():
        from ddim_jax.checkpoint import restore_config, restore_part

        folder = path / "checkpoints"
        if not folder.is_dir():
            raise ValueError(f"{path} is a folder but not a run: it has no checkpoints/ in it")
        facts, params = restore_config(folder), restore_part(folder, "ema")
    elif path.is_file():
        params, facts = load_weights(path)
    else:
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors")))
        raise FileNotFoundError(
            f"no model {str(source)!r}: give a run folder, a .safetensors file, or the name of a "
            f"shipped model ({names})"
        )
    try:
        schedule, config = from_facts(facts)
        unet.check_params(params, unet.abstract_params(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    apply_fn = unet.make_apply(config)
    return Model(apply_fn, jax.device_put(params), schedule.build(), config, facts)


def to_facts(schedule: ScheduleConfig, model: unet.UNetConfig) -> dict[str, Any]:
    """What a checkpoint or weights file must carry to rebuild schedule and network."""
    return {
        "model": dataclasses.asdict(model),
        "schedule": dataclasses.asdict(schedule),
    }


def from_facts(facts: dict[str, Any]) -> tuple[ScheduleConfig, unet.UNetConfig]:
    """Schedule and network configuration back from `to_facts`, through JSON or not.

    Args:
      facts: a dict with "model" and "schedule".

    Returns:
      (ScheduleConfig, UNetConfig).

    Raises:
      ValueError: a part is missing, or has fields this version does not know.

    Example:
      >>> facts = to_facts(ScheduleConfig(), unet.UNetConfig(multipliers=(1, 2)))
      >>> schedule, model = from_facts(facts)
      >>> schedule.num_steps, model.multipliers
      (1000, (1, 2))
    """
    try:
        model: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in facts["model"].items()
        }
        return ScheduleConfig(**facts["schedule"]), unet.UNetConfig(**model)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no model and schedule that this version understands: {error}") from error
