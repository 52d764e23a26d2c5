"""The flags of OpenAI's improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021).

Their checkpoints are tensors alone; the command line that trained them says the rest. Flags go by
their own names, and have their own defaults, which are those of both repositories but for
`rescale_timesteps`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any, TypeAlias

from ddim_jax.weights.openai_config import GROUPS, MULTIPLIERS, attended, respaced

Flags: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]
REPOSITORIES = ("guided-diffusion", "improved-diffusion")  # of our own flag "repository"
DEFAULTS: dict[str, Any] = {
    **{"repository": "", "image_size": 64, "num_channels": 128, "num_res_blocks": 2},
    **{"num_heads": 4, "num_heads_upsample": -1, "num_head_channels": -1},
    **{"attention_resolutions": (16, 8), "channel_mult": (), "dropout": 0.0, "class_cond": False},
    **{"use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False},
    **{"learn_sigma": False, "sigma_small": False, "diffusion_steps": 1000},
    **{"noise_schedule": "linear", "timestep_respacing": "", "predict_xstart": False},
    **{"rescale_timesteps": None, "clip_denoised": True, "use_ddim": False},
    **{"classifier_width": 128, "classifier_depth": 2, "classifier_pool": "attention"},
    **{"classifier_attention_resolutions": (32, 16, 8), "classifier_resblock_updown": True},
    **{"classifier_use_scale_shift_norm": True},
}
GUIDED_ALONE = ("num_head_channels", "channel_mult", "resblock_updown", "use_new_attention_order")
# What training, files and floating-point formats alone are told: accepted, and not looked at.
PASSED_OVER = (
    *("use_fp16", "classifier_use_fp16", "use_checkpoint", "fp16_scale_growth", "use_kl"),
    *("rescale_learned_sigmas", "data_dir", "val_data_dir", "schedule_sampler", "lr", "ema_rate"),
    *("weight_decay", "lr_anneal_steps", "anneal_lr", "iterations", "batch_size", "microbatch"),
    *("noised", "log_interval", "eval_interval", "save_interval", "resume_checkpoint"),
    *("model_path", "classifier_path", "classifier_scale", "num_samples"),
)
UPSAMPLERS = ("large_size", "small_size", "base_samples")
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
MOST_STEPS = 1_000_000
HEAD_CHANNELS = 64  # of every classifier


def read_flags(flags: Flags) -> dict[str, Any]:
    """Flags as they are given: a dict, the command line itself, or a JSON file of them.

    Args:
      flags: {"image_size": 64, …}, "--image_size 64 …", or a path.

    Returns:
      A dict; values of a command line are strings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no flags.

    Example:
      >>> read_flags("--image_size 64 --learn_sigma True")
      {'image_size': '64', 'learn_sigma': 'True'}
    """
    if isinstance(flags, Mapping):
        return dict(flags)
    text = os.fspath(flags)
    if text.lstrip().startswith("--"):
        words = [w for word in shlex.split(text) for w in word.split("=", word.startswith("--"))]
        if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
            raise ValueError(f"flags are pairs, --image_size 64 --learn_sigma True …; got {text!r}")
        return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    path = pathlib.Path(text)
    if not path.is_file():
        raise FileNotFoundError(
            f"no flags {text!r}: give a dict, a JSON file, a command line that begins with --, or "
            "the name of a published model"
        )
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a dict of flags belongs")
    return content


def check_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """All flags in their types, defaults filled in.

    Args:
      given: by their names; values may be strings, as on a command line. "repository" is a flag of
        ours, one of `REPOSITORIES`, where it matters.

    Returns:
      A dict of all of `DEFAULTS`.

    Raises:
      ValueError: flags are unknown, malformed or contradict each other: all of them in one message.

    Example:
      >>> check_flags({"image_size": 8, "lr": 1e-4, "dropuot": 0.1})
      Traceback (most recent call last):
      ValueError: flags of OpenAI's networks:
        channel_mult is needed for image_size 8: theirs are known for 512, 256, 128, 64, 32
        dropuot is no flag of theirs, do you mean dropout
    """
    problems: list[str] = []
    flags = dict(DEFAULTS)
    for name, value in given.items():
        if name in DEFAULTS:
            try:
                flags[name] = _typed(DEFAULTS[name], value)
            except (TypeError, ValueError, OverflowError):
                problems.append(f"{name} must be {_KINDS[type(DEFAULTS[name])]}, got {value!r}")
        elif name in UPSAMPLERS:
            problems.append(f"{name} is of an upsampler, which needs a small image: not read here")
        elif name not in PASSED_OVER:
            problems.append(f"{name} is no flag of theirs{_alike(name)}")
    if not problems or "image_size" in given:
        problems += _contradictions(flags, given)
    if problems:
        raise ValueError("\n  ".join(["flags of OpenAI's networks:", *sorted(problems)]))
    if not flags["channel_mult"]:
        flags["channel_mult"] = MULTIPLIERS[flags["image_size"]]
    if flags["rescale_timesteps"] is None:
        flags["rescale_timesteps"] = flags["repository"] == "improved-diffusion"
    return flags


def _typed(default: Any, value: Any) -> Any:
    """The value in the type of the default, from a string too."""
    if default is None or isinstance(default, bool):
        word = str(value).lower()
        if word not in (*_TRUE, *_FALSE):
            raise ValueError
        return word in _TRUE
    if isinstance(default, tuple):
        words = value.split(",") if isinstance(value, str) else [*value]
        return tuple(_number(word) for word in words if word != "")
    if isinstance(default, str):
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise TypeError
        return str(value)
    number = _number(value)
    if isinstance(default, int) and not isinstance(number, int):
        raise TypeError
    return float(number) if isinstance(default, float) else number


def _number(word: Any) -> int | float:
    if isinstance(word, bool):
        raise TypeError
    number = float(word)
    return int(number) if number == math.floor(number) else number


def _contradictions(flags: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What is out of range, or does not go together."""
    problems = [
        f"{name} must be at least 1, got {flags[name]}"
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "diffusion_steps")
        if flags[name] < 1
    ]
    problems += [
        f"{name} must be at least 1, or -1 for none, got {flags[name]}"
        for name in ("num_heads_upsample", "num_head_channels")
        if flags[name] < 1 and flags[name] != -1
    ]
    if flags["diffusion_steps"] > MOST_STEPS:
        problems.append(f"diffusion_steps must be at most {MOST_STEPS:,}")
    if not 0 <= flags["dropout"] < 1:
        problems.append(f"dropout must be in [0, 1), got {flags['dropout']}")
    for name, known in (
        ("repository", ("", *REPOSITORIES)),
        ("noise_schedule", ("linear", "cosine")),
        ("classifier_pool", POOLS),
    ):
        if flags[name] not in known:
            words = ", ".join(filter(None, known))
            problems.append(f"{name} must be one of {words}, got {flags[name]!r}")
    for name in ("attention_resolutions", "classifier_attention_resolutions"):
        if not all(isinstance(r, int) and r > 0 for r in flags[name]):
            problems.append(f"{name} must be sizes such as 32,16,8, got {given[name]!r}")
    if not flags["channel_mult"] and flags["image_size"] not in MULTIPLIERS:
        problems.append(
            f"channel_mult is needed for image_size {flags['image_size']}: theirs are known for "
            f"{', '.join(map(str, MULTIPLIERS))}"
        )
    if flags["repository"] == "improved-diffusion":
        problems += [
            f"{name} is of guided-diffusion alone, and repository is improved-diffusion"
            for name in GUIDED_ALONE
            if name in given and flags[name] != DEFAULTS[name]
        ]
    if problems:
        return problems
    return _misfits(flags)


