"""A state dict under one of the known namings, as a network of ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.networks.config import UNetConfig
from ddim_jax.networks.paper import PAPER
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.weights.containers import few
from ddim_jax.weights.diffusers_format import Contents, diffusers_name
from ddim_jax.weights.openai_flags import Flags
from ddim_jax.weights.openai_format import read_openai
from ddim_jax.weights.state_dict import from_state_dict, infer_config

# As released: ema_diffusion_cifar10_model/model-790000.ckpt, diffusion_cifar10_model-790000.ckpt
RELEASED = re.compile(r"diffusion_(cifar10|lsun_\w+)_model(/model)?-\d+\.ckpt$")
NAMINGS = {  # how some name in a state dict begins, by who names so
    "the DDIM authors": ("down.0.", "temb.dense."),
    "diffusers": ("down_blocks.", "time_embedding."),
    "OpenAI": ("input_blocks.", "time_embed."),
}


def naming(state: Mapping[str, np.ndarray]) -> str:
    """Whose names a state dict has, one of `NAMINGS`.

    Example:
      >>> naming({"down_blocks.0.resnets.0.norm1.weight": np.ones(32)})
      'diffusers'
    """
    for who, heads in NAMINGS.items():
        if any(name.startswith(heads) for name in state):
            return who
    raise ValueError(
        f"not the names of Ho et al.'s network, be it by {', '.join(NAMINGS)}; it has "
        f"{few(sorted(state))}"
    )


def read_state(
    state: dict[str, np.ndarray],
    facts: dict[str, Any],
    path: str,
    config: UNetConfig | None,
    image_size: int | tuple[int, int] | None,
    flags: Flags | None = None,
) -> Contents:
    """The network of a state dict, which itself does not tell all of it.

    Args:
      state: of `find_state`.
      facts: of `find_state`.
      path: of the file: the released ones are known by their names.
      config: the network, or
      image_size: of a network with the DDIM authors' names, of which the shapes tell the rest.
      flags: of a network with OpenAI's names, see `read_openai`.

    Returns:
      `Contents`; without a schedule, but for the released files.

    Raises:
      ValueError: the names are foreign, do not fit, or do not say enough.
    """
    who, schedule = naming(state), None
    if who == "OpenAI":
        if config is not None or image_size is not None:
            raise ValueError("these are the names of OpenAI's networks: pass flags, no config")
        return read_openai(state, facts, path, flags)
    if flags is not None:
        raise ValueError(f"flags are of OpenAI's networks, and these are the names of {who}")
    if who == "diffusers" and config is None:
        raise ValueError(
            "these are the names of diffusers, which do not say the network without its settings: "
            "load the folder that config.json and the weights lie in, or pass "
            "config='config.json', --config config.json"
        )
    if config is None and image_size is not None:
        config = infer_config(state, image_size)
    if config is None:
        alike = _paper_network(state)
        if alike is None or not RELEASED.search(path):
            hint = f" (its shapes are those of {alike!r})" if alike else ""
            raise ValueError(
                "such a file holds neither the image size nor the noise schedule: pass "
                f"config={' or '.join(map(repr, PAPER))}, a network of the paper{hint}, or "
                "image_size=... and schedule=ScheduleConfig(...)"
            )
        config, schedule = PAPER[alike], ScheduleConfig()
    known = config
    rename = (lambda name: diffusers_name(name, known)) if who == "diffusers" else str
    params = from_state_dict(state, config, rename)
    return Contents(params, config, schedule, "eps", {"names": who, **facts})


def _paper_network(state: dict[str, np.ndarray]) -> str | None:
    """The name of the paper's network that has these shapes."""
    infer_config(state, 4096)  # says what is wrong where the names are foreign
    for name, known in PAPER.items():
        with contextlib.suppress(ValueError):
            if infer_config(state, known.image_size) == known:
                return name
    return None
