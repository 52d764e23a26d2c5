"""Training from a trained model: exact starts, added classes, provenance, what contradicts it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.cli import train
from ddim_jax.networks.unet import UNetConfig, build
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.storage.checkpoint import restore_config, restore_part
from ddim_jax.training import fit
from ddim_jax.training.presets import PRESETS, cifar10
from ddim_jax.training.starting import follow, sha256, start_from
from ddim_jax.training.step import init_state
from ddim_jax.weights import load_model, to_facts
from ddim_jax.weights.saving import save_diffusers
from tests.tiny import SCHEDULE, affine, affine_params, assert_same, make_config, make_dataset

pytestmark = pytest.mark.usefixtures("one_device", "one_trace")
PLAIN = UNetConfig((4, 8), 1, 32, (1,), num_blocks=1, attention_resolutions=())
TEN = ScheduleConfig("cosine", 10)


def make_model(config=PLAIN, seed=0):
    """A network whose output and label table are not 0."""
    apply_fn, params = build(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: np.float32(np.asarray(p) + rng.normal(0, 0.05, p.shape)), params
    )
    facts = to_facts(TEN, config, "v")
    return ddim.Model(ddim.predicts(apply_fn, "v"), params, TEN.build(), config, facts)


def with_num_classes(config, count):
    return dataclasses.replace(config, num_classes=count)


@pytest.mark.parametrize(("has", "wanted"), [(None, 3), (2, 3), (2, None), (2, 2)])
def test_at_first_a_changed_network_is_the_model_without_a_label(has, wanted):
    model = make_model(with_num_classes(PLAIN, has))
    start = start_from(model, with_num_classes(PLAIN, wanted))
    x, t = jax.random.normal(jax.random.key(1), (4, 4, 8, 1)), jnp.array([1, 4, 7, 10])
    known = jax.jit(model.apply_fn)(
        model.params, x, t
    )  # no labels: the row of "none", where there is one
    labels = {} if wanted is None else {"labels": jnp.array([0, 1, 2, wanted])}
    got = jax.jit(start.apply_fn)(start.params, x, t, **labels)
    if has == wanted:
        assert_same(start.params, jax.device_put(model.params))
    else:  # the sum of two biases rounds once more: a few ulp of outputs of order 1
        np.testing.assert_allclose(got, known, rtol=1e-5, atol=1e-5)
    assert start.facts["model"]["num_classes"] == wanted
    assert start.facts["init"]["sha256"] == sha256(model.params)


def test_weights_and_average_start_at_the_model_and_the_optimiser_anew():
    model = make_model()
    start = start_from(model, None, "folder/m.safetensors")
    state = init_state(start.params, make_config())
    assert_same(state.params, jax.device_put(model.params))
    assert_same(state.ema, state.params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert start.facts["init"] == {
        "source": "folder/m.safetensors",
        "sha256": sha256(model.params),
    }


def test_any_format_starts_a_run(tmp_path):
    model = load_model("digits")
    save_diffusers(tmp_path, model)
    start = start_from(load_model(tmp_path))
    assert start.facts["init"]["sha256"] == sha256(model.params)
    assert_same(start.params, model.params)


def test_one_changed_bit_is_another_digest():
    params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    other = {**params, "w": params["w"].copy()}
    other["w"][1, 2] = np.nextafter(np.float32(1), 2)
    variants = [params, other, {**params, "w": params["w"].reshape(3, 2)}, {"v": params["w"]}]
    assert len({sha256(each) for each in variants}) == len(variants)


def test_what_a_model_is_cannot_be_changed():
    model = make_model()
    with pytest.raises(ValueError, match="network has channels=32, wanted is 64: only num_classes"):
        start_from(model, dataclasses.replace(PLAIN, channels=64))
    with pytest.raises(ValueError, match="no model and schedule that this version understands"):
        start_from(model._replace(facts={}))
    broken = jax.tree.map(lambda p: p * np.float32(np.nan), model.params)
    with pytest.raises(ValueError, match="weights are not finite"):
        start_from(model._replace(params=broken))


def test_a_preset_follows_the_model_but_for_what_leaves_its_weights():
    facts = to_facts(TEN, PLAIN, "x_0")
    asked = dataclasses.replace(cifar10(), model=UNetConfig(dropout=0.3, num_classes=4))
    got = follow(asked, {"model.dropout", "model.num_classes", "train.seed"}, facts, "m")
    assert got.model == dataclasses.replace(PLAIN, dropout=0.3, num_classes=4)
    assert (got.schedule, got.train.prediction) == (TEN, "x_0")
    assert follow(cifar10(), {"train.batch_size"}, facts, "m").model == PLAIN
    same = dataclasses.replace(cifar10(), model=PLAIN)  # a flag that agrees is no contradiction
    assert follow(same, {"model.channels", "model.multipliers"}, facts, "m").model == PLAIN
    for field, has in (
        ("model.image_size", r"\(4, 8\), asked for is 32"),
        ("model.in_channels", "1, asked for is 3"),
        ("schedule.num_steps", "10, asked for is 1000"),
        ("train.prediction", "'x_0', asked for is 'eps'"),
    ):
        with pytest.raises(ValueError, match=f"m is a network with {field} = {has}: leave it out"):
            follow(cifar10(), {field}, facts, "m")


# Resuming: with a network of two numbers.


def tune(directory, updates, init=None, **options):
    facts = {"model": {"kind": "affine"}, **({"init": init} if init else {})}
    config = make_config(num_updates=updates, sample_every=0)
    return fit(
        affine, affine_params(), SCHEDULE, make_dataset(), config, directory,
        facts=facts, progress=False, say=lambda text: None, **options,
    )  # fmt: skip


def test_a_resumed_run_keeps_its_start_and_takes_no_other(tmp_path):
    init = {"source": "m.safetensors", "sha256": "ab" * 32}
    unbroken = tune(tmp_path / "whole", 8, init)
    tune(tmp_path / "cut", 4, init)
    with pytest.raises(ValueError, match=r"init.sha256: saved 'abab.*', now 'cdcd.*'"):
        tune(tmp_path / "cut", 8, {**init, "sha256": "cd" * 32}, resume="must")
    moved = {**init, "source": "elsewhere.safetensors"}  # the same weights by another name
    tune(tmp_path / "cut", 6, moved, resume="must")
    assert_same(tune(tmp_path / "cut", 8, resume="must"), unbroken)
    assert restore_config(tmp_path / "cut" / "checkpoints", 8)["init"]["sha256"] == "ab" * 32
    assert_same(restore_part(tmp_path / "cut" / "checkpoints"), unbroken.ema)
    tune(tmp_path / "fresh", 4)
    with pytest.raises(ValueError, match=r"init.sha256: saved nothing, now 'abab"):
        tune(tmp_path / "fresh", 8, init, resume="must")


def test_classes_of_other_names_are_said(monkeypatch):
    said, names = [], ("0", "eins", *"23456789")
    monkeypatch.setattr(train, "tell", said.append)
    model, preset = load_model("digits-labels"), PRESETS["digits-labels"]()
    train._tuned(preset, model, "digits-labels", names)
    assert "its table of 10 classes kept (1 is now eins)" in said[0]
