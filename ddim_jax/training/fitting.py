"""The preset for one's own images: network, batch and length chosen by their size and the device.

On a GPU or TPU the paper's network for the size. On a CPU the largest that gets through some
thousand updates of 32×32 images in a quarter of an hour.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.networks.config import UNetConfig
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.presets import Fitted
from ddim_jax.training.step import TrainState, init_state, make_train_step

SIZES = (32, 64, 128, 256)  # the shorter side that each row of `NETWORKS` is made for
SMALLEST, LARGEST = 8, 320
NETWORKS: dict[bool, dict[int, dict[str, Any]]] = {  # of a CPU or not → of a size → its fields
    True: {
        32: {"multipliers": (1, 1, 2)},
        64: {"multipliers": (1, 1, 2, 2)},
        128: {"multipliers": (1, 1, 2, 2, 2)},
        256: {"multipliers": (1, 1, 2, 2, 2, 2)},
    },
    False: {
        32: {"multipliers": (1, 2, 2, 2)},
        64: {"multipliers": (1, 2, 2, 2, 4)},
        128: {"multipliers": (1, 1, 2, 2, 4), "dtype": "bfloat16"},
        256: {"multipliers": (1, 1, 2, 2, 4, 4), "dtype": "bfloat16", "remat": True},
    },
}
TRAINING: dict[bool, dict[int, dict[str, Any]]] = {
    True: {
        32: {"batch_size": 16, "num_updates": 3000},
        64: {"batch_size": 8, "num_updates": 4000},
        128: {"batch_size": 4, "num_updates": 4000},
        256: {"batch_size": 2, "num_updates": 4000},
    },
    False: {
        32: {"batch_size": 128, "num_updates": 50_000},
        64: {"batch_size": 128, "num_updates": 50_000},
        128: {"batch_size": 64, "num_updates": 100_000, "accumulate": 2},
        256: {"batch_size": 32, "num_updates": 200_000, "accumulate": 4},
    },
}


def fit_preset(
    preset: Fitted,
    given: Collection[str],
    image_shape: tuple[int, int, int],
    platform: str | None = None,
    *,
    network: bool = True,
) -> Fitted:
    """The preset with a network and a training that suit the images; what was given stays.

    Args:
      preset: what was asked for.
      given: the fields that were asked for by name: "model.channels", "train.batch_size", ….
      image_shape: (H, W, C) of the data.
      platform: "cpu" or another; by default that of JAX.
      network: whether to choose the network too; else it is the preset's.

    Returns:
      The preset, whole.

    Raises:
      ValueError: no network for images of this size; the message says which crop or size to choose.

    Example:
      >>> from ddim_jax.training.presets import images
      >>> fitted = fit_preset(images(), {"train.batch_size"}, (64, 96, 3), "gpu")
      >>> fitted.model.image_size, fitted.model.multipliers, fitted.train.ema_decay
      ((64, 96), (1, 2, 2, 2, 4), 0.9999)
    """
    cpu = (platform or jax.default_backend()) == "cpu"
    train = TRAINING[cpu][_row(image_shape)] | {"learning_rate": 2e-3 if cpu else 2e-4}
    updates = preset.train.num_updates if "train.num_updates" in given else train["num_updates"]
    model = _network(preset.model, given, image_shape, cpu) if network else {}
    return filled(preset, given, model, train | schedule_of(updates))


def filled(
    preset: Fitted, given: Collection[str], model: Mapping[str, Any], train: Mapping[str, Any]
) -> Fitted:
    """The preset with these fields of network and training, but for those that were given."""

    def joined(part: str, own: Any, values: Mapping[str, Any]) -> Any:
        return dataclasses.replace(
            own, **{name: v for name, v in values.items() if f"{part}.{name}" not in given}
        )

    return dataclasses.replace(
        preset,
        model=joined("model", preset.model, model),
        train=joined("train", preset.train, train),
    )


def schedule_of(num_updates: int) -> dict[str, Any]:
    """What of a training follows from its length: warm-up, average, how often it tells.

    Example:
      >>> schedule_of(3000)["ema_decay"], schedule_of(3000)["checkpoint_every"]
      (0.999, 500)
    """
    every = max(num_updates // 6, 1)
    return {
        "num_updates": num_updates,
        "warmup_steps": min(num_updates // 20, 1000),
        "ema_decay": float(np.clip(round(1 - 3 / num_updates, 6), 0, 0.9999)),
        "log_every": min(max(num_updates // 80, 1), 100),
        "checkpoint_every": min(every, 5000),
        "sample_every": min(every, 5000),
    }


def lasting(preset: Fitted, given: Collection[str], seconds: float) -> Fitted:
    """The preset with as many updates as fit into `preset.minutes`.

    Args:
      preset: of `fit_preset`.
      given: see there.
      seconds: that one update takes, of `time_update`.

    Raises:
      ValueError: both a number of updates and minutes are given, or not even 10 updates fit.
    """
    assert preset.minutes is not None
    updates = int(preset.minutes * 60 / seconds)
    if updates < 10:
        raise ValueError(
            f"one update takes {seconds:.3g} s, so that {preset.minutes:g} minutes are {updates} "
            "updates: give more --minutes, a smaller --train.batch-size or --data.resize"
        )
    follows = {k: v for k, v in schedule_of(updates).items() if f"train.{k}" not in given}
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, **follows))


def check_minutes(preset: Fitted, given: Collection[str]) -> None:
    """Raises ValueError where the time to train is no time, or said twice."""
    if preset.minutes is None:
        return
    if not 0 < preset.minutes < math.inf:
        raise ValueError(f"--minutes must be positive, got {preset.minutes:g}")
    if "train.num_updates" in given:
        raise ValueError("--minutes chooses --train.num-updates: give one of them, not both")


def time_update(
    apply_fn: Callable[..., Any],
    params: Any,
    schedule: Any,
    config: TrainConfig,
    image_shape: tuple[int, int, int],
    num_classes: int | None,
    updates: int = 10,
) -> float:
    """Seconds of one update on one device and no data, compiling apart; the median of a few."""
    step = make_train_step(apply_fn, schedule, config, num_classes)
    batch = {
        "image": jnp.zeros((config.batch_size, *image_shape), jnp.uint8),
        "label": jnp.zeros(config.batch_size, jnp.int32),
    }
    state: TrainState = init_state(params, config)
    times = []
    for _ in range(updates + 1):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def _row(image_shape: tuple[int, int, int]) -> int:
    """The size whose networks suit images of this one."""
    return min(SIZES, key=lambda size: abs(math.log(size / min(image_shape[:2]))))


def _check_size(image_shape: tuple[int, int, int]) -> None:
    height, width, channels = image_shape
    side = min(height, width)
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, these have {channels}")
    if not SMALLEST <= side <= LARGEST or max(height, width) > 4 * side:
        raise ValueError(
            f"images of {height}×{width}: the shorter side must be {SMALLEST} to {LARGEST}, the "
            f"longer at most four times that. {_advice(side)}"
        )


def _network(
    model: UNetConfig,
    given: Collection[str],
    image_shape: tuple[int, int, int],
    cpu: bool,
) -> dict[str, Any]:
    """The fields of a `UNetConfig`; as many of a row's levels as halve the sides exactly."""
    _check_size(image_shape)
    height, width, channels = image_shape
    fields = NETWORKS[cpu][_row(image_shape)]
    side, halvings = min(height, width), 0
    if "model.multipliers" in given:
        levels = len(model.multipliers)
    else:
        while math.gcd(height, width) % 2 ** (halvings + 1) == 0 and side >> (halvings + 1) >= 4:
            halvings += 1
        levels = min(halvings + 1, len(fields["multipliers"]))
        if side >> (levels - 1) > 16:
            raise ValueError(
                f"images of {height}×{width} can be halved {levels - 1} times, which leaves a "
                f"network with too many pixels at its bottom. {_advice(side)}; or cut out sides "
                f"that are multiples of {2 ** (len(fields['multipliers']) - 1)} with --data.crop"
            )
    resolutions = [side >> level for level in range(levels)]
    attended = [] if cpu else [r for r in resolutions if r <= 16][:1]
    return {
        "image_size": height if height == width else (height, width),
        "in_channels": channels,
        "channels": 32 if cpu else 128,
        "num_blocks": 1 if cpu else 2,
        "attention_resolutions": tuple(attended),
        "dropout": 0.0 if cpu or side > 96 else 0.1,
        "norm_groups": 8 if cpu else 32,  # a group of one channel would forget t and the class
        **fields,
        "multipliers": fields["multipliers"][:levels],
    }


def _advice(side: int) -> str:
    best = max((size for size in SIZES if size <= side), default=SIZES[0])
    return f"Choose --data.resize {best}, which cuts out the centre square"


def describe_fit(preset: Fitted, parameters: int, size: int, platform: str) -> str:
    """What was chosen, in a paragraph."""
    model, train = preset.model, preset.train
    height, width, channels = model.image_shape
    return (
        f"{preset.name}: {size:,} images of {height}×{width}×{channels} on {platform}: a network "
        f"of {parameters:,} parameters ({model.channels} channels × {model.multipliers}, "
        f"{model.dtype}), {train.num_updates:,} updates of {train.batch_size} images "
        f"({train.num_updates * train.batch_size / size:.3g} epochs), rate "
        f"{train.learning_rate:g}, average {train.ema_decay:g}, "
        f"{'mirrored at random' if train.flip else 'never mirrored'}, predicting {train.prediction}"
    )
