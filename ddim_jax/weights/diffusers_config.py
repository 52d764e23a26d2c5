"""The config.json of the diffusers library in our words, and back."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from ddim_jax.networks.config import UNetConfig

# The settings of UNet2DModel and diffusers' defaults for them.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# What these settings may be: of other words no network is known here.
WORDS: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, True),
    "time_embedding_type": ("positional", "learned"),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (False, True),
    "class_embed_type": (None, "timestep", "identity"),
}
COUNTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
OPTIONAL = ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds")
NUMBERS = ("mid_block_scale_factor", "norm_eps", "dropout", "freq_shift")
# The blocks of a level: whether with attention, and how it is left; None: as *sample_type says.
BLOCKS: dict[str, tuple[bool, str | None]] = {
    "DownBlock2D": (False, "conv"),
    "UpBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "AttnUpBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "block"),
    "ResnetUpsampleBlock2D": (False, "block"),
}
VARIANCE_EXPLODING = "is for the variance-exploding process, of noise levels σ and no steps t"
REASONS = {  # why other blocks are refused, by what stands in their names
    "Skip": VARIANCE_EXPLODING,
    "Cross": "takes a text or an image too",
    "K": "is of a network that takes noise levels σ and no steps t",
    "coder": "is of an autoencoder",
}


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
    problems = [*_problems(said)]
    size = said["sample_size"] if image_size is None else image_size
    sides: Any = [size, size] if type(size) is int else size
    if size is None:
        problems.append("sample_size is null: pass image_size, a side in pixels or (H, W)")
    elif not _are_counts(sides) or len(sides) != 2:
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
        except (ValueError, TypeError) as error:
            problems.append(f"in our words: {error}")
    raise ValueError("\n  ".join(["config.json is of no network that is read here:", *problems]))


def _problems(said: Mapping[str, Any]) -> Iterator[str]:
    """A line for every setting of a kind, word or block that is not known."""

    def wrong(field: str, what: str) -> str:
        return f"{field} is {reprlib.repr(said[field])}{what}"

    if unknown := sorted(said.keys() - DEFAULTS.keys()):
        yield f"unknown here: {', '.join(unknown)}"
    for field, words in WORDS.items():
        value = said[field].lower() if field == "act_fn" and isinstance(said[field], str) else ""
        if said[field] == "fourier" and field == "time_embedding_type":
            yield wrong(field, f", which {VARIANCE_EXPLODING}")
        elif (value or said[field]) not in words:
            yield wrong(field, f"; known are {', '.join(map(repr, words))}")
    counts = [*COUNTS, *(field for field in OPTIONAL if said[field] is not None)]
    counts += ["num_train_timesteps"] if said["time_embedding_type"] == "learned" else []
    yield from (wrong(f, ", not a whole number >= 1") for f in counts if not _are_counts([said[f]]))
    for field in NUMBERS:
        if type(said[field]) not in (int, float):
            yield wrong(field, ", not a number")
    widths = said["block_out_channels"]
    if not _are_counts(widths) or not widths:
        yield wrong("block_out_channels", ", not a list of widths")
    for way in ("down", "up"):
        field = f"{way}_block_types"
        names = said[field]
        if not isinstance(names, list | tuple) or not all(type(name) is str for name in names):
            yield wrong(field, ", not a list of names")
            continue
        if isinstance(widths, list | tuple) and len(names) != len(widths):
            yield wrong(field, f", not as long as block_out_channels, {len(widths)}")
        for name in dict.fromkeys(names):
            if _block(name) not in BLOCKS or way.title() not in _block(name).replace("sample", ""):
                reasons = (reason for part, reason in REASONS.items() if part in name)
                yield f"{field} has {name!r}, which {next(reasons, 'is not known here')}"


def _fields(said: Mapping[str, Any], side: int, null_label: bool) -> dict[str, Any]:
    """The fields of a `UNetConfig` but for its `image_size`, of settings without a problem."""
    widths, groups, kind = (
        said["block_out_channels"],
        said["norm_num_groups"],
        said["class_embed_type"],
    )
    scale_shift = said["resnet_time_scale_shift"] == "scale_shift"
    middle = "attention" if said["add_attention"] else "plain"
    middle = "none" if said["mid_block_type"] is None else middle
    middle_groups = said["attn_norm_num_groups"] or (0 if scale_shift else groups)
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
    blocks = [BLOCKS[_block(name)] for name in said[f"{way}_block_types"]]
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


def _block(name: str) -> str:
    return name.removeprefix("UNetRes")


def _unless(usual: Any, value: Any) -> Any:
    """None where it is what None means."""
    return None if value == usual else value


def _are_counts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(n) is int and n > 0 for n in values)
