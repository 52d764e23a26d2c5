"""Folders of the diffusers library: a `UNet2DModel`, and the pipeline that holds it.

Any `UNet2DModel` of steps t is read; what is not is refused by name. Nothing here needs diffusers
or PyTorch.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.storage.weights_file import write_safetensors
from ddim_jax.weights.containers import find_state
from ddim_jax.weights.diffusers_config import unet_config, unet_settings
from ddim_jax.weights.diffusers_files import STEM, choose, read_tensors, weights_file
from ddim_jax.weights.diffusers_scheduler import sampling_facts, schedule_config, whole_scheduler
from ddim_jax.weights.state_dict import from_state_dict, to_state_dict

FACTS = "ddim_jax_facts"  # in the header of the weights that we write

RENAMES = [
    (r"^down\.", "down_blocks."),
    (r"\.(down|up)sample\.(block\.|)", r".\1samplers.0."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"^mid\.block_1", "mid_block.resnets.0"),
    (r"^mid\.block_2", "mid_block.resnets.1"),
    (r"^mid\.attn_1", "mid_block.attentions.0"),
    (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"\.(q|k|v)\.", r".to_\1."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^temb\.dense\.0", "time_embedding.linear_1"),
    (r"^temb\.dense\.1", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
    (r"^label\.dense\.0", "class_embedding.linear_1"),
    (r"^label\.dense\.1", "class_embedding.linear_2"),
    (r"^label_embedding$", "class_embedding.weight"),
    (r"^time_table$", "time_proj.weight"),
]
WITHOUT_HARM = {"unet", "scheduler", "mel", "image_processor"}  # parts of a pipeline
AVERAGE = (  # what diffusers' EMAModel adds to config.json
    *("decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
)
# Of a learned variance, which DDIMScheduler does not take: as OpenAI draw.
LEARNED = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Contents(NamedTuple):
    """What a file or folder of weights holds."""

    params: Params
    config: UNetConfig
    schedule: ScheduleConfig | None  # None: it does not say
    prediction: str  # "eps", "x_0" or "v"
    facts: dict[str, Any]


def is_diffusers_weights(path: pathlib.Path) -> bool:
    """Whether it is the weights file of a folder that `read_diffusers` takes."""
    return weights_file(path.name) is not None and (path.parent / "config.json").is_file()


def check_settings(
    path: pathlib.Path, image_size: int | tuple[int, int] | None = None, scheduled: bool = False
) -> None:
    """Refuses a network by its settings alone, before its weights are there.

    Args:
      path: the folder, as `read_diffusers` takes it, or the file in it that the weights will be.
      image_size, scheduled: see `read_diffusers`.
    """
    folder = path if path.is_dir() else path.parent
    settings, _ = _network_settings(_network_folder(folder))
    unet_config(settings, image_size=image_size or settings.get("sample_size") or 512)  # any
    _told(folder, scheduled)


def read_diffusers(
    folder: pathlib.Path,
    variant: str | None = None,
    name: str | None = None,
    ignore: Collection[str] = (),
    image_size: int | tuple[int, int] | None = None,
    ema: bool = True,
    scheduled: bool = False,
) -> Contents:
    """Reads a `UNet2DModel` folder, or a pipeline folder with unet/ and scheduler/ in it.

    Args:
      folder: holds config.json and the weights (see `diffusers_files`), itself or in unet/;
        scheduler_config.json beside them or in scheduler/.
      variant: of the weights, "fp16" for one; without it the plain ones, or the only variant.
      name: the very file of weights, in place of that choice.
      ignore: names of tensors to leave out.
      image_size: a side or (H, W), in place of sample_size, which may be null.
      ema: of a checkpoint of diffusers' training script, unet_ema/ in place of unet/.
      scheduled: whether schedule and prediction are known, so that a scheduler which is not read
        does no harm.

    Returns:
      `Contents`; the facts hold the scheduler's settings for sampling, "clip_sample" for one.

    Raises:
      ValueError: a file is missing or damaged, settings are of no network that is known here,
        or the weights do not fit; the message names them.
    """
    inner = _network_folder(folder, ema)
    settings, average = _network_settings(inner)
    state, facts = _read_weights(inner, variant, name, ignore)
    num_classes = facts.get("model", {}).get("num_classes")
    config = unet_config(settings, num_classes, image_size)
    params = from_state_dict(state, config, lambda name: diffusers_name(name, config))
    facts = {"source": "diffusers", **facts, **({"weights": "moving average"} if average else {})}
    told = _told(folder, scheduled)
    if told is None:
        return Contents(params, config, None, "eps", facts)
    scheduler, schedule, prediction = told
    index = _outer(folder) / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    facts["sampling"] = sampling_facts(scheduler, pipeline)
    return Contents(params, config, schedule, prediction, facts)


def write_diffusers(
    folder: pathlib.Path,
    params: Params,
    config: UNetConfig,
    schedule: ScheduleConfig,
    prediction: str,
    facts: Mapping[str, Any],
) -> None:
    """Writes a folder that `DDIMPipeline.from_pretrained` loads; whole, or not at all.

    Args:
      folder: must not exist, or be empty; its parent must exist.
      params: of the network.
      config: of the network.
      schedule: the noise schedule.
      prediction: "eps", "x_0" or "v".
      facts: provenance, kept in the header of the weights; "sampling" in it, as `read_diffusers`
        gives it, goes to the scheduler; else that is `DDIMScheduler` without clipping, or, of a
        learned variance, `DDPMScheduler`.

    Raises:
      FileExistsError: the folder holds something.
      ValueError: diffusers has no such network.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another")
    settings = unet_settings(config)
    state = {
        diffusers_name(name, config): array[:, :, 0, 0] if _is_linear(name) else array
        for name, array in to_state_dict(params).items()
    }
    twice = config.out_channels == 2 * config.in_channels
    usual = {"_class_name": "DDPMScheduler", **LEARNED} if twice else None
    pipeline, scheduler = whole_scheduler(facts.get("sampling", usual), schedule, prediction)
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        temporary = pathlib.Path(scratch) / "folder"
        for name, content in {
            "model_index.json": index,
            "unet/config.json": settings,
            "scheduler/scheduler_config.json": scheduler,
        }.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        header = {"format": "pt", FACTS: json.dumps(dict(facts))}
        write_safetensors(temporary / "unet" / f"{STEM}.safetensors", state, header)
        os.replace(temporary, folder)


