"""Models as files: ours, and folders of the diffusers library."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from ddim_jax.process import ScheduleConfig
from ddim_jax.storage.weights_file import save_weights
from ddim_jax.weights.diffusers_format import write_diffusers
from ddim_jax.weights.model import Model, from_facts, to_facts


def save_model(
    path: str | os.PathLike[str], model: Model, *, float16: bool = False, overwrite: bool = False
) -> None:
    """Save a model as one .safetensors file, which `load_model` reads.

    Args:
      path: the file; its directory must exist.
      model: of `load_model`, or your own: its facts must hold `to_facts(schedule, config)`.
      float16: halve the file; weights are rounded to 11 bits and read back as float32.
      overwrite: replace the file if it exists.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.
      ValueError: the facts do not say the model's schedule.

    Example:
      >>> import ddim_jax as ddim, tempfile
      >>> path = tempfile.mkdtemp() + "/digits.safetensors"
      >>> save_model(path, ddim.load_model("digits"))
      >>> ddim.load_model(path).image_shape
      (8, 8, 1)
    """
    facts = {**model.facts, **to_facts(_schedule(model), model.config, model.prediction)}
    save_weights(path, model.params, facts, float16=float16, overwrite=overwrite)


def save_diffusers(folder: str | os.PathLike[str], model: Model) -> None:
    """Save a model as a folder that diffusers loads, by `DDIMPipeline.from_pretrained(folder)`.

    The network alone is `UNet2DModel.from_pretrained(folder, subfolder="unet")`.

    Args:
      folder: must not exist, or be empty; its parent must exist.
      model: as for `save_model`; its config must have `multipliers[0] == 1`.

    Raises:
      FileExistsError: the folder holds something.
      ValueError: diffusers has no such network, or no place for the τ of a distilled model; or the
        facts do not say the model's schedule.

    Example:
      >>> import ddim_jax as ddim, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> save_diffusers(folder, ddim.load_model("digits"))
      >>> ddim.load_model(folder).image_shape
      (8, 8, 1)
    """
    if model.tau is not None:
        raise ValueError(
            f"the model is distilled to the τ {model.tau.tolist()}, which a diffusers folder does "
            "not hold, and is wrong along another: save it as one .safetensors file"
        )
    schedule = _schedule(model)
    facts = {**model.facts, **to_facts(schedule, model.config, model.prediction)}
    write_diffusers(
        pathlib.Path(folder), model.params, model.config, schedule, model.prediction.kind, facts
    )


def _schedule(model: Model) -> ScheduleConfig:
    """The schedule of the facts, if it is the model's."""
    schedule, _ = from_facts(model.facts)
    wanted = np.asarray(model.schedule.log_alpha_bar, np.float64)
    got = np.asarray(schedule.build().log_alpha_bar)
    if got.shape != wanted.shape or not np.allclose(got, wanted, rtol=1e-5):
        raise ValueError(
            'facts["schedule"] is not the schedule of this model; set it by '
            "to_facts(ScheduleConfig(...), config). A schedule that no ScheduleConfig makes cannot "
            "be saved"
        )
    return schedule
