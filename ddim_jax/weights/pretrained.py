"""Trained models by name or path, whatever wrote them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from ddim_jax.networks.config import UNetConfig
from ddim_jax.networks.inputs import check_params
from ddim_jax.networks.paper import PAPER
from ddim_jax.process import PREDICTIONS, Prediction, ScheduleConfig
from ddim_jax.process.prediction import SIGMA_DATA
from ddim_jax.storage.weights_file import is_ours, load_weights, read_safetensors, save_weights
from ddim_jax.weights import hub
from ddim_jax.weights.containers import find_state
from ddim_jax.weights.diffusers_config import unet_config
from ddim_jax.weights.diffusers_format import (
    Contents,
    check_settings,
    is_diffusers_weights,
    read_diffusers,
    read_json,
    write_diffusers,
)
from ddim_jax.weights.model import Model, from_facts, network_of, to_facts
from ddim_jax.weights.namings import read_state
from ddim_jax.weights.openai_flags import Flags
from ddim_jax.weights.torch_files import is_torch_file, load_torch

FOREIGN = ("PyTorch checkpoint", ".safetensors file")
SHIPPED = pathlib.Path(__file__).parents[1] / "models"


def load_model(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = True,
    config: UNetConfig | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    schedule: ScheduleConfig | None = None,
    prediction: str | None = None,
    part: str | None = None,
    variant: str | None = None,
    ignore: Collection[str] = (),
    revision: str | None = None,
    subfolder: str | None = None,
    filename: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    flags: Flags | None = None,
) -> Model:
    """Load a trained model, whatever wrote it.

    Args:
      source: "digits", or with classes "digits-labels", the models that ship with the package; a
        run folder of `ddim-jax train`; a weights file of `save_model`; a diffusers folder
        (`UNet2DModel`, or a pipeline with one); or a PyTorch checkpoint or .safetensors file of
        Ho et al.'s network by the names of the DDIM authors, of diffusers or of OpenAI, a state
        dict or one in the dicts and lists that training programs put it in; or, where there is no
        such path, "org/name" on the Hugging Face Hub, one of these there.
      step: of a run folder, which checkpoint; by default the latest.
      ema: the moving average, where there is one (run folder, checkpoint); else the weights
        themselves.
      config: the network, in place of the one that is stored or inferred; or the path of a
        config.json of diffusers; or the name of a network of the paper, "cifar10", "celeba64" or
        "lsun256", each with the linear schedule.
      image_size: of a file with the DDIM authors' names, a side or (H, W); the rest of the network
        is inferred. Of a diffusers folder, in place of its sample_size, which may be null.
      schedule: the noise schedule, in place of the one that is stored, if any.
      prediction: what the network predicts, "eps", "x_0", "v" or "edm", in place of what is stored;
        "eps" where nothing is.
      part: of a checkpoint with several networks, the name of one, such as "model" or "ema".
      variant: of a diffusers folder, such as "fp16"; by default the plain weights, or the only
        variant.
      ignore: tensors to leave out that are not the network's, such as ("logvar", "betas"); `*`
        stands for anything.
      revision: of the Hub, a branch, tag or commit; by default its main branch.
      subfolder: of the Hub, the folder in a repository.
      filename: of the Hub, the file that is the model, where there are several.
      token: of the Hub, as huggingface_hub takes it; by default HF_TOKEN or `hf auth login`.
      cache_dir: of the Hub, in place of huggingface_hub's own.
      flags: of OpenAI's improved-diffusion and guided-diffusion, by their names: a dict, a command
        line "--image_size 64 …", a JSON file, or the name of a model that they published, such as
        "guided-imagenet64". Their published files are known by name, and need none.

    Returns:
      A `Model`, its weights on the default device; it knows what it predicts.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ModuleNotFoundError, PermissionError, ConnectionError: of the Hub, see `weights.hub.fetch`.
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

    config, schedule = _network(config, schedule)
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(
            f"{source}: unknown prediction type {prediction!r}; known are {PREDICTIONS}"
        )
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "filename": filename}
    place |= {"token": token, "cache_dir": cache_dir}
    fetched = _fetch(source, variant, {k: v for k, v in place.items() if v is not None})
    path = fetched.path if fetched else _find(source)
    kind, leave = _kind(path), [ignore] if isinstance(ignore, str) else list(ignore)
    for given, name, kinds in (
        (step is not None, f"step={step}", ("run folder",)),
        (not ema, "ema=False", ("run folder", "diffusers folder", *FOREIGN)),
        (image_size is not None, "image_size", ("diffusers folder", *FOREIGN)),
        (flags is not None, "flags", FOREIGN),
        (part is not None, f"part={part!r}", FOREIGN),
        (variant is not None, f"variant={variant!r}", ("diffusers folder",)),
        (bool(ignore), f"ignore={ignore!r}", ("diffusers folder", *FOREIGN)),
    ):
        if given and kind not in kinds:
            raise ValueError(f"{name} is for a {' or a '.join(kinds)}, {path} is a {kind}")
    if image_size is not None and config is not None:
        raise ValueError("image_size is in place of config: give one of them")
    if flags is not None and (config is not None or image_size is not None):
        raise ValueError("flags say the whole network: give no config and no image_size too")
    try:
        if kind == "run folder":
            stored = _read_run(path / "checkpoints", step, "ema" if ema else "params", config)
        elif kind == "diffusers folder":
            folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
            stored = read_diffusers(folder, variant, file, leave, image_size, ema)
        elif kind in FOREIGN:
            which = (ema, part, leave)
            stored = _read_foreign(path, kind == FOREIGN[0], which, config, image_size, flags)
        else:
            stored = _ours(*load_weights(path))
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
    apply_fn = network_of(config, told, built)
    facts = {**stored.facts, **(fetched.facts if fetched else {})}
    facts |= to_facts(schedule, config, told)
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