def diffusers_name(name: str, config: UNetConfig) -> str:
    """The DDIM authors' name of a tensor in diffusers' words.

    Example:
      >>> diffusers_name("up.0.attn.1.q.weight", UNetConfig())
      'up_blocks.3.attentions.1.to_q.weight'
    """
    last = len(config.multipliers) - 1  # diffusers counts the way up from below
    name = re.sub(r"^up\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", name)
    for pattern, words in RENAMES:
        name = re.sub(pattern, words, name)
    return name


def _is_linear(name: str) -> bool:
    """Whether a 1×1 convolution of the authors' is a linear layer in diffusers."""
    return re.search(r"\.(q|k|v|proj_out)\.weight$", name) is not None


def _network_folder(folder: pathlib.Path, ema: bool = True) -> pathlib.Path:
    """Where config.json and the weights lie, of a folder that is a network or has one in it."""
    there = [folder / n for n in ("unet_ema", "unet") if (folder / n).is_dir()] or [folder]
    inner = there[0 if ema else -1]
    if not ema and len(there) < 2:
        raise ValueError("ema=False, but it holds one set of weights only")
    if not (inner / "config.json").is_file():
        raise ValueError(
            f"{folder} is a folder, but not a run (it has no checkpoints/ in it) and not a "
            "diffusers model (it has no config.json)"
        )
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        parts = {n for n, kind in index.items() if isinstance(kind, list) and any(kind)}
        parts -= WITHOUT_HARM
        if parts:
            raise ValueError(
                f"{folder} is a pipeline that needs {', '.join(sorted(parts))} too, which is not "
                "read here: its network alone draws no images. To load that nevertheless, name "
                "the folder unet in it (of the Hub: subfolder='unet', --subfolder unet)"
            )
    return inner


def _outer(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the pipeline."""
    whole = folder.absolute()
    return whole.parent if whole.name in ("unet", "unet_ema") else whole


def _scheduler(folder: pathlib.Path) -> dict[str, Any] | None:
    """The content of scheduler_config.json, if there is one."""
    outer = _outer(folder)
    run = outer.parent if outer.name.startswith("checkpoint-") else outer
    for place in (folder, outer / "scheduler", run / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return read_json(place / "scheduler_config.json")
    return None


def _told(
    folder: pathlib.Path, scheduled: bool
) -> tuple[dict[str, Any], ScheduleConfig, str] | None:
    """Scheduler, schedule and prediction; None where no scheduler is there, or is needed."""
    scheduler = _scheduler(folder)
    try:
        return None if scheduler is None else (scheduler, *schedule_config(scheduler))
    except ValueError as error:
        if scheduled:
            return None
        without = "; to load without it, give schedule and prediction, --schedule and --prediction"
        raise ValueError(f"{error}{without}") from error


def _network_settings(folder: pathlib.Path) -> tuple[dict[str, Any], bool]:
    """The content of config.json, and whether a moving average wrote its own settings there."""
    settings = read_json(folder / "config.json")
    kept = {name: value for name, value in settings.items() if name not in AVERAGE}
    return kept, len(kept) < len(settings)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; ValueError where it is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not settings")
    return content


def _read_weights(
    folder: pathlib.Path, variant: str | None, name: str | None, ignore: Collection[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights under today's names, and the facts where we wrote them."""
    try:
        file = choose([name] if name else [path.name for path in folder.iterdir()], variant)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tensors, header = read_tensors(folder, file)
    state, about = find_state(tensors, ignore=ignore)
    facts = dict(json.loads(header.get(FACTS, "{}")))
    if "ignored" in about:
        facts["ignored"] = about["ignored"]
    if file.variant is not None:
        facts["variant"] = file.variant
    for old, new in OLD_ATTENTION.items():
        pattern = rf"(attentions\.\d+)\.{old}\."
        state = {re.sub(pattern, rf"\1.{new}.", name): array for name, array in state.items()}
    return state, facts
