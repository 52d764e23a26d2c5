"""Trained models by name or path, whatever wrote them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax

from ddim_jax.networks.config import UNetConfig
from ddim_jax.networks.inputs import check_params
from ddim_jax.networks.paper import PAPER
from ddim_jax.process import PREDICTIONS, Prediction, ScheduleConfig
from ddim_jax.process.prediction import SIGMA_DATA
from ddim_jax.storage.weights_file import is_ours, load_weights, read_safetensors
from ddim_jax.weights import hub
from ddim_jax.weights.containers import find_state
from ddim_jax.weights.diffusers_config import unet_config
from ddim_jax.weights.diffusers_format import (
    Contents,
    check_settings,
    is_diffusers_weights,
    read_diffusers,
    read_json,
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
    dtype: str | None = None,
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
      source: a model that ships with the package, "cifar10-small", in colour and with classes, or
        "digits", with classes "digits-labels", each distilled to four calls, "cifar10-small-4" and
        "digits-4"; a run folder of `ddim-jax train`; a weights file of `save_model`; a diffusers
        folder (`UNet2DModel`, or a pipeline with one); or a PyTorch checkpoint or .safetensors file
        of Ho et al.'s network by the names of the DDIM authors, of diffusers or of OpenAI, a state
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
      dtype: "float32" or "bfloat16", which the network computes in, in place of what is stored.
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

    if prediction not in (None, *PREDICTIONS):
        raise ValueError(
            f"{source}: unknown prediction type {prediction!r}; known are {PREDICTIONS}"
        )
    if isinstance(config, str):
        config, image_size, schedule = _network(config, image_size, schedule)
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "filename": filename}
    place |= {"token": token, "cache_dir": cache_dir}
    scheduled = schedule is not None and prediction is not None
    check = partial(check_settings, image_size=image_size, scheduled=scheduled)
    fetched = _fetch(source, variant, {k: v for k, v in place.items() if v is not None}, check)
    path = fetched.path if fetched else _find(source)
    leave = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    choices = _Choices(step, ema, config, image_size, part, variant, leave, flags, scheduled)
    kind = _kind(path)
    choices.check(path, kind)
    try:
        stored = _read(path, kind, choices)
        config, schedule = config or stored.config, schedule or stored.schedule
        config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
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


def with_classes(source: str) -> str:
    """The shipped model of the same data that has classes, of a shipped one that has none.

    Example:
      >>> with_classes("digits"), with_classes("runs/mine")
      ('digits-labels', 'runs/mine')
    """
    sibling = f"{source}-labels"
    there = not os.path.exists(source) and (SHIPPED / f"{sibling}.safetensors").is_file()
    return sibling if there and os.path.basename(source) == source else source


class _Choices(NamedTuple):
    """What is to be taken of what lies there; see `load_model`."""

    step: int | None
    ema: bool
    config: UNetConfig | None
    image_size: int | tuple[int, int] | None
    part: str | None
    variant: str | None
    ignore: tuple[str, ...]
    flags: Flags | None
    scheduled: bool  # schedule and prediction are both given

    def check(self, path: pathlib.Path, kind: str) -> None:
        """Refuses a choice that this kind of file does not have, and two of one thing."""
        for given, name, kinds in (
            (self.step is not None, f"step={self.step}", ("run folder",)),
            (not self.ema, "ema=False", ("run folder", "diffusers folder", *FOREIGN)),
            (self.image_size is not None, "image_size", ("diffusers folder", *FOREIGN)),
            (self.flags is not None, "flags", FOREIGN),
            (self.part is not None, f"part={self.part!r}", FOREIGN),
            (self.variant is not None, f"variant={self.variant!r}", ("diffusers folder",)),
            (bool(self.ignore), f"ignore={self.ignore!r}", ("diffusers folder", *FOREIGN)),
        ):
            if given and kind not in kinds:
                raise ValueError(f"{name} is for a {' or a '.join(kinds)}, {path} is a {kind}")
        if self.image_size is not None and self.config is not None:
            raise ValueError("image_size is in place of config: give one of them")
        if self.flags is not None and (self.config or self.image_size) is not None:
            raise ValueError("flags say the whole network: give no config and no image_size too")


def _network(
    config: str, size: int | tuple[int, int] | None, schedule: ScheduleConfig | None
) -> tuple[UNetConfig, int | tuple[int, int] | None, ScheduleConfig | None]:
    """A network by its name, with its schedule; or by its config.json, with the image size."""
    if config.endswith(".json"):
        return unet_config(read_json(pathlib.Path(config)), image_size=size), None, schedule
    if config not in PAPER:
        raise ValueError(
            f"unknown config {config!r}; choose one of {', '.join(PAPER)}, or a config.json"
        )
    return PAPER[config], size, schedule or ScheduleConfig()


def _fetch(
    source: str | os.PathLike[str],
    variant: str | None,
    place: dict[str, Any],
    check: Callable[[pathlib.Path], None],
) -> hub.Fetched | None:
    """The model of the Hub, if it is one."""
    shipped = isinstance(source, str) and (SHIPPED / f"{source}.safetensors").is_file()
    if not shipped and hub.is_hub_name(source):
        return hub.fetch(str(source), variant=variant, check=check, **place)
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
    if path.suffix == ".json":
        raise ValueError(f"{path} is settings, not weights: name the folder that both lie in")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin") or is_torch_file(path):
        return FOREIGN[0]
    return "file of save_model" if is_ours(path) else FOREIGN[1]


def _read(path: pathlib.Path, kind: str, choices: _Choices) -> Contents:
    if kind == "run folder":
        part = "ema" if choices.ema else "params"
        return _read_run(path / "checkpoints", choices.step, part, choices.config)
    if kind == "diffusers folder":
        folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        how = choices.image_size, choices.ema, choices.scheduled
        return read_diffusers(folder, choices.variant, file, choices.ignore, *how)
    if kind not in FOREIGN:
        return _ours(*load_weights(path))
    torch = kind == FOREIGN[0]
    state, facts = find_state(
        load_torch(path) if torch else read_safetensors(path)[0],
        choices.ema,
        choices.part,
        choices.ignore,
    )
    facts = {"source": "PyTorch checkpoint" if torch else "safetensors", **facts}
    name = path.absolute().as_posix()
    return read_state(state, facts, name, choices.config, choices.image_size, choices.flags)


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
