"""What the flags of OpenAI's networks mean in our words: network, schedule, and how to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.networks.config import UNetConfig
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.sampling import Method, clip_x0, ddim, ddpm
from ddim_jax.weights.diffusers_recipe import Recipe

MULTIPLIERS: dict[int, tuple[int | float, ...]] = {  # of channel_mult "", by image_size
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
GROUPS = 32  # of every GroupNorm of theirs


def unet_of(flags: Mapping[str, Any], in_channels: int = 3, num_classes: int = 1000) -> UNetConfig:
    """The network of `check_flags`' flags.

    Args:
      flags: all of them.
      in_channels: of the image; no flag says it.
      num_classes: where class_cond says that there are some.

    Example:
      >>> from ddim_jax.weights.openai_flags import check_flags
      >>> config = unet_of(check_flags({"image_size": 64, "learn_sigma": "True"}))
      >>> config.widths, config.attention_resolutions, config.out_channels
      ((128, 256, 384, 512), (16, 8), 6)
    """
    multipliers, channels = flags["channel_mult"], flags["num_channels"]
    first = round(multipliers[0] * channels)  # the width of their first convolution too
    widths = [round(m * channels) for m in multipliers]
    ratios = [w // first if w % first == 0 else w / first for w in widths]
    heads: dict[str, Any] = {"num_heads": flags["num_heads"]}
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        heads["num_heads_up"] = flags["num_heads_upsample"]
    if flags["num_head_channels"] != -1:
        heads = {"head_width": flags["num_head_channels"]}
    way = "block" if flags["resblock_updown"] else "conv"
    return UNetConfig(
        image_size=flags["image_size"],
        in_channels=in_channels,
        channels=first,
        multipliers=tuple(ratios),
        num_blocks=flags["num_res_blocks"],
        attention_resolutions=attended(flags["image_size"], flags["attention_resolutions"], widths),
        dropout=flags["dropout"],
        num_classes=num_classes if flags["class_cond"] else None,
        norm_groups=GROUPS,
        out_channels=2 * in_channels if flags["learn_sigma"] else None,
        norm_eps=1e-5,
        scale_shift=flags["use_scale_shift_norm"],
        resample_down=way,
        resample_up=way,
        downsample_padding=(1, 1),
        cosine_first=True,
        frequency_shift=0,
        sinusoids=None if first == channels else channels,
        time_width=None if first == channels else 4 * channels,
        null_label=not flags["class_cond"],
        time_scale=time_scale(flags),
        **heads,
    )


def schedule_of(flags: Mapping[str, Any]) -> ScheduleConfig:
    """The noise schedule of `check_flags`' flags: their linear one has its β multiplied by 1000/T.

    Example:
      >>> from ddim_jax.weights.openai_flags import check_flags
      >>> schedule_of(check_flags({"diffusion_steps": 4000, "rescale_timesteps": True})).facts()
      {'kind': 'linear', 'num_steps': 4000, ..., 'rescale_betas': True}
    """
    steps, kind = flags["diffusion_steps"], flags["noise_schedule"]
    return ScheduleConfig(kind, steps, rescale_betas=kind == "linear" and steps != 1000)


def time_scale(flags: Mapping[str, Any]) -> float:
    """What the network's index t − 1 is multiplied by: 1000/T with rescale_timesteps, else 1."""
    return 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0


def attended(size: int, resolutions: tuple[int, ...], levels: Any) -> tuple[int, ...]:
    """The levels' resolutions that have attention; theirs that no level has are without meaning.

    Example:
      >>> attended(64, (32, 16, 4), [1, 2, 3, 4])
      (32, 16)
    """
    strides = {size // resolution for resolution in resolutions}
    return tuple(size // 2**level for level in range(len(levels)) if 2**level in strides)


def respaced(num_steps: int, respacing: str) -> np.ndarray:
    """τ of their timestep_respacing, in 1..T.

    "ddim25" walks with the smallest whole stride that makes 25 steps from t = 1. "10,20" cuts 1..T
    into that many equal parts and spreads so many steps over each, ends included. "" is all of T.

    Args:
      num_steps: T.
      respacing: the flag.

    Returns:
      (S,) strictly increasing ints.

    Raises:
      ValueError: no stride makes so many steps, or a part has fewer.

    Example:
      >>> respaced(1000, "ddim5").tolist(), respaced(10, "2,3").tolist()
      ([1, 201, 401, 601, 801], [1, 5, 6, 8, 10])
    """
    if respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, num_steps):
            if len(walk := np.arange(1, num_steps + 1, stride)) == count:
                return walk
        raise ValueError(f"no whole stride makes {count} steps of {num_steps}")
    counts = [int(word) for word in respacing.split(",")] if respacing else [num_steps]
    whole, rest = divmod(num_steps, len(counts))
    tau: list[int] = []
    start = 1
    for i, count in enumerate(counts):
        size = whole + (i < rest)
        if not 1 <= count <= size:
            raise ValueError(f"{count} steps do not fit into a part of {size} of {num_steps}")
        apart = (size - 1) / max(count - 1, 1)
        tau += [start + round(k * apart) for k in range(count)]
        start += size
    return np.array(tau)


def openai_recipe(flags: Mapping[str, Any], eta: float | None = None) -> Recipe:
    """How their image_sample.py draws by these flags.

    With use_ddim by DDIM, else by the chain of DDPM: with the learned variance if there is one, the
    small one with sigma_small, and the large one otherwise. τ is that of timestep_respacing; of S
    steps that of "S", or of "ddimS" with use_ddim. x̂_0 is clipped unless clip_denoised is False.

    Args:
      flags: of `check_flags`.
      eta: of DDIM, 0 by default.

    Returns:
      A `Recipe`.

    Raises:
      ValueError: η is given, and the method is not DDIM.

    Example:
      >>> from ddim_jax.weights.openai_flags import check_flags
      >>> how = openai_recipe(check_flags({"timestep_respacing": "250"}))
      >>> how.name, how.steps
      ('DDPM', 250)
    """
    by_ddim, spacing = flags["use_ddim"], flags["timestep_respacing"]
    if eta is not None and not by_ddim:
        raise ValueError(
            f"eta = {eta} goes with use_ddim, and the flags draw by DDPM: leave it out, or give "
            "method=ddim_jax.ddim(eta)"
        )
    steps = len(respaced(flags["diffusion_steps"], spacing))

    def tau(schedule: Schedule, count: int) -> np.ndarray:
        asked = f"ddim{count}" if by_ddim else str(count)
        return respaced(schedule.num_steps, spacing if count == steps else asked)

    fixed = "small" if flags["sigma_small"] else "large"
    method: Method = ddpm("learned" if flags["learn_sigma"] else fixed)
    clip = clip_x0(1.0) if flags["clip_denoised"] else None
    if by_ddim:
        method = ddim(eta or 0.0)
    return Recipe("DDIM" if by_ddim else "DDPM", steps, tau, method, clip, True)
