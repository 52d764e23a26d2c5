"""The config.json of the diffusers library in our words, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ddim_jax.networks.config import UNetConfig

# Each setting of UNet2DModel that must have one value: diffusers' default for it, and that value.
FIXED: dict[str, tuple[Any, Any]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_eps": (1e-5, 1e-6),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
}
FREE = (  # looked at one by one; num_train_timesteps has no meaning in these networks
    *("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types"),
    *("block_out_channels", "layers_per_block", "dropout", "attention_head_dim"),
    *("norm_num_groups", "attn_norm_num_groups", "time_embedding_dim", "num_class_embeds"),
    *("num_train_timesteps",),
)


def unet_config(settings: Mapping[str, Any], num_classes: int | None = None) -> UNetConfig:
    """Our configuration of a `UNet2DModel` of that config.json, if it is Ho et al.'s network.

    Args:
      settings: the content of config.json. What is not in it has diffusers' default.
      num_classes: of a network with labels that was written here: its last label means "none".

    Returns:
      `UNetConfig`.

    Raises:
      ValueError: naming the setting that is different.

    Example:
      >>> unet_config({"_class_name": "UNet2DModel", "freq_shift": 0})
      Traceback (most recent call last):
      ValueError: freq_shift is 0 in config.json, Ho et al.'s network has 1
    """
    name = settings.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(f"_class_name is {name!r} in config.json, only UNet2DModel is read")
    for field, (default, value) in FIXED.items():
        _need(field, settings.get(field, default), value)
    unknown = sorted(
        f for f in settings if not f.startswith("_") and f not in FIXED and f not in FREE
    )
    if unknown:
        raise ValueError(f"config.json has settings that are unknown here: {', '.join(unknown)}")
    try:
        widths = [int(width) for width in settings["block_out_channels"]]
        down = [name.removeprefix("UNetRes") for name in settings["down_block_types"]]
        up = [name.removeprefix("UNetRes") for name in settings["up_block_types"]]
        size, channels = settings["sample_size"], settings.get("in_channels", 3)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"config.json does not say the shape of the network: {error}") from error
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
        size = size[0] if size[0] == size[1] else (size[0], size[1])
    if type(size) not in (int, tuple):
        raise ValueError(f"sample_size is {size!r} in config.json, a side or [H, W] is needed")
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels is {widths}: not multiples of the first of them")
    _need("down_block_types", len(down), len(widths), "the length of block_out_channels")
    for block in down:
        if block not in ("DownBlock2D", "AttnDownBlock2D"):
            raise ValueError(f"down_block_types has {block!r}, Ho et al.'s network has none")
    mirrored = [block.replace("Down", "Up") for block in reversed(down)]
    _need("up_block_types", up, mirrored, "its way down mirrored, ")
    attended = [i for i, block in enumerate(down) if block == "AttnDownBlock2D"]
    head = settings.get("attention_head_dim", 8)
    if head is not None and {widths[i] for i in [*attended, -1]} != {head}:
        raise ValueError(
            f"attention_head_dim is {head} in config.json, Ho et al.'s network has one head (null)"
        )
    _need("out_channels", settings.get("out_channels", 3), channels, "in_channels, ")
    groups = settings.get("norm_num_groups", 32)
    if settings.get("attn_norm_num_groups") not in (None, groups):
        raise ValueError(
            f"attn_norm_num_groups is {settings['attn_norm_num_groups']}, not {groups}"
        )
    if settings.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise ValueError(
            f"time_embedding_dim is {settings['time_embedding_dim']}, not {4 * widths[0]}"
        )
    labels = None if num_classes is None else num_classes + 1
    if settings.get("num_class_embeds") != labels:
        raise ValueError(
            f"num_class_embeds is {settings.get('num_class_embeds')!r} in config.json: networks "
            "with labels are read only where ddim_jax wrote them, as ours have one for 'no label'"
        )
    config = UNetConfig(
        image_size=size,
        in_channels=channels,
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        num_blocks=settings.get("layers_per_block", 2),
        attention_resolutions=(),
        dropout=float(settings.get("dropout", 0.0)),
        num_classes=num_classes,
        norm_groups=groups,
    )
    resolutions = tuple(config.resolutions[i] for i in attended)
    return dataclasses.replace(config, attention_resolutions=resolutions)


def unet_settings(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` that is this network: `unet_config` undone.

    Args:
      config: the network; `multipliers[0]` must be 1.

    Returns:
      A JSON-able dict.

    Raises:
      ValueError: diffusers has no such network.

    Example:
      >>> settings = unet_settings(UNetConfig())
      >>> settings["down_block_types"]
      ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D']
      >>> unet_config(settings) == UNetConfig()
      True
    """
    if config.multipliers[0] != 1:
        raise ValueError(
            f"multipliers are {config.multipliers}: diffusers needs the first of them to be 1"
        )
    attended = [size in config.attention_resolutions for size in config.resolutions]
    return {
        "_class_name": "UNet2DModel",
        **{name: value for name, (_, value) in FIXED.items()},
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "block_out_channels": [m * config.channels for m in config.multipliers],
        "layers_per_block": config.num_blocks,
        "attention_head_dim": None,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": None if config.num_classes is None else config.num_classes + 1,
    }


def _need(field: str, got: Any, want: Any, which: str = "") -> None:
    if got != want:
        raise ValueError(
            f"{field} is {got!r} in config.json, Ho et al.'s network has {which}{want!r}"
        )
