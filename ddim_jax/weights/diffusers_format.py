"""Folders of the diffusers library: a `UNet2DModel`, and the pipeline that holds it.

Only networks equal to Ho et al.'s are read, such as google/ddpm-cifar10-32; any other setting is
refused by name. Nothing here needs diffusers or PyTorch.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.process.schedule import ScheduleConfig
from ddim_jax.storage.weights_file import read_safetensors, write_safetensors
from ddim_jax.weights.diffusers_config import unet_config, unet_settings
from ddim_jax.weights.diffusers_scheduler import (
    sampling_facts,
    schedule_config,
    whole_scheduler,
)
from ddim_jax.weights.state_dict import from_checkpoint, from_state_dict, to_state_dict
from ddim_jax.weights.torch_files import load_torch

WEIGHTS = "diffusion_pytorch_model"
FACTS = "ddim_jax_facts"  # in the header of the weights that we write

RENAMES = [
    (r"^down\.", "down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
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
    (r"^label_embedding$", "class_embedding.weight"),
]
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
    return path.stem == WEIGHTS and (path.parent / "config.json").is_file()


def read_diffusers(folder: pathlib.Path) -> Contents:
    """Reads a `UNet2DModel` folder, or a pipeline folder with unet/ and scheduler/ in it.

    Args:
      folder: holds config.json and diffusion_pytorch_model.safetensors (or .bin), itself or in
        unet/; scheduler_config.json beside them or in scheduler/.

    Returns:
      `Contents`; the facts hold the scheduler's settings for sampling, "clip_sample" for one.

    Raises:
      ValueError: a file is missing or damaged, a setting is not one of Ho et al.'s network, or the
        weights do not fit; the message names it.
    """
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise ValueError(
            f"{folder} is a folder, but not a run (it has no checkpoints/ in it) and not a "
            "diffusers model (it has no config.json)"
        )
    settings = _read_json(inner / "config.json")
    state, facts = _read_weights(inner)
    num_classes = facts.get("model", {}).get("num_classes")
    config = unet_config(settings, num_classes)
    params = from_state_dict(state, config, lambda name: diffusers_name(name, config))
    facts = {"source": "diffusers", **facts}
    beside = folder.absolute().parent if folder.absolute().name == "unet" else folder
    for parent in (folder, beside / "scheduler"):
        if (parent / "scheduler_config.json").is_file():
            scheduler = _read_json(parent / "scheduler_config.json")
            schedule, prediction = schedule_config(scheduler)
            index = beside / "model_index.json"
            pipeline = _read_json(index).get("_class_name") if index.is_file() else None
            facts["sampling"] = sampling_facts(scheduler, pipeline)
            return Contents(params, config, schedule, prediction, facts)
    return Contents(params, config, None, "eps", facts)


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
      config: of the network; `multipliers[0]` must be 1, as diffusers has no other.
      schedule: the noise schedule.
      prediction: "eps", "x_0" or "v".
      facts: provenance, kept in the header of the weights; "sampling" in it, as `read_diffusers`
        gives it, goes to the scheduler; else that is `DDIMScheduler` without clipping.

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
    pipeline, scheduler = whole_scheduler(facts.get("sampling"), schedule, prediction)
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
        write_safetensors(temporary / "unet" / f"{WEIGHTS}.safetensors", state, header)
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


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not settings")
    return content


def _read_weights(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights under today's names, and the facts where we wrote them."""
    facts: dict[str, Any] = {}
    if (folder / f"{WEIGHTS}.safetensors").is_file():
        state, header = read_safetensors(folder / f"{WEIGHTS}.safetensors")
        facts = dict(json.loads(header.get(FACTS, "{}")))
    elif (folder / f"{WEIGHTS}.bin").is_file():
        state, _ = from_checkpoint(load_torch(folder / f"{WEIGHTS}.bin"))
    else:
        found = sorted(path.name for path in folder.iterdir())
        raise ValueError(
            f"{folder} has neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin; it has "
            f"{', '.join(found[:8])} (variants and sharded weights are not read)"
        )
    for old, new in OLD_ATTENTION.items():
        pattern = rf"(attentions\.\d+)\.{old}\."
        state = {re.sub(pattern, rf"\1.{new}.", name): array for name, array in state.items()}
    return state, facts
