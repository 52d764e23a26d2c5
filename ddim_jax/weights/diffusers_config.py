"""The config.json of the diffusers library in our words, and back."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from ddim_jax.networks.config import UNetConfig
from ddim_jax.weights.diffusers_words import BLOCKS, DEFAULTS, are_counts, block_of, problems_of


def unet_config(
    settings: Mapping[str, Any],
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> UNetConfig:
    """Our configuration of a `UNet2DModel` of that config.json.

    Args:
      settings: the content of config.json. What is not in it has diffusers' default.
      num_classes: of a network with labels that was written here, where its last label may mean
        "none", as no label of diffusers does.
      image_size: a side or (H, W), in place of sample_size, which may be null.

    Returns:
      `UNetConfig`.

    Raises:
      ValueError: naming every setting that cannot be read.

    Example:
      >>> unet_config({"freq_shift": "a", "act_fn": "tanh"}, image_size=32)
      Traceback (most recent call last):
      ValueError: config.json is of no network that is read here:
        act_fn is 'tanh'; known are 'silu', 'swish', 'mish', 'gelu', 'relu'
        freq_shift is 'a', not a number
    """
    name = settings.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(f"_class_name is {name!r} in config.json, only UNet2DModel is read")
    said = {**DEFAULTS, **{k: v for k, v in settings.items() if not k.startswith("_")}}
    problems = [*problems_of(said)]
    size = said["sample_size"] if image_size is None else image_size
    sides: Any = [size, size] if type(size) is int else size
    if size is None:
        problems.append(
            "sample_size is null: pass image_size, --image-size, a side in pixels or (H, W)"
        )
    elif not are_counts(sides) or len(sides) != 2:
        problems.append(f"sample_size is {reprlib.repr(size)}, a side or [H, W] is needed")
    labels = said["num_class_embeds"]
    if num_classes is not None and labels not in (num_classes, num_classes + 1):
        problems.append(f"num_class_embeds is {labels!r}, its facts say {num_classes} classes")
    if not problems:
        height, width = sides
        size = height if height == width else (height, width)
        try:
            own = num_classes is not None and labels == num_classes + 1
            config = UNetConfig(size, **_fields(said, min(sides), own))
            one_head = {width for width, _ in config.attentions} <= {config.head_width}
            return dataclasses.replace(config, head_width=None) if one_head else config
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"in our words: {error}")
    raise ValueError("\n  ".join(["config.json is of no network that is read here:", *problems]))


def _fields(said: Mapping[str, Any], side: int, null_label: bool) -> dict[str, Any]:
    """The fields of a `UNetConfig` but for its `image_size`, of settings without a problem."""
    widths, groups = said["block_out_channels"], said["norm_num_groups"]
    scale_shift = said["resnet_time_scale_shift"] == "scale_shift"
    middle = "attention" if said["add_attention"] else "plain"
    middle = "none" if said["mid_block_type"] is None else middle
    middle_groups = said["attn_norm_num_groups"] or (0 if scale_shift else groups)
    kind = said["class_embed_type"]
    labels = said["num_class_embeds"] if kind is None else None
    act = said["act_fn"].lower()
    learned = said["time_embedding_type"] == "learned"
    (down, resample_down), (up, resample_up) = (_way(said, side, way) for way in ("down", "up"))
    return {
        "in_channels": said["in_channels"],
        "out_channels": _unless(said["in_channels"], said["out_channels"]),
        "channels": widths[0],
        "multipliers": tuple(w / widths[0] if w % widths[0] else w // widths[0] for w in widths),
        "num_blocks": said["layers_per_block"],
        "attention_resolutions": down,
        "attention_resolutions_up": _unless(down, up),
        "dropout": float(said["dropout"]),
        "num_classes": labels - 1 if null_label and labels is not None else labels,
        "null_label": labels is None or null_label,
        "class_embedding": kind or "table",
        "norm_groups": groups,
        "norm_eps": said["norm_eps"],
        "activation": "swish" if act == "silu" else act,
        "scale_shift": scale_shift,
        "head_width": said["attention_head_dim"],
        "middle": middle,
        "middle_scale": said["mid_block_scale_factor"],
        "middle_norm_groups": _unless(groups, middle_groups) if middle == "attention" else None,
        "resample_down": resample_down,
        "resample_up": resample_up,
        "downsample_padding": (1, 1) if said["downsample_padding"] else (0, 1),
        "cosine_first": said["flip_sin_to_cos"],
        "frequency_shift": said["freq_shift"],
        "time_width": _unless(4 * widths[0], said["time_embedding_dim"]),
        "time_table": said["num_train_timesteps"] if learned else None,
        "centre_input": said["center_input_sample"],
    }


def _way(said: Mapping[str, Any], side: int, way: str) -> tuple[tuple[int, ...], Any]:
    """Resolutions with attention, and how levels resample; the first level first."""
    default = "block" if said[f"{way}sample_type"] == "resnet" else "conv"
    blocks = [BLOCKS[block_of(name)] for name in said[f"{way}_block_types"]]
    blocks = blocks if way == "down" else blocks[::-1]
    attended = tuple(side // 2**i for i, (attention, _) in enumerate(blocks) if attention)
    ways = [resample or default for _, resample in blocks]
    ways = ways[:-1] if way == "down" else ways[1:]
    return attended, "conv" if {*ways} <= {"conv"} else tuple(ways)


def unet_settings(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` that is this network: `unet_config` undone.

    Args:
      config: the network.

    Returns:
      A JSON-able dict.

    Raises:
      ValueError: diffusers has no such network; all that it lacks is named.

    Example:
      >>> settings = unet_settings(UNetConfig())
      >>> settings["down_block_types"]
      ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D']
      >>> unet_config(settings) == UNetConfig()
      True
    """
    (down, up), (down_ways, up_ways) = config.attended, config.resampling
    down_levels = [*zip(down, (*down_ways, ""))]
    up_levels = [*zip(up, ("", *up_ways))]
    if lacks := [*_lacks(config, down_levels, up_levels)]:
        raise ValueError(f"diffusers has no such network: {'; '.join(lacks)}")

    def blocks(levels: list[tuple[bool, str]], way: str) -> list[str]:
        plain = {"block": f"Resnet{way}sampleBlock2D"}
        return [f"Attn{way}Block2D" if a else plain.get(r, f"{way}Block2D") for a, r in levels]

    labels, (head, *_) = config.num_classes, [*_head_widths(config), None]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels or config.in_channels,
        "center_input_sample": config.centre_input,
        "time_embedding_type": "positional" if config.time_table is None else "learned",
        "time_embedding_dim": config.time_width,
        "freq_shift": config.frequency_shift,
        "flip_sin_to_cos": config.cosine_first,
        "down_block_types": blocks(down_levels, "Down"),
        "mid_block_type": None if config.middle == "none" else "UNetMidBlock2D",
        "up_block_types": blocks(up_levels[::-1], "Up"),
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_blocks,
        "mid_block_scale_factor": config.middle_scale,
        "downsample_padding": config.downsample_padding[0],
        "downsample_type": "resnet" if (True, "block") in down_levels else "conv",
        "upsample_type": "resnet" if (True, "block") in up_levels else "conv",
        "dropout": config.dropout,
        "act_fn": "silu" if config.activation == "swish" else config.activation,
        "attention_head_dim": head,
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": _unless(*_middle_groups(config)),
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.middle != "plain",
        "class_embed_type": None if config.class_embedding == "table" else config.class_embedding,
        "num_class_embeds": None if labels is None else labels + config.null_label,
        "num_train_timesteps": config.time_table,
    }


