"""The preset for one's own images: what it chooses for which, and what it refuses."""

import dataclasses
import math

import pytest

from ddim_jax.networks.unet import UNetConfig, abstract_params, count_params
from ddim_jax.training import fitting
from ddim_jax.training.fitting import check_minutes, fit_preset, lasting, schedule_of, time_update
from ddim_jax.training.presets import celeba64, cifar10, images, lsun256
from tests.tiny import SCHEDULE, affine, affine_params, make_config

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3), (48, 32, 3), (64, 64, 3), (64, 96, 3), (96, 64, 1),
          (128, 128, 3), (256, 256, 3), (192, 256, 3), (320, 256, 3)]  # fmt: skip


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_takes_the_images_down_to_few_pixels(shape, platform):
    fitted = fit_preset(images(), (), shape, platform)
    assert fitted.model.image_shape == shape
    assert 4 <= fitted.model.resolutions[-1] <= 16  # where attention sees all pixels
    assert fitted.train.batch_size % fitted.train.accumulate == 0
    assert (fitted.train.prediction, fitted.train.flip) == ("v", True)


def test_a_gpu_gets_the_papers_network_and_a_cpu_a_small_one():
    for make, size in ((cifar10, 32), (celeba64, 64)):
        assert fit_preset(images(), (), (size, size, 3), "gpu").model == make().model
    large = fit_preset(images(), (), (256, 256, 3), "gpu").model
    assert dataclasses.replace(large, dtype="float32", remat=False) == lsun256().model
    small = fit_preset(images(), (), (32, 32, 3), "cpu")
    assert count_params(abstract_params(small.model)) == 761_667
    assert (small.train.batch_size, small.train.num_updates) == (16, 3000)


def test_what_is_given_stays():
    asked = dataclasses.replace(
        images(),
        model=UNetConfig(channels=64, multipliers=(1, 2), attention_resolutions=()),
        train=dataclasses.replace(images().train, num_updates=60, ema_decay=0.5, flip=False),
    )
    given = {"model.channels", "model.multipliers", "train.num_updates", "train.ema_decay"}
    fitted = fit_preset(asked, given, (32, 32, 3), "cpu")
    assert (fitted.model.channels, fitted.model.multipliers) == (64, (1, 2))
    assert (fitted.train.num_updates, fitted.train.ema_decay) == (60, 0.5)
    assert (fitted.train.checkpoint_every, fitted.train.warmup_steps) == (10, 3)
    assert not fitted.train.flip
    network = UNetConfig(64, channels=96)  # of a model that is fine-tuned: sizes of its own
    tuned = dataclasses.replace(images(), model=network)
    assert fit_preset(tuned, (), (1000, 1000, 3), "cpu", network=False).model == network


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((33, 33, 3), "33×33 can be halved 0 times.*--data.resize 32.*multiples of 8 with --data"),
        ((100, 100, 3), "halved 2 times, .*--data.resize 64"),
        ((100, 101, 3), "halved 0 times"),
        ((6, 6, 1), "6×6: the shorter side must be 8 to 320.*--data.resize 32"),
        ((1080, 1920, 3), "1080×1920: .*--data.resize 256, which cuts out the centre square"),
        ((32, 200, 3), "the longer at most four times that"),
        ((32, 32, 4), "1 or 3 channels, these have 4"),
    ],
)
def test_other_images_are_refused_with_what_to_do(shape, says):
    with pytest.raises(ValueError, match=says):
        fit_preset(images(), (), shape, "gpu")


def test_minutes_become_updates():
    preset = dataclasses.replace(images(), minutes=15.0)
    fitted = lasting(preset, {"train.log_every"}, seconds=0.25)
    assert fitted.train.num_updates == 3600
    assert fitted.train.ema_decay == pytest.approx(1 - 3 / 3600, abs=1e-6)
    assert fitted.train.log_every == preset.train.log_every
    with pytest.raises(ValueError, match="one update takes 100 s, so that 15 minutes are 9 upd"):
        lasting(preset, (), seconds=100)
    for minutes in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="--minutes must be positive"):
            check_minutes(dataclasses.replace(images(), minutes=minutes), ())
    with pytest.raises(ValueError, match="give one of them, not both"):
        check_minutes(preset, {"train.num_updates"})
    check_minutes(preset, ())


def test_every_length_makes_a_training():
    for updates in (1, 7, 79, 3000, 10**6):
        make_config(**schedule_of(updates))  # else a ValueError


def test_updates_are_timed_apart_from_compiling(monkeypatch):
    clock = iter([0, 100, 100, 101, 101, 105, 105, 107])  # compiling took 99 s of the first
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: next(clock))
    arguments = (affine, affine_params(), SCHEDULE, make_config(), (4, 4, 1), None)
    assert time_update(*arguments, updates=3) == 2
