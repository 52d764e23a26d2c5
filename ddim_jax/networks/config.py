"""What shape a U-Net may have, and what may be fed to it: all checks, before anything is traced."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]  # nested, string keys, float32 leaves


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are the CIFAR-10 network, 35,746,307 parameters.

    Args:
        image_size: side in pixels of square images, or (height, width); multiples of
            2**(len(multipliers) - 1). The weights do not depend on it.
        in_channels: channels of the image, and of the output.
        channels: width at full resolution, a multiple of `norm_groups`.
        multipliers: width of each level in units of `channels`; each level halves the resolution.
        num_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: resolutions whose residual blocks are followed by self-attention
            over all pixels; the middle of the network always has it. Of oblong images the shorter
            side counts, as in `resolutions`.
        dropout: rate inside residual blocks, in [0, 1).
        num_classes: number of labels, or None for an unconditional network.
        dtype: "float32" or "bfloat16", of the activations. Parameters, GroupNorm statistics,
            softmax and the output are float32 either way.
        remat: recompute residual blocks in the backward pass instead of storing them.
        norm_groups: groups of every GroupNorm, 32 in the paper. Groups of one channel take away
            what the projections of time and label added just before, a constant per channel: a
            narrow network with classes wants several channels in each.

    Raises:
        TypeError, ValueError: naming the field, what was got and what would do.

    Example:
        >>> UNetConfig(image_size=256, multipliers=(1, 1, 2, 2, 4, 4)).resolutions
        (256, 128, 64, 32, 16, 8)
        >>> UNetConfig(image_size=(32, 48)).image_shape
        (32, 48, 3)
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    num_classes: int | None = None
    dtype: str = "float32"
    remat: bool = False
    norm_groups: int = 32

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolution of each level, the shorter side of `image_size` first."""
        side = min(self.image_shape[:2])
        return tuple(side // 2**level for level in range(len(self.multipliers)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        size = self.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height, width, self.in_channels

    @property
    def downsampling(self) -> int:
        """Factor between the first and the last level's resolution, 2**(levels - 1)."""
        return int(2 ** (len(self.multipliers) - 1))

    def __post_init__(self) -> None:
        size = self.image_size
        if isinstance(size, int):
            sizes = {"image_size": size}
        elif isinstance(size, tuple) and len(size) == 2:
            sizes = {f"image_size[{i}]": side for i, side in enumerate(size)}
        else:
            raise TypeError(f"image_size must be an int or a tuple (height, width), got {size!r}")
        names = ["in_channels", "channels", "num_blocks", "norm_groups"]
        names += ["num_classes"] if self.num_classes is not None else []
        counts = sizes | {name: getattr(self, name) for name in names}
        for name in ("multipliers", "attention_resolutions"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name} must be a tuple of ints, got {getattr(self, name)!r}")
            counts |= {f"{name}[{i}]": n for i, n in enumerate(getattr(self, name))}
        for name, n in counts.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"{name} must be an int >= 1, got {n!r}")
        if not self.multipliers:
            raise ValueError("multipliers must name at least one level, e.g. (1, 2, 2); got ()")
        if self.channels % self.norm_groups:
            whole = math.ceil(self.channels / self.norm_groups) * self.norm_groups
            raise ValueError(
                f"channels must be a multiple of {self.norm_groups}, the number of groups of "
                f"GroupNorm; got {self.channels}, try {whole}"
            )
        for name, side in sizes.items():
            check_divisible(name, side, self)
        if unknown := set(self.attention_resolutions) - set(self.resolutions):
            raise ValueError(
                f"attention_resolutions must be among this network's {self.resolutions}, "
                f"got {sorted(unknown)}; use () for attention in the middle only"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")


def check_divisible(name: str, size: int, config: UNetConfig) -> None:
    """Raises ValueError where the network cannot halve `size` at each level but the first."""
    factor = config.downsampling
    if size % factor:
        raise ValueError(
            f"{name} must be a multiple of {factor}, which the {len(config.multipliers)} levels of "
            f"multipliers={config.multipliers} divide it by; got {size}: resize or pad it to "
            f"{math.ceil(size / factor) * factor}, or use fewer multipliers"
        )


def check_params(params: Params, abstract: Params) -> None:
    """Raises ValueError, naming the first leaf whose shape is not this network's."""

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}

    got, want = shapes(params), shapes(abstract)
    if got != want:
        name = min(name for name in got | want if got.get(name) != want.get(name))
        raise ValueError(
            f"params are not this network's: at {name} it has {want.get(name, 'nothing')}, got "
            f"{got.get(name, 'nothing')}; build the network with the config the params were made by"
        )


def check_inputs(config: UNetConfig, x: Any, t: Any, labels: Any) -> tuple[Any, Any, Any]:
    """x, t and labels as arrays, "no label" filled in; ValueError or TypeError where unfit."""
    x = jnp.asarray(x)
    if x.ndim != 4 or x.shape[-1] != config.in_channels:
        raise ValueError(f"x must be (batch, height, width, {config.in_channels}), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, in the scale of x_t, got {x.dtype}: convert it first")
    check_divisible("height of x", x.shape[1], config)
    check_divisible("width of x", x.shape[2], config)
    t = _check_numbers(
        *("t", t, x.shape[0], 1, None, "the paper's 1..T; 1 is subtracted in apply_fn"), real=True
    )
    if config.num_classes is None:
        if labels is not None:
            raise ValueError("labels given to an unconditional network: set config.num_classes")
    elif labels is None:
        labels = jnp.full(x.shape[:1], config.num_classes)
    else:
        meaning = f"0..{config.num_classes}, {config.num_classes} for no label"
        labels = _check_numbers("labels", labels, x.shape[0], 0, config.num_classes, meaning)
    return x, t, labels


def _check_numbers(
    name: str,
    a: Any,
    batch: int,
    low: int,
    high: int | None,
    meaning: str,
    *,
    real: bool = False,
) -> jax.Array:
    a = a if isinstance(a, jax.Array) else np.asarray(a)  # JAX would wrap around what is too large
    if a.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), one per image, got {a.shape}: "
            f"use jnp.full({batch}, value) for one value"
        )
    kinds = (jnp.integer, jnp.floating) if real else (jnp.integer,)
    if not any(jnp.issubdtype(a.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be integer ({meaning}), got {a.dtype}")
    if not isinstance(a, jax.core.Tracer):
        top = np.iinfo(np.int32).max if high is None else high
        if bad := [v.item() for v in np.asarray(a) if not low <= v <= top]:
            raise ValueError(f"{name} must be in {meaning}; got {bad[0]}")
    return jnp.asarray(a)