def _misfits(flags: Mapping[str, Any]) -> list[str]:
    """What does not go together among flags that are each in range."""
    problems, size, steps = [], flags["image_size"], flags["diffusion_steps"]
    multipliers = flags["channel_mult"] or MULTIPLIERS[size]
    channels, widths = flags["num_channels"], [m * flags["num_channels"] for m in multipliers]
    if any(w <= 0 or w % GROUPS for w in widths):
        problems.append(
            f"num_channels {channels} times channel_mult {_list(multipliers)} must be multiples of "
            f"{GROUPS}, the groups of their GroupNorm"
        )
    if size % 2 ** (len(multipliers) - 1):
        problems.append(
            f"image_size {size} cannot be halved {len(multipliers) - 1} times, which channel_mult "
            f"{_list(multipliers)} asks for"
        )
    levels = attended(size, flags["attention_resolutions"], multipliers)
    with_heads = {w for i, w in enumerate(widths) if size // 2**i in levels} | {widths[-1]}
    ways = ("num_head_channels",) if flags["num_head_channels"] != -1 else _HEADS
    problems += [
        f"{name} {flags[name]} does not divide {width:g}, the width of a level with attention"
        for name in ways
        for width in sorted(with_heads)
        if flags[name] != -1 and width % flags[name]
    ]
    if steps != 1000 and flags["rescale_timesteps"] is None and not flags["repository"]:
        problems.append(
            f"rescale_timesteps is needed with diffusion_steps {steps}: it is True in "
            "improved-diffusion and False in guided-diffusion (or say repository)"
        )
    if flags["noise_schedule"] == "linear" and steps <= 20:
        problems.append(f"diffusion_steps must be above 20 with noise_schedule linear, got {steps}")
    try:
        respaced(steps, flags["timestep_respacing"])
    except ValueError as error:
        problems.append(f"timestep_respacing {flags['timestep_respacing']!r}: {error}")
    return problems


def _list(numbers: Any) -> str:
    return ",".join(f"{n:g}" for n in numbers)


def _alike(name: str) -> str:
    """A flag that it may be a slip of."""
    import difflib

    near = difflib.get_close_matches(str(name), [*DEFAULTS, *PASSED_OVER], 1, 0.75)
    return f", do you mean {near[0]}" if near else ""


_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
_HEADS = ("num_heads", "num_heads_upsample")
_KINDS: dict[type, str] = {
    **{bool: "True or False", type(None): "True or False", int: "a whole number"},
    **{float: "a number", str: "a word", tuple: "numbers such as 1,2,2"},
}
