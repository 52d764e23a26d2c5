"""Trained models by name or path, whatever wrote them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from ddim_jax.networks.config import UNetConfig
from ddim_jax.networks.inputs import check_params
from ddim_jax.networks.paper import PAPER
from ddim_jax.process import PREDICTIONS, Prediction, ScheduleConfig, predicts
from ddim_jax.process.prediction import SIGMA_DATA
from ddim_jax.storage.weights_file import load_weights, save_weights
from ddim_jax.weights.diffusers_format import (
    Contents,
    is_diffusers_weights,
    read_diffusers,
    write_diffusers,
)
from ddim_jax.weights.model import Model, from_facts, to_facts
from ddim_jax.weights.state_dict import from_checkpoint, from_state_dict, infer_config
from ddim_jax.weights.torch_files import is_torch_file, load_torch

SHIPPED = pathlib.Path(__file__).parents[1] / "models"
# As released: ema_diffusion_cifar10_model/model-790000.ckpt, diffusion_cifar10_model-790000.ckpt
RELEASED = re.compile(r"diffusion_(cifar10|lsun_\w+)_model(/model)?-\d+\.ckpt$")


def load_model(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = True,
    config: UNetConfig | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    schedule: ScheduleConfig | None = None,
    prediction: str | None = None,
) -> Model:
    """Load a trained model, whatever wrote it.

    Args:
      source: "digits", or with classes "digits-labels", the models that ship with the package; a
        run folder of `ddim-jax train`; a weights file of `save_model`; a diffusers folder
        (`UNet2DModel`, or a pipeline with one); or a PyTorch checkpoint of Ho et al.'s network as
        the DDIM authors name its tensors, a state dict or their training list.
      step: of a run folder, which checkpoint; by default the latest.
      ema: the moving average, where there is one (run folder, training list); else the weights
        themselves.
      config: the network, in place of the one that is stored or inferred; or the name of a network
        of the paper, "cifar10", "celeba64" or "lsun256", each with the linear schedule.
      image_size: of a PyTorch checkpoint, a side or (H, W); the rest of the network is inferred.
      schedule: the noise schedule, in place of the one that is stored, if any.
      prediction: what the network predicts, "eps", "x_0", "v" or "edm", in place of what is stored;
        "eps" where nothing is.

    Returns:
      A `Model`, its weights on the default device; it knows what it predicts.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: what is there is not a model, is damaged, hostile or from a newer version, does
        not fit the network, or does not say its image size or schedule.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> model = ddim.load_model("digits")
      >>> x_T = ddim.initial_noise(jax.random.key(0), 2, model.image_shape)
      >>> ddim.sample(model.denoise, x_T, model.schedule, ddim.timesteps(1000, 5)).shape
      (2, 8, 8, 1)
    """
    from ddim_jax.networks import unet  # here, as flax takes half a second to import

    path = _find(source)
    if isinstance(config, str):
        if config not in PAPER:
            raise ValueError(f"unknown config {config!r}; choose one of {', '.join(PAPER)}")
        config, schedule = PAPER[config], schedule or ScheduleConfig()
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"{path}: unknown prediction type {prediction!r}; known are {PREDICTIONS}")
    run = (path / "checkpoints").is_dir()
    torch = path.is_file() and (path.suffix in (".ckpt", ".pt", ".pth") or is_torch_file(path))
    if step is not None and not run:
        raise ValueError(f"step={step} is for run folders, {path} is none")
    if not ema and not run and not torch:
        raise ValueError(f"ema=False, but {path} holds one set of weights only")
    if image_size is not None and (config is not None or not torch):
        raise ValueError("image_size is for PyTorch checkpoints, in place of config")
    try:
        if run:
            stored = _read_run(path / "checkpoints", step, "ema" if ema else "params", config)
        elif path.is_dir():
            stored = read_diffusers(path)
        elif torch:
            stored = _read_torch(path, ema, config, image_size)
        else:
            params, facts = load_weights(path)
            stored = _ours(params, facts)
        config, schedule = config or stored.config, schedule or stored.schedule
        prediction = prediction or stored.prediction
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction type {prediction!r}; known are {PREDICTIONS}")
        if schedule is None:
            raise ValueError(
                "it holds no noise schedule: pass schedule=ScheduleConfig(), or --schedule linear, "
                "if it is the paper's, linear from 1e-4 to 0.02 with T = 1000"
            )
        built = schedule.build()
        check_params(stored.params, unet.abstract_params(config))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        if str(error).startswith((str(path), str(path.resolve()))):
            raise
        raise ValueError(f"{path}: {error}") from error
    told = Prediction(prediction, sigma_data=stored.facts.get("sigma_data", SIGMA_DATA))
    apply_fn = predicts(unet.make_apply(config), told, schedule=built)
    facts = {**stored.facts, **to_facts(schedule, config, told)}
    params = jax.device_put(stored.params)
    return Model(apply_fn, params, built, config, facts)


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
      ValueError: diffusers has no such network, or the facts do not say the model's schedule.

    Example:
      >>> import ddim_jax as ddim, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> save_diffusers(folder, ddim.load_model("digits"))
      >>> ddim.load_model(folder).image_shape
      (8, 8, 1)
    """
    schedule = _schedule(model)
    facts = {**model.facts, **to_facts(schedule, model.config, model.prediction)}
    write_diffusers(
        pathlib.Path(folder), model.params, model.config, schedule, model.prediction.kind, facts
    )