def _network(
    config: UNetConfig | str | None, schedule: ScheduleConfig | None
) -> tuple[UNetConfig | None, ScheduleConfig | None]:
    """A network by its name or file, with its schedule."""
    if not isinstance(config, str):
        return config, schedule
    if config.endswith(".json"):
        return unet_config(read_json(pathlib.Path(config))), schedule
    if config not in PAPER:
        raise ValueError(
            f"unknown config {config!r}; choose one of {', '.join(PAPER)}, or a config.json"
        )
    return PAPER[config], schedule or ScheduleConfig()


def _fetch(
    source: str | os.PathLike[str], variant: str | None, place: dict[str, Any]
) -> hub.Fetched | None:
    """The model of the Hub, if it is one."""
    shipped = isinstance(source, str) and (SHIPPED / f"{source}.safetensors").is_file()
    if not shipped and hub.is_hub_name(source):
        return hub.fetch(str(source), variant=variant, check=check_settings, **place)
    if place:
        raise ValueError(
            f"{', '.join(place)}: of models on the Hub, org/name; {str(source)!r} is none"
            + (", as there is such a path here" if os.path.exists(source) else "")
        )
    return None


def _find(source: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(source)
    shipped = SHIPPED / f"{source}.safetensors"
    if not path.exists() and shipped.parent == SHIPPED and shipped.is_file():
        return shipped
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors")))
        raise FileNotFoundError(
            f"no model {str(source)!r}: give a run folder, a diffusers folder, a .safetensors or "
            f"PyTorch file, the name of a shipped model ({names}), or org/name of the Hub"
        )
    return path


def _kind(path: pathlib.Path) -> str:
    """Who reads it, by what lies there."""
    if path.is_dir():
        return "run folder" if (path / "checkpoints").is_dir() else "diffusers folder"
    if is_diffusers_weights(path):
        return "diffusers folder"
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin") or is_torch_file(path):
        return FOREIGN[0]
    return "file of save_model" if is_ours(path) else FOREIGN[1]


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


def _read_foreign(
    path: pathlib.Path,
    torch: bool,
    which: tuple[bool, str | None, Collection[str]],
    config: UNetConfig | None,
    image_size: int | tuple[int, int] | None,
    flags: Flags | None,
) -> Contents:
    state, facts = find_state(load_torch(path) if torch else read_safetensors(path)[0], *which)
    facts = {"source": "PyTorch checkpoint" if torch else "safetensors", **facts}
    return read_state(state, facts, path.absolute().as_posix(), config, image_size, flags)


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
