"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion: their tensors by our names.

| ours | theirs |
|---|---|
| conv_in, temb.dense.1 | input_blocks.0.0, time_embed.2 |
| down.1.block.0.conv1 | input_blocks.5.0.in_layers.2, with three blocks a level |
| down.1.attn.0.q, .k and .v | input_blocks.5.1.qkv, one 1-D convolution |
| mid.block_2, up.3.block.0 | middle_block.2, output_blocks.0.0 |
| norm_out, conv_out, label_embedding | out.0, out.2, label_emb.weight |
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.weights.diffusers_format import Contents
from ddim_jax.weights.openai_config import schedule_of, unet_of
from ddim_jax.weights.openai_flags import Flags, check_flags, read_flags
from ddim_jax.weights.openai_published import CLASSIFIERS, PUBLISHED, published
from ddim_jax.weights.state_dict import from_state_dict

PARTS = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "temb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "nin_shortcut": "skip_connection"},
}
OUTSIDE = {
    **{"conv_in": "input_blocks.0.0", "temb.dense.0": "time_embed.0", "norm_out": "out.0"},
    **{"temb.dense.1": "time_embed.2", "conv_out": "out.2", "label_embedding": "label_emb.weight"},
    **{"mid.block_1": "middle_block.0", "mid.attn_1": "middle_block.1"},
    **{"mid.block_2": "middle_block.2"},
}


def read_openai(
    state: Mapping[str, np.ndarray], facts: Mapping[str, Any], path: str, flags: Flags | None
) -> Contents:
    """The network of a checkpoint of theirs.

    Args:
      state: of `find_state`; tensors may be float16.
      facts: of `find_state`.
      path: of the file; those that they published are known by their names.
      flags: theirs; the name of a published model; or None for a published file.

    Returns:
      `Contents`; with learn_sigma the network has twice as many channels out as in.

    Raises:
      ValueError: there are no flags and the file is not a published one, or flags contradict each
        other or the tensors, or tensors do not fit: everything in one message.
    """
    said = shapes_say(state)
    given = published(path) if flags is None else find_flags(flags)
    if given is None:
        alike = [name for name, model in PUBLISHED.items() if not _against(said, model.flags)]
        raise ValueError(
            "OpenAI's checkpoints do not say all of the network: pass flags={...}, or --flags "
            f"FILE.json, with those of its training. Its shapes say {_words(said)}; image_size, "
            "num_heads or num_head_channels, use_new_attention_order, diffusion_steps and "
            "noise_schedule, for example, only its flags do"
            + (f". Its shapes are those of flags={' or '.join(map(repr, alike))}" if alike else "")
        )
    all_flags = check_flags(given)
    if wrong := _against(said, given):
        whose = "" if flags is not None else f" of the published {pathlib.PurePath(path).name}"
        what = f"flags{whose} contradict the shapes of the weights"
        raise ValueError("\n  ".join([f"{what}:", *wrong]))
    in_channels = _shape(state, "input_blocks.0.0.weight")[1]
    classes = _shape(state, "label_emb.weight")[0] if "label_emb.weight" in state else 0
    config = unet_of(all_flags, in_channels, classes)
    params = network_params(state, config, all_flags["use_new_attention_order"])
    own = {"names": "OpenAI", "openai_flags": dict(given), **facts}
    prediction = "x_0" if all_flags["predict_xstart"] else "eps"
    return Contents(params, config, schedule_of(all_flags), prediction, own)


def find_flags(flags: Flags) -> dict[str, Any]:
    """`read_flags`, or those of a published model by its name.

    Example:
      >>> find_flags("guided-imagenet64")["num_channels"]
      192
    """
    known = PUBLISHED | CLASSIFIERS
    if isinstance(flags, str) and flags in known:
        return dict(known[flags].flags)
    try:
        return read_flags(flags)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {', '.join(known)}") from None


def network_params(
    state: Mapping[str, np.ndarray], config: UNetConfig, new_order: bool = False
) -> Params:
    """Parameters of a state dict with their names.

    Args:
      state: flat dict of floating arrays.
      config: the network.
      new_order: whether it was trained with use_new_attention_order.

    Returns:
      Nested dict of float32 NumPy arrays.

    Raises:
      ValueError: tensors are missing, left over, of another shape, or not finite; by name.
    """
    split = split_heads(state, config, new_order)
    return from_state_dict(split, config, lambda name: openai_name(name, config))


