"""The models that OpenAI published, by the flags that stand beside them in the two repositories."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A published model: its file, and what it was trained with."""

    file: str
    flags: Mapping[str, Any]


IMPROVED = {"repository": "improved-diffusion", "num_channels": 128, "learn_sigma": True}
COSINE = {"diffusion_steps": 4000, "noise_schedule": "cosine"}
CIFAR10 = {**IMPROVED, **COSINE, "image_size": 32, "num_res_blocks": 3, "dropout": 0.3}
IMAGENET = {**IMPROVED, **COSINE, "image_size": 64, "num_res_blocks": 3}
LSUN = {
    **{**IMPROVED, "image_size": 256, "num_res_blocks": 2, "num_heads": 1},
    **{"use_scale_shift_norm": False, "attention_resolutions": "16", "rescale_timesteps": False},
}
GUIDED = {
    **{"repository": "guided-diffusion", "attention_resolutions": "32,16,8", "learn_sigma": True},
    **{"num_channels": 256, "num_res_blocks": 2, "resblock_updown": True},
    **{"use_scale_shift_norm": True, "diffusion_steps": 1000, "noise_schedule": "linear"},
}
HEADS = {**GUIDED, "num_head_channels": 64}
LABELS = {"class_cond": True}
PUBLISHED: dict[str, Published] = {
    "improved-cifar10": Published("cifar10_uncond_50M_500K.pt", CIFAR10),
    "improved-cifar10-vlb": Published("cifar10_uncond_vlb_50M_500K.pt", CIFAR10),
    "improved-imagenet64": Published("imagenet64_uncond_100M_1500K.pt", IMAGENET),
    "improved-imagenet64-vlb": Published("imagenet64_uncond_vlb_100M_1500K.pt", IMAGENET),
    "improved-imagenet64-cond": Published(
        "imagenet64_cond_270M_250K.pt",
        {**IMAGENET, **LABELS, "num_channels": 192, "rescale_timesteps": False},
    ),
    "improved-lsun-bedroom": Published("lsun_uncond_100M_1200K_bs128.pt", LSUN),
    "improved-lsun-bedroom-2400k": Published("lsun_uncond_100M_2400K_bs64.pt", LSUN),
    "guided-imagenet64": Published(
        "64x64_diffusion.pt",
        {
            **{**HEADS, **LABELS, "image_size": 64, "num_channels": 192, "num_res_blocks": 3},
            **{"noise_schedule": "cosine", "use_new_attention_order": True, "dropout": 0.1},
        },
    ),
    "guided-imagenet128": Published(
        "128x128_diffusion.pt", {**GUIDED, **LABELS, "image_size": 128, "num_heads": 4}
    ),
    "guided-imagenet256": Published("256x256_diffusion.pt", {**HEADS, **LABELS, "image_size": 256}),
    "guided-imagenet256-uncond": Published(
        "256x256_diffusion_uncond.pt", {**HEADS, "image_size": 256}
    ),
    "guided-imagenet512": Published("512x512_diffusion.pt", {**HEADS, **LABELS, "image_size": 512}),
    **{
        f"guided-lsun-{name.replace('_', '-')}": Published(
            f"lsun_{name}.pt",
            {**HEADS, "image_size": 256, "dropout": 0.0 if "no" in name else 0.1},
        )
        for name in ("bedroom", "cat", "horse", "horse_nodropout")
    },
}
"""Name → a model; `load_model("m.pt", flags=name)` reads its file, whatever that is called."""
CLASSIFIERS: dict[str, Published] = {
    f"guided-classifier{size}": Published(
        f"{size}x{size}_classifier.pt",
        {"image_size": size, "classifier_depth": 4 if size == 64 else 2},
    )
    for size in (64, 128, 256, 512)
}
"""Name → a classifier of noisy images; `load_classifier("c.pt", flags=name)` reads it."""


def published(path: str) -> dict[str, Any] | None:
    """The flags of a published file, by its name alone; None of any other.

    Example:
      >>> published("models/64x64_diffusion.pt")["noise_schedule"], published("mine.pt")
      ('cosine', None)
    """
    name = pathlib.PurePath(path).name
    for model in (*PUBLISHED.values(), *CLASSIFIERS.values()):
        if model.file == name:
            return dict(model.flags)
    return None
