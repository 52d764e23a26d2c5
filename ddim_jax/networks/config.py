"""What shape a U-Net may have."""

import dataclasses
import itertools
from typing import Any

from ddim_jax.networks import checks

Params = dict[str, Any]  # nested, string keys, float32 leaves

# Facts that every file holds; those of a later field are written only where they differ.
ALWAYS = 11


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are Ho et al.'s CIFAR-10 network, 35,746,307 parameters.

    The fields from `out_channels` on are the switches of the networks that came after; see
    docs/networks.md for who sets which.

    Args:
        image_size: side in pixels of square images, or (height, width); multiples of
            2**(len(multipliers) - 1). The weights do not depend on it.
        in_channels: channels of the image.
        channels: width of the first convolution, a multiple of `norm_groups`.
        multipliers: width of each level in units of `channels`, which may be fractions where the
            widths are whole; each level halves the resolution.
        num_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: resolutions whose residual blocks are followed by self-attention
            over all pixels. Of oblong images the shorter side counts, as in `resolutions`.
        dropout: rate inside residual blocks, in [0, 1).
        num_classes: number of labels, or None for an unconditional network.
        dtype: "float32" or "bfloat16", of the activations. Parameters, GroupNorm statistics,
            softmax and the output are float32 either way.
        remat: recompute residual blocks in the backward pass instead of storing them.
        norm_groups: groups of every GroupNorm, 32 in the paper. Groups of one channel take away
            what the projections of time and label added just before, a constant per channel: a
            narrow network with classes wants several channels in each.
        out_channels: channels of the output; None: `in_channels`. Twice as many are ε and what a
            learned variance is made of.
        norm_eps: ε of every GroupNorm.
        activation: "swish", "mish", "gelu" or "relu", of the residual blocks. That of the time
            embedding and of the output is swish always.
        scale_shift: time scales and shifts what the second GroupNorm of a block gives,
            y (1 + s) + b, instead of being added before it.
        num_heads: heads of every self-attention, a divisor of its width.
        head_width: width of a head, in place of their number: width // head_width heads, which
            leave out the rest where it does not divide.
        num_heads_up: heads on the way up; None: `num_heads`.
        attention_resolutions_up: of the way up; None: as on the way down.
        middle: "attention" between two residual blocks; "plain": the two blocks; "none": neither.
        middle_scale: what each of the middle's sums x + f(x) is divided by.
        middle_norm_groups: groups of the middle's attention; None: `norm_groups`, 0: no GroupNorm.
        resample_down: from each level to the next, one word for all or a tuple: "conv" with stride
            2, "block", a residual block that averages 2×2 pixels, or "pool", that average alone.
        resample_up: back from each level to the one before, in the same order: "conv" after
            doubling pixels, "block", a residual block that doubles, or "pool", doubling alone.
        downsample_padding: zeros before and after each axis of a "conv" down: (0, 1) or (1, 1).
        cosine_first: cosines before sines in the embedding of time.
        frequency_shift: s in its frequencies 10000^(−k/(h − s)), k = 0..h − 1.
        sinusoids: 2 h, how many numbers it has; None: `channels`.
        time_width: width of the layers that it goes through; None: 4 `channels`.
        time_table: T, for a learned row for each t in 1..T in place of the sinusoids.
        class_embedding: what is added to the embedding of time: "table", a row for each of
            `num_classes` labels; "timestep", labels are numbers embedded as time is; or "identity",
            labels are (B, time_width) embeddings themselves.
        null_label: the table has one more row, label K = `num_classes`, for "no label".
        centre_input: the network takes 2 x − 1.
        time_scale: what the index t − 1 is multiplied by before it is embedded.

    Raises:
        TypeError, ValueError: naming the field, what was got and what would do.

    Example:
        >>> UNetConfig(image_size=256, multipliers=(1, 1, 2, 2, 4, 4)).resolutions
        (256, 128, 64, 32, 16, 8)
        >>> UNetConfig(image_size=(32, 48)).image_shape
        (32, 48, 3)
        >>> UNetConfig(channels=64, multipliers=(1, 1.5)).widths
        (64, 96)
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    channels: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    num_classes: int | None = None
    dtype: str = "float32"
    remat: bool = False
    norm_groups: int = 32
    out_channels: int | None = None
    norm_eps: float = 1e-6
    activation: str = "swish"
    scale_shift: bool = False
    num_heads: int = 1
    head_width: int | None = None
    num_heads_up: int | None = None
    attention_resolutions_up: tuple[int, ...] | None = None
    middle: str = "attention"
    middle_scale: float = 1.0
    middle_norm_groups: int | None = None
    resample_down: str | tuple[str, ...] = "conv"
    resample_up: str | tuple[str, ...] = "conv"
    downsample_padding: tuple[int, int] = (0, 1)
    cosine_first: bool = False
    frequency_shift: float = 1
    sinusoids: int | None = None
    time_width: int | None = None
    time_table: int | None = None
    class_embedding: str = "table"
    null_label: bool = True
    centre_input: bool = False
    time_scale: float = 1.0

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

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each level, `multipliers` times `channels`."""
        return tuple(round(m * self.channels) for m in self.multipliers)

    @property
    def attended(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Whether each level has self-attention on the way down, and on the way up."""
        down = up = self.attention_resolutions
        if self.attention_resolutions_up is not None:
            up = self.attention_resolutions_up
        return tuple(r in down for r in self.resolutions), tuple(r in up for r in self.resolutions)

    @property
    def attentions(self) -> tuple[tuple[int, int], ...]:
        """(width, number of heads) of the levels with attention, down and up, and the middle."""
        (down, up), own = self.attended, self.head_width
        ways = (*zip(self.widths, down, itertools.repeat(self.num_heads)),)
        ways += (*zip(self.widths, up, itertools.repeat(self.num_heads_up or self.num_heads)),)
        ways += ((self.widths[-1], self.middle == "attention", self.num_heads),)
        return tuple((w, n if own is None else w // own) for w, attended, n in ways if attended)

    @property
    def resampling(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """How each level but the last is left on the way down, and come back to on the way up."""
        steps, down, up = len(self.multipliers) - 1, self.resample_down, self.resample_up
        return (
            (down,) * steps if isinstance(down, str) else down,
            (up,) * steps if isinstance(up, str) else up,
        )

    @property
    def labelled(self) -> bool:
        """Whether the network takes labels."""
        return self.num_classes is not None or self.class_embedding != "table"

    @property
    def embedding_width(self) -> int:
        """Width of the embedding of time and label, `time_width` or 4 `channels`."""
        return self.time_width or 4 * self.channels

    def facts(self) -> dict[str, Any]:
        """The fields as weights files hold them: what no file had at first only where it differs.

        Example:
            >>> [*UNetConfig(scale_shift=True).facts()][-2:]
            ['norm_groups', 'scale_shift']
        """
        fields = dataclasses.fields(self)
        return {
            f.name: getattr(self, f.name)
            for i, f in enumerate(fields)
            if i < ALWAYS or getattr(self, f.name) != f.default
        }

    def __post_init__(self) -> None:
        checks.check_config(self)
