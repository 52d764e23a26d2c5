"""All that must hold of a `UNetConfig`, before anything is traced."""

import math
from typing import Any

ACTIVATIONS = ("swish", "mish", "gelu", "relu")
MIDDLES = ("attention", "plain", "none")
RESAMPLINGS = ("conv", "block", "pool")
CLASS_EMBEDDINGS = ("table", "timestep", "identity")


def check_config(config: Any) -> None:
    """Raises TypeError or ValueError, naming the field, where the network cannot be."""
    sizes = _check_counts(config)
    _check_words(config)
    _check_widths(config)
    for name, side in sizes.items():
        check_divisible(name, side, config)
    for name in ("attention_resolutions", "attention_resolutions_up"):
        if unknown := set(getattr(config, name) or ()) - set(config.resolutions):
            raise ValueError(
                f"{name} must be among this network's {config.resolutions}, "
                f"got {sorted(unknown)}; use () for attention in the middle only"
            )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout!r}")
    _check_heads(config)
    _check_embeddings(config)


def check_divisible(name: str, size: int, config: Any) -> None:
    """Raises ValueError where the network cannot halve `size` at each level but the first."""
    factor = config.downsampling
    if size % factor:
        raise ValueError(
            f"{name} must be a multiple of {factor}, which the {len(config.multipliers)} levels of "
            f"multipliers={config.multipliers} divide it by; got {size}: resize or pad it to "
            f"{math.ceil(size / factor) * factor}, or use fewer multipliers"
        )


def _check_counts(config: Any) -> dict[str, int]:
    """All that must be a whole number; returns the sides of the image by name."""
    size = config.image_size
    if isinstance(size, int):
        sizes = {"image_size": size}
    elif isinstance(size, tuple) and len(size) == 2:
        sizes = {f"image_size[{i}]": side for i, side in enumerate(size)}
    else:
        raise TypeError(f"image_size must be an int or a tuple (height, width), got {size!r}")
    names = ["in_channels", "channels", "num_blocks", "norm_groups", "num_heads"]
    optional = ["num_classes", "out_channels", "head_width", "num_heads_up", "sinusoids"]
    optional += ["time_width", "time_table"]
    names += [name for name in optional if getattr(config, name) is not None]
    counts = sizes | {name: getattr(config, name) for name in names}
    lists = ["multipliers", "attention_resolutions"]
    lists += ["attention_resolutions_up"] if config.attention_resolutions_up is not None else []
    for name in lists:
        if not isinstance(getattr(config, name), tuple):
            raise TypeError(f"{name} must be a tuple of ints, got {getattr(config, name)!r}")
        counts |= {f"{name}[{i}]": n for i, n in enumerate(getattr(config, name))}
    for name, n in counts.items():
        if name.startswith("multipliers") and _is_number(n) and 0 < n < math.inf:
            continue
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"{name} must be an int >= 1, got {n!r}")
    groups = config.middle_norm_groups
    if groups is not None and (type(groups) is not int or groups < 0):
        raise ValueError(f"middle_norm_groups must be an int >= 0 or None, got {groups!r}")
    if not config.multipliers:
        raise ValueError("multipliers must name at least one level, e.g. (1, 2, 2); got ()")
    return sizes


def _check_words(config: Any) -> None:
    """All that has few values."""
    for name, words in {
        "dtype": ("float32", "bfloat16"),
        "activation": ACTIVATIONS,
        "middle": MIDDLES,
        "class_embedding": CLASS_EMBEDDINGS,
        "downsample_padding": ((0, 1), (1, 1)),
    }.items():
        if getattr(config, name) not in words:
            known = " or ".join(filter(None, [", ".join(map(repr, words[:-1])), repr(words[-1])]))
            raise ValueError(f"{name} must be {known}, got {getattr(config, name)!r}")
    for name in ("remat", "scale_shift", "cosine_first", "null_label", "centre_input"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")
    steps = len(config.multipliers) - 1
    for name in ("resample_down", "resample_up"):
        given = getattr(config, name)
        ways = (given,) * steps if isinstance(given, str) else given
        whole = isinstance(ways, tuple) and len(ways) == steps
        if not whole or any(way not in RESAMPLINGS for way in (*ways, ways[0] if ways else given)):
            raise ValueError(
                f"{name} must be 'conv', 'block' or 'pool', or a tuple of {steps} of them, one "
                f"between two levels each; got {given!r}"
            )
    for name in ("norm_eps", "middle_scale", "time_scale"):
        if not _is_number(x := getattr(config, name)) or not 0 < x < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {x!r}")


def _check_widths(config: Any) -> None:
    groups = config.norm_groups
    if config.channels % groups:
        raise ValueError(
            f"channels must be a multiple of {groups}, the number of groups of "
            f"GroupNorm; got {config.channels}, try {math.ceil(config.channels / groups) * groups}"
        )
    for i, (m, width) in enumerate(zip(config.multipliers, config.widths)):
        if abs(m * config.channels - width) > 1e-6 * width or width % groups or not width:
            raise ValueError(
                f"multipliers[{i}] * channels must be a multiple of {groups}, the number of groups "
                f"of GroupNorm; got {m!r} * {config.channels}"
            )
    own = config.middle_norm_groups
    if own and config.widths[-1] % own:
        raise ValueError(
            f"middle_norm_groups must divide {config.widths[-1]}, the width of the last level; "
            f"got {own}"
        )


def _check_heads(config: Any) -> None:
    """Each self-attention needs whole heads of at least one channel."""
    if config.head_width is not None and (config.num_heads, config.num_heads_up) != (1, None):
        raise ValueError(
            "head_width is in place of num_heads and num_heads_up: leave one or the other; got "
            f"head_width={config.head_width}, num_heads={config.num_heads}, "
            f"num_heads_up={config.num_heads_up}"
        )
    for width, heads in config.attentions:
        if not heads:
            raise ValueError(
                f"head_width must be at most {width}, the width of a level with attention; "
                f"got {config.head_width}"
            )
        if config.head_width is None and width % heads:
            name = "num_heads" if heads == config.num_heads else "num_heads_up"
            raise ValueError(
                f"{name} must divide {width}, the width of a level with attention; got {heads}"
            )


def _check_embeddings(config: Any) -> None:
    """Time and label."""
    half = (config.sinusoids or config.channels) // 2
    shift = config.frequency_shift
    if not _is_number(shift) or not -math.inf < shift < math.inf:
        raise ValueError(f"frequency_shift must be a number, got {shift!r}")
    if config.time_table is None and half <= shift:
        raise ValueError(
            f"frequency_shift must be below {half}, half of the sinusoids; got {shift}"
        )
    if config.time_table is not None and config.time_scale != 1:
        raise ValueError(f"time_scale must be 1 with a time_table, got {config.time_scale}")
    if config.class_embedding != "table" and config.num_classes is not None:
        raise ValueError(
            f"num_classes must be None with class_embedding={config.class_embedding!r}, whose "
            f"labels are no classes; got {config.num_classes}"
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