def _lacks(
    config: UNetConfig, down: list[tuple[bool, str]], up: list[tuple[bool, str]]
) -> Iterator[str]:
    """What diffusers has not."""
    first = config.widths[0]
    if config.channels != first:
        yield f"multipliers[0] is {config.multipliers[0]}, it has 1"
    if config.sinusoids not in (None, first):
        yield f"sinusoids are {config.sinusoids}, it has {first}, the width of the first level"
    if config.time_scale != 1:
        yield f"time_scale is {config.time_scale}, it has 1"
    for name, levels in (("resample_down", down), ("resample_up", up)):
        if "pool" in {way for _, way in levels}:
            yield f"{name} has 'pool', it has 'conv' and 'block'"
        if {(True, "conv"), (True, "block")} <= {*levels}:
            yield f"{name} has both 'conv' and 'block' at levels with attention, it has one"
    if len(heads := _head_widths(config)) > 1:
        yield f"heads are of several widths, {sorted(heads)}, it has one head_width"
    usual, groups = _middle_groups(config)
    if groups == 0 != usual:
        yield "middle_norm_groups is 0, it has that with scale_shift only"


def _head_widths(config: UNetConfig) -> set[int]:
    """Of all heads; none where each attention has one head."""
    if config.head_width is not None:
        return {config.head_width}
    several = any(count > 1 for _, count in config.attentions)
    return {width // count for width, count in config.attentions} if several else set()


def _middle_groups(config: UNetConfig) -> tuple[int, int]:
    """Groups of the middle's attention that diffusers takes unasked, and ours."""
    usual = 0 if config.scale_shift else config.norm_groups
    if config.middle != "attention":
        return usual, usual
    own = config.middle_norm_groups
    return usual, config.norm_groups if own is None else own


def _unless(usual: Any, value: Any) -> Any:
    """None where it is what None means."""
    return None if value == usual else value