def split_heads(
    state: Mapping[str, np.ndarray], config: UNetConfig, new_order: bool
) -> dict[str, np.ndarray]:
    """The state dict with q, k and v of each attention as three.

    Their rows of q, k and v are (head, q|k|v, channel), or (q|k|v, head, channel) in the new order
    of attention; ours are three layers, each (head, channel).
    """
    split: dict[str, np.ndarray] = {}
    for name, array in state.items():
        parts = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", name)
        rows_in = array.shape[0] if array.ndim else 1
        heads = max(1, _heads(config, rows_in // 3, up=name.startswith("output_blocks")))
        if parts is None or not rows_in or rows_in % (3 * heads):
            split[name] = array
            continue
        order = (3, heads, -1) if new_order else (heads, 3, -1)
        rows = array.reshape(*order, *array.shape[1:])
        for i, letter in enumerate("qkv"):
            one = rows[i] if new_order else rows[:, i]
            split[f"{parts[1]}.{letter}.{parts[2]}"] = one.reshape(-1, *array.shape[1:])
    return split


def openai_name(name: str, config: UNetConfig) -> str:
    """The DDIM authors' name of a tensor in theirs.

    Example:
      >>> openai_name("up.0.attn.1.q.weight", UNetConfig(attention_resolutions=(32,)))
      'output_blocks.10.1.q.weight'
    """
    per, last = config.num_blocks + 1, len(config.multipliers) - 1
    if parts := re.fullmatch(r"(down|up)\.(\d+)\.(\w+)\.(.*)", name):
        way, level, what, rest = parts[1], int(parts[2]), parts[3], parts[4]
        down = way == "down"
        start = "input_blocks.{}" if down else "output_blocks.{}"
        base = 1 + level * per if down else (last - level) * per
        if what in ("block", "attn"):
            number, _, rest = rest.partition(".")
            head = f"{start.format(base + int(number))}.{'01'[what == 'attn']}"
        else:  # a step to the next level
            place = 0 if down else 1 + config.attended[1][level]
            head = f"{start.format(base + config.num_blocks)}.{place}"
            rest = rest.replace("conv.", "op." if down else "conv.", rest.startswith("conv."))
            rest = rest.removeprefix("block.")
        name = f"{head}.{rest}"
    for ours, theirs in OUTSIDE.items():
        if name == ours or name.startswith(f"{ours}."):
            name = theirs + name.removeprefix(ours)
    for ours, theirs in PARTS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def shapes_say(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The flags that the shapes of a U-Net's tensors tell.

    Args:
      state: flat dict of arrays with their names.

    Returns:
      A dict of flags; `attention_resolutions` as a tuple of levels, from 0.

    Raises:
      ValueError: it is none of their U-Nets.
    """
    if any(name.startswith("out.2.") and "positional" in name for name in state) or (
        "output_blocks.0.0.in_layers.0.weight" not in state and "input_blocks.0.0.weight" in state
    ):
        raise ValueError(
            "it has no way up (output_blocks): a classifier of guided-diffusion is read by "
            "load_classifier"
        )
    try:
        channels, in_channels = _shape(state, "time_embed.0.weight")[1], _shape(state, _FIRST)[1]
        out_channels = _shape(state, "out.2.weight")[0]
        outs = 1 + max(int(n) for n in _numbers(r"output_blocks\.(\d+)\.", state))
        blocks = {(int(m[1]), m[2]) for m in map(_LATER.match, state) if m}
        ends = sorted(number for number, _ in blocks)
        per = ends[0] + 1 if ends else outs
        levels = outs // per
        widths = [
            _shape(state, f"output_blocks.{(levels - 1 - i) * per}.0.out_layers.3.weight")[0]
            for i in range(levels)
        ]
        time = _shape(state, "middle_block.0.emb_layers.1.weight")[0]
        multipliers = tuple(w // channels if w % channels == 0 else w / channels for w in widths)
    except KeyError as error:
        raise ValueError(f"not the names of OpenAI's networks: no tensor {error}") from error
    except (IndexError, ZeroDivisionError) as error:
        raise ValueError(f"not the shapes of OpenAI's networks: {error}") from error
    if in_channels == 6:
        raise ValueError(
            "its first convolution takes 6 channels: an upsampler (SuperResModel), which needs a "
            "small image too, is not read here"
        )
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"it takes {in_channels} channels and returns {out_channels}")
    return {
        "num_channels": channels,
        "num_res_blocks": per - 1,
        "channel_mult": multipliers,
        "attention_resolutions": tuple(
            i for i in range(levels) if f"input_blocks.{1 + i * per}.1.qkv.weight" in state
        ),
        "class_cond": "label_emb.weight" in state,
        "learn_sigma": out_channels == 2 * in_channels,
        "use_scale_shift_norm": time == 2 * widths[-1],
        "resblock_updown": any(what == "in_layers" for _, what in blocks),
    }


def _against(said: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where flags and shapes differ, in words."""
    flags = check_flags(given)
    size, multipliers = flags["image_size"], flags["channel_mult"]
    levels = tuple(
        i
        for i in range(len(multipliers))
        if 2**i in {size // r for r in flags["attention_resolutions"]}
    )
    told = flags | {"attention_resolutions": levels}
    wrong = []
    for name, value in said.items():
        if told[name] == value:
            continue
        told_value, shown = told[name], value
        if name == "attention_resolutions":
            told_value, shown = (tuple(size // 2**i for i in v) for v in (told[name], value))
        default = "" if name in given else ", by default"
        wrong.append(f"{name} is {_shown(told_value)}{default}, the weights say {_shown(shown)}")
    return wrong


def _words(said: Mapping[str, Any]) -> str:
    shown = {name: v for name, v in said.items() if name != "attention_resolutions"}
    levels = said["attention_resolutions"]
    where = f"attention at levels {_shown(levels)} from 0" if levels else "attention in the middle"
    return ", ".join([*(f"{name} {_shown(value)}" for name, value in shown.items()), where])


def _shown(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _heads(config: UNetConfig, width: int, up: bool) -> int:
    if config.head_width is not None:
        return width // config.head_width
    return (config.num_heads_up if up else None) or config.num_heads


def _shape(state: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    return state[name].shape


def _numbers(pattern: str, names: Mapping[str, Any]) -> set[str]:
    return {match[1] for match in (re.match(pattern, name) for name in names) if match}


_FIRST = "input_blocks.0.0.weight"
# What ends a level on their way up: a doubling behind a block and its attention.
_LATER = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers)\.")
