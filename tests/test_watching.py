"""Watching a run: the held-out loss, Weights & Biases, what is said of its speed."""

import dataclasses
import json
import os
import signal
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.data import hold_out
from ddim_jax.pictures import plots
from ddim_jax.training import fit, loop
from ddim_jax.training.run_folder import Preempted, read_metrics
from tests import tiny
from tests.tiny import SCHEDULE, affine, affine_params, assert_same, make_dataset

pytestmark = pytest.mark.usefixtures("one_device", "one_trace")


def make_config(**changes):
    return tiny.make_config(**{"sample_every": 0, **changes})


def train(directory, config=None, params=None, **options):
    options = {"progress": False, "say": lambda text: None, **options}
    dataset = options.pop("dataset", make_dataset())
    params = params or affine_params()
    return fit(affine, params, SCHEDULE, dataset, config or make_config(), directory, **options)


def lines(directory):
    """The log without what a clock says."""
    clock = ("seconds", "images_per_second")
    kept = read_metrics(directory / "metrics.jsonl")
    return [{name: v for name, v in line.items() if name not in clock} for line in kept]


# The held-out loss.

STILL = {"learning_rate": 1e-30, "prediction": "x_0"}


def test_a_network_of_zeros_that_predicts_x0_has_the_mean_square_of_the_held_out_images(tmp_path):
    dataset = hold_out(make_dataset(), 16)
    nothing = {"w": jnp.float32(0), "b": jnp.float32(0)}
    train(tmp_path, make_config(**STILL), nothing, dataset=dataset)
    pixels = dataset.held_out.arrays()["image"].astype(np.float64) / 127.5 - 1
    held = [line for line in lines(tmp_path) if "held_out_loss" in line]
    assert [line["step"] for line in held] == [4, 8, 12]  # with each checkpoint
    for line in held:  # float32 sums of 256 numbers
        np.testing.assert_allclose(line["held_out_loss"], (pixels**2).mean(), rtol=1e-5)
        assert line["held_out_loss_ema"] == line["held_out_loss"]


def test_t_and_noise_are_fixed_and_the_average_is_told_apart(tmp_path):
    dataset = hold_out(make_dataset(), 0.25)
    train(tmp_path / "still", make_config(**STILL), dataset=dataset)
    still = [line["held_out_loss"] for line in lines(tmp_path / "still") if len(line) > 5]
    assert len(still) == 3
    assert len(set(still)) == 1  # the same weights: the same number, whatever was drawn since
    config = make_config(sample_every=6, checkpoint_every=4, learning_rate=0.05)
    train(tmp_path / "moving", config, dataset=dataset)
    moving = [line for line in lines(tmp_path / "moving") if "held_out_loss" in line]
    assert [line["step"] for line in moving] == [4, 6, 8, 12]  # pictures and checkpoints
    assert all(line["held_out_loss"] != line["held_out_loss_ema"] for line in moving)
    assert moving[-1]["held_out_loss"] < moving[0]["held_out_loss"]


def test_judging_changes_nothing_that_is_learned_and_survives_a_stop(tmp_path):
    dataset = hold_out(make_dataset(), 10)
    config = make_config(log_every=3, checkpoint_every=4)
    alone = train(tmp_path / "alone", config, dataset=dataclasses.replace(dataset, held_out=None))
    assert_same(train(tmp_path / "whole", config, dataset=dataset), alone)
    cut = tmp_path / "cut"
    with pytest.raises(Preempted):  # at step 7, between a judgement and its line
        train(
            cut, config, dataset=dataset,
            on_log=lambda s, line: line["step"] == 6 and os.kill(os.getpid(), signal.SIGTERM),
        )  # fmt: skip
    train(cut, config, dataset=dataset, resume="must")
    assert lines(cut) == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(cut) if "held_out_loss" in line] == [6, 9, 12]


def test_the_held_out_loss_is_drawn_beside_the_other():
    def labels(lines):
        figure = plots.loss_curve(lines)
        told = [line.get_label() for line in figure.axes[0].lines]
        plots.png_bytes(figure)  # closes it
        return told

    plain = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
    judged = [{**plain[1], "held_out_loss": 0.6, "held_out_loss_ema": 0.55}]
    assert labels([plain[0], *judged])[2:] == ["held out", "held out, moving average"]
    assert len(labels(plain)) == 2


# Weights & Biases.


@pytest.fixture
def wandb(monkeypatch):
    """A module that does what ours asks of wandb, and remembers it."""
    fake = types.ModuleType("wandb")
    fake.began, fake.logged, fake.ended = [], [], []

    def init(**options):
        fake.began.append(options)
        return types.SimpleNamespace(
            id=options["id"] or f"run{len(fake.began)}",
            log=lambda values, step: fake.logged.append((step, values)),
            finish=lambda exit_code: fake.ended.append(exit_code),
        )

    fake.init, fake.Image = init, lambda pixels: pixels
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_metrics_and_pictures_and_goes_on_with_its_run(tmp_path, wandb):
    run = tmp_path / "cats"
    train(run, make_config(num_updates=4, sample_every=4), wandb="mine")
    (began,) = wandb.began
    assert (began["project"], began["id"], began["name"]) == ("mine", None, "cats")
    assert began["config"]["train"]["num_updates"] == 4
    assert "mode" not in began  # WANDB_MODE says it
    scalars = [(step, values["loss"]) for step, values in wandb.logged if "loss" in values]
    assert scalars == [(line["step"], line["loss"]) for line in lines(run)]
    (picture,) = [values["samples"] for _, values in wandb.logged if "samples" in values]
    assert (picture.dtype, picture.shape[2]) == (np.uint8, 3)
    assert wandb.ended == [0]
    train(run, make_config(num_updates=6), wandb="mine", resume="must")
    assert (wandb.began[1]["id"], wandb.began[1]["resume"]) == ("run1", "allow")
    assert json.loads((run / "wandb.json").read_text()) == {"project": "mine", "id": "run1"}


def test_a_run_that_fails_is_told_to_wandb_as_such(tmp_path, wandb):
    def fail(state, line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, wandb="mine", on_log=fail)
    assert wandb.ended == [1]


def test_wandb_is_refused_before_anything_is_written(tmp_path, monkeypatch, wandb):
    run = tmp_path / "run"
    for project in ("", "a/b", "a:b"):
        with pytest.raises(ValueError, match="no name for a W&B project"):
            train(run, wandb=project)
    assert not run.exists()
    train(run, make_config(num_updates=2), wandb="mine")
    with pytest.raises(ValueError, match="in the W&B project 'mine', asked for is 'yours'"):
        train(run, make_config(num_updates=4), wandb="yours", resume="must")
    (run / "wandb.json").write_text('{"id": 3}')
    with pytest.raises(ValueError, match=r"wandb\.json does not say a W&B project and run"):
        train(run, make_config(num_updates=4), wandb="mine", resume="must")
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wandb>=0\.17'"):
        train(tmp_path / "new", wandb="mine")
    assert not (tmp_path / "new").exists()


# Speed.


def test_after_the_first_minute_the_user_is_told_how_long_it_takes(tmp_path, monkeypatch, capsys):
    said = []
    train(tmp_path / "short", say=said.append, facts={"model": {}})
    assert not [text for text in said if "to go" in text]
    monkeypatch.setattr(loop, "FIRST_MINUTE", 0.0)
    train(tmp_path / "long", say=said.append, facts={"model": {}}, progress=True)
    (told,) = [text for text in said if "to go" in text]
    assert "images/s" in told
    assert "s of compiling apart" in told
    assert "compiled in" in capsys.readouterr().err
