"""What a config.json of diffusers' `UNet2DModel` may say, and what is wrong with one."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

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
    **dict.fromkeys(("DownBlock2D", "UpBlock2D"), (False, "conv")),
    **dict.fromkeys(("AttnDownBlock2D", "AttnUpBlock2D"), (True, None)),
    **dict.fromkeys(("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), (False, "block")),
}
VARIANCE_EXPLODING = "is for the variance-exploding process, of noise levels σ and no steps t"
REASONS = {  # why other blocks are refused, by what stands in their names
    "Skip": VARIANCE_EXPLODING,
    "Cross": "takes a text or an image too",
    "K": "is of a network that takes noise levels σ and no steps t",
    "coder": "is of an autoencoder",
}


def problems_of(said: Mapping[str, Any]) -> Iterator[str]:
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
    yield from (wrong(f, ", not a whole number >= 1") for f in counts if not are_counts([said[f]]))
    for field in NUMBERS:
        if type(said[field]) not in (int, float):
            yield wrong(field, ", not a number")
    widths = said["block_out_channels"]
    if not are_counts(widths) or not widths:
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
            if block_of(name) not in BLOCKS or way.title() not in name:
                reasons = (reason for part, reason in REASONS.items() if part in name)
                yield f"{field} has {name!r}, which {next(reasons, 'is not known here')}"


def block_of(name: str) -> str:
    """A block by its name of today."""
    return name.removeprefix("UNetRes")


def are_counts(values: Any) -> bool:
    """Whether it is a list of whole numbers above 0."""
    return isinstance(values, list | tuple) and all(type(n) is int and n > 0 for n in values)
