"""Presets: everything that defines a run, from the data to the optimiser, as plain dataclasses.

A preset's docstring gives its command, the hardware it wants, and the time and score to expect.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ddim_jax import data
from ddim_jax.data import Dataset
from ddim_jax.data.sets import OWN
from ddim_jax.networks.unet import UNetConfig
from ddim_jax.pictures.images import crop_resize
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images to learn from."""

    name: str = "digits"  # "digits", a path, hf:NAME, what TFDS has prepared, or module:function
    split: str = "train"
    crop: tuple[int, int, int, int] | None = None  # first cut out (top, left, height, width)
    resize: int | None = None  # then bring the shorter side to this, and cut out the centre square
    on_corrupt: Literal["stop", "skip"] = "stop"  # a record that cannot be read
    labels: str | None = None  # "folders", a .npy beside .npy or .npz, a column of Hugging Face
    background: str | None = None  # the colour behind what is transparent, which is refused else
    channels: Literal[1, 3] | None = None  # of your own pictures; by default as they are
    holdout: float = 0  # images kept apart: a fraction in (0, 1), or their number

    def load(self, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
        """The data set, cropped and resized, with its `held_out`; see `data.load`."""
        plain = self.crop is self.resize is None
        transform = None if plain else crop_resize(self.crop, self.resize)
        whole = data.load(
            self.name,
            self.split,
            data_dir,
            transform,
            on_corrupt=self.on_corrupt,
            labels=self.labels,
            background=self.background,
            channels=self.channels,
        )
        return data.hold_out(whole, self.holdout)

    def at_hand(self, data_dir: str | os.PathLike[str] | None = None) -> bool:
        """Whether there is such a data set here; what is wrong with one that is there is raised.

        Example:
          >>> DataConfig("digits").at_hand(), DataConfig("cifar10").at_hand("/nowhere")
          (True, False)
        """
        try:
            self.load(data_dir)
        except ImportError:
            return False
        except ValueError as error:
            if not str(error).startswith("no data set"):
                raise
            return False
        return True


def learned_from(facts: Mapping[str, Any]) -> DataConfig | None:
    """The images that a model learned from, cropped and resized as then, where its facts say so.

    Data that are code, module:function, are left out: what a file says is not run unasked.

    Example:
      >>> learned_from({"data": {"name": "mnist/3.0.1", "transform": {"resize": 8}}}).resize
      8
      >>> learned_from({"data": {"name": "builtins:exec", "split": "print('hello')"}})
    """
    own = facts.get("data") or {}
    if "name" not in own or OWN.fullmatch(own["name"]):
        return None
    transform = own.get("transform") or {}
    return DataConfig(
        re.sub(r"/(\d+\.\d+\.\d+)$", r":\1", own["name"]),
        own.get("split", "train"),
        crop=tuple(transform["crop"]) if transform.get("crop") else None,
        resize=transform.get("resize"),
    )


@dataclasses.dataclass(frozen=True)
class Preset:
    """One training run, whole."""

    name: str
    data: DataConfig
    schedule: ScheduleConfig
    model: UNetConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class Fitted(Preset):
    """A preset whose network and training are chosen for its images: `fitting.fit_preset`."""

    minutes: float | None = None  # how long to train, in place of train.num_updates


def digits() -> Preset:
    """scikit-learn's 8×8 digits, offline: the demo.

    Command: `ddim-jax train digits`. Hardware: 2 CPU cores. Time: 3 CPU-minutes. Score: pixel-space
    Fréchet distance 0.185 ± 0.010 at S = 50, η = 0, 2,000 samples, three seeds; with half of the
    updates, as the demo takes, 0.271 ± 0.021. (A perfect sampler's 2,000: 0.065; one half of the
    data against the other: 0.282.) The `digits` that ships (0.248) predicts v, which encodes better
    than x_0, and was trained with γ = 1, rate 2e-3 and 32 groups in the norms.
    """
    return Preset(
        "digits",
        DataConfig("digits"),
        ScheduleConfig(),
        UNetConfig(
            image_size=8,
            in_channels=1,
            channels=32,
            multipliers=(1, 2),
            num_blocks=1,
            attention_resolutions=(),
            norm_groups=8,
            dropout=0.0,
        ),
        TrainConfig(
            batch_size=32,
            num_updates=2800,
            prediction="x_0",
            gamma="min-snr-5",
            learning_rate=3e-3,
            warmup_steps=100,
            cosine_decay=True,
            ema_decay=0.999,
            log_every=50,
            checkpoint_every=700,
        ),
    )


def digits_labels() -> Preset:
    """The digits with their classes, for guidance: the model that ships as `digits-labels`.

    Command: `ddim-jax train digits-labels`. Hardware: 2 CPU cores. Time: 4 CPU-minutes. Score:
    pixel-space Fréchet distance 0.176 of the ten classes in turn at S = 50, η = 0, 2,000 samples,
    without guidance; a classifier reads 98.2 % of them as the class asked for. Drawn without
    a class: 0.414.
    """
    plain = digits()
    model = dataclasses.replace(plain.model, channels=24, num_classes=10)
    train = dataclasses.replace(
        plain.train,
        num_updates=4000,
        prediction="v",
        gamma="one",
        learning_rate=2e-3,
        checkpoint_every=1000,
    )
    return dataclasses.replace(plain, name="digits-labels", model=model, train=train)


def mnist() -> Preset:
    """MNIST at 28×28, a network of 3.2 M parameters.

    Command: `ddim-jax train mnist --data-dir DIR`. Hardware: 2 CPU cores, or any GPU. Time: 33
    CPU-minutes, about 20 minutes at the 33 images/s of 2 idle cores. Score, pixel-space Fréchet
    distance at S = 20: 8.14 ± 0.21 at η = 0, 5,000 samples, trained on CPUs; trained on one H100 in
    float32, 10,000 samples, 7.46 at η = 0 and 10.14 at η = 1 (real halves: 0.82).
    """
    return Preset(
        "mnist",
        DataConfig("mnist"),
        ScheduleConfig(),
        UNetConfig(
            image_size=28,
            in_channels=1,
            channels=64,
            multipliers=(1, 1, 2),
            num_blocks=1,
            attention_resolutions=(7,),
            dropout=0.0,
        ),
        TrainConfig(
            batch_size=32,
            num_updates=1200,
            prediction="x_0",
            learning_rate=1e-3,
            warmup_steps=100,
            cosine_decay=True,
            ema_decay=0.99,
            log_every=20,
            checkpoint_every=200,
            sample_every=200,
        ),
    )


def cifar10() -> Preset:
    """CIFAR-10 as in the paper: Ho et al.'s network of 35.7 M parameters, 800,000 steps.

    Command: `ddim-jax train cifar10 --data-dir DIR`. Hardware: TPU v3-8 or 8 GPUs (Ho et al.: 10.6
    hours per 800,000 steps on 8 TPU v3 cores). Score to expect: FID 4.04 at η = 0, S = 1000; 4.67
    at S = 50 (Table 1). Not run here.
    """
    return Preset(
        "cifar10",
        DataConfig("cifar10"),
        ScheduleConfig(),
        UNetConfig(),
        TrainConfig(batch_size=128, num_updates=800_000, flip=True),
    )


def cifar10_fast() -> Preset:
    """CIFAR-10 with the paper's network, in a quarter of an hour of two large GPUs.

    Command: `ddim-jax train cifar10-fast --data-dir DIR --model.dtype bfloat16`. Hardware: two
    large GPUs; 13 minutes on two H200 (13,400 images/s, without dropout) and one to compile. Score:
    not run so. Without dropout it got worse in the end: FD-ResNet56 at S = 100, η = 0 was 1.24
    after 6.1 million images, 1.65 after the 10.2 million of the whole run (S = 20: 1.72, 2.65).
    """
    train = dataclasses.replace(
        cifar10_small().train,
        num_updates=40_000,
        learning_rate=8e-4,
        checkpoint_every=4000,
        sample_every=4000,
    )
    return dataclasses.replace(cifar10(), name="cifar10-fast", train=train)


def cifar10_small() -> Preset:
    """CIFAR-10 with its classes, 5.6 M parameters: the model that ships as `cifar10-small`.

    Command: `ddim-jax train cifar10-small --data-dir DIR --model.dtype bfloat16`. Hardware: one
    large GPU; 7 minutes on one H200 in bfloat16, 17,400 images/s, and one to compile. Score,
    FD-ResNet56 of 10,000 samples: 1.74 ± 0.04 at S = 20, 1.39 at S = 50, η = 0. Of 100 images at
    S = 20 a ResNet-56, right about 93.4 % of the test images, sees 76 ± 4 % as the class asked for,
    97 ± 2 % with guidance 2.
    """
    return Preset(
        "cifar10-small",
        DataConfig("cifar10"),
        ScheduleConfig(),
        UNetConfig(
            channels=64,
            multipliers=(1, 1.5, 2),
            attention_resolutions=(16, 8),
            dropout=0.0,
            num_classes=10,
            norm_groups=8,
            scale_shift=True,
            time_width=128,
        ),
        TrainConfig(
            batch_size=256,
            num_updates=26_000,
            prediction="v",
            gamma="min-snr-5",
            learning_rate=1e-3,
            warmup_steps=1000,
            cosine_decay=True,
            ema_decay=0.9995,
            flip=True,
        ),
    )


def celeba64() -> Preset:
    """CelebA at 64×64 as in the paper: 78.7 M parameters, 500,000 steps.

    Command: `ddim-jax train celeba64 --data-dir DIR`. Hardware: TPU or GPU. Score to expect: FID
    3.51 at η = 0, S = 1000; 9.17 at S = 50 (Table 1). Not run here.
    """
    return Preset(
        "celeba64",
        DataConfig("celeb_a", crop=(57, 25, 128, 128), resize=64),
        ScheduleConfig(),
        UNetConfig(image_size=64, multipliers=(1, 2, 2, 2, 4)),
        TrainConfig(batch_size=128, num_updates=500_000, flip=True),
    )


def lsun256() -> Preset:
    """LSUN Bedroom (or Church) at 256×256: Ho et al.'s network of 113.7 M parameters.

    Command: `ddim-jax train lsun256 --data-dir DIR`, with `--data.name lsun/church_outdoor` for
    churches. Hardware: a TPU pod slice or 8 large GPUs. Score to expect: FID 6.75 at η = 0, S = 50
    for bedrooms, 10.84 for churches (Table 3). Not run here.
    """
    return Preset(
        "lsun256",
        DataConfig("lsun/bedroom", resize=256),
        ScheduleConfig(),
        UNetConfig(image_size=256, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
        TrainConfig(
            batch_size=64,
            num_updates=2_400_000,
            learning_rate=2e-5,
            flip=True,
        ),
    )


def images() -> Fitted:
    """Your own images: network, batch and length chosen by their size and the device.

    Command: `ddim-jax train images --data.name DIR`, with --data.resize for images of many sizes,
    and --minutes for how long. Hardware: 2 CPU cores for 32×32; a GPU for more, which gets the
    paper's network for the size (32, 64, 256; 128 between). What was chosen is said at the start,
    how long it takes after the first minute; any field may be given instead. Images are mirrored at
    random: --train.no-flip where left and right differ (text, digits). Score on 2,000 images of
    CIFAR-10 with the 3,200 updates of 15 minutes on 2 idle CPU cores (the updates run on one H100):
    colours and shapes, FD-ResNet56 of 2,000 samples 14.4 at S = 50, η = 0.
    """
    return Fitted(
        "images",
        DataConfig(""),
        ScheduleConfig("cosine"),
        UNetConfig(attention_resolutions=()),
        TrainConfig(prediction="v", cosine_decay=True, flip=True),
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        digits,
        digits_labels,
        mnist,
        cifar10,
        cifar10_fast,
        cifar10_small,
        celeba64,
        lsun256,
        images,
    )
}