def with_classes(source: str) -> str:
    """The shipped model of the same data that has classes, of a shipped one that has none.

    Example:
      >>> with_classes("digits"), with_classes("runs/mine")
      ('digits-labels', 'runs/mine')
    """
    sibling = f"{source}-labels"
    there = not os.path.exists(source) and (SHIPPED / f"{sibling}.safetensors").is_file()
    return sibling if there and os.path.basename(source) == source else source


def _find(source: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(source)
    shipped = SHIPPED / f"{source}.safetensors"
    if not path.exists() and shipped.parent == SHIPPED and shipped.is_file():
        return shipped
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors")))
        raise FileNotFoundError(
            f"no model {str(source)!r}: give a run folder, a diffusers folder, a .safetensors or "
            f"PyTorch file, or the name of a shipped model ({names})"
        )
    return path.parent if is_diffusers_weights(path) else path


def _ours(params: Any, facts: dict[str, Any]) -> Contents:
    schedule, config = from_facts(facts)
    return Contents(params, config, schedule, facts.get("prediction", "eps"), facts)


def _read_run(
    folder: pathlib.Path, step: int | None, part: str, config: UNetConfig | None
) -> Contents:
    from ddim_jax.storage.checkpoint import restore_config, restore_part

    facts = restore_config(folder, step)
    if "model" in facts:
        return _ours(restore_part(folder, part, step), facts)
    if config is None:
        raise ValueError(
            "this run does not say its network, as fit(...) was given no facts. If it is a U-Net "
            "of ddim_jax, pass config=UNetConfig(...) and schedule=ScheduleConfig(...). Of a "
            "network of your own read the moving average by ddim_jax.storage.checkpoint."
            f"restore_part({str(folder)!r}, 'ema'), and sample with make_sampler. Of the next run "
            "load_model knows more with fit(..., facts=to_facts(schedule, config))"
        )
    return Contents(restore_part(folder, part, step), config, None, "eps", facts)


def _read_torch(
    path: pathlib.Path,
    ema: bool,
    config: UNetConfig | None,
    image_size: int | tuple[int, int] | None,
) -> Contents:
    state, facts = from_checkpoint(load_torch(path), ema)
    schedule = None
    if config is None and image_size is not None:
        config = infer_config(state, image_size)
    if config is None:
        alike = _paper_network(state)
        if alike is None or not RELEASED.search(path.absolute().as_posix()):
            hint = f" (its shapes are those of {alike!r})" if alike else ""
            raise ValueError(
                "a PyTorch checkpoint holds neither the image size nor the noise schedule: pass "
                f"config={' or '.join(map(repr, PAPER))}, a network of the paper{hint}, or "
                "image_size=... and schedule=ScheduleConfig(...)"
            )
        config, schedule = PAPER[alike], ScheduleConfig()
    params = from_state_dict(state, config)
    return Contents(params, config, schedule, "eps", {"source": "PyTorch checkpoint", **facts})


def _paper_network(state: dict[str, np.ndarray]) -> str | None:
    """The name of the paper's network that has these shapes."""
    infer_config(state, 4096)  # says what is wrong where the names are foreign
    for name, known in PAPER.items():
        with contextlib.suppress(ValueError):
            if infer_config(state, known.image_size) == known:
                return name
    return None


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
