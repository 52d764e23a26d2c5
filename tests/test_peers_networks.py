"""Networks of the real diffusers: random ones of every switch, there and back."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.networks.unet import make_apply
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.weights import load_model, save_diffusers
from tests.diffusers_networks import draw, inputs, peer, run_peer, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's imports
    why = "needs the peers extra: pip install 'ddim_jax[peers]'"
    pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)

pytestmark = pytest.mark.filterwarnings("default")
SEEDS = range(48)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_there_and_back(tmp_path, seed):
    settings = draw(seed)
    x, i, labels = inputs(settings)
    network = peer(settings)
    network.save_pretrained(tmp_path / "theirs")
    want = run_peer(network, x, i, labels)

    model = load_model(tmp_path / "theirs", schedule=ScheduleConfig())
    given = {} if labels is None else {"labels": labels}
    whole = make_apply(model.config)  # of twice the channels model.apply_fn gives the ε half
    got = jax.jit(whole)(model.params, x, jnp.asarray(i + 1), **given)
    size = np.abs(want).max()  # of float32: a hundred layers of 6e-8, grown by the norms
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * size)

    save_diffusers(tmp_path / "ours", model)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours" / "unet").eval()
    np.testing.assert_allclose(run_peer(again, x, i, labels), want, rtol=0, atol=1e-5 * size)
    assert load_model(tmp_path / "ours").config == model.config


def test_every_value_of_every_switch_is_drawn():
    drawn = {*(value for seed in SEEDS for value in values(draw(seed)))}
    assert {*(value for seed in range(500) for value in values(draw(seed)))} == drawn
    assert len(drawn) > 50


def test_the_defaults_are_those_of_diffusers():
    from ddim_jax.weights.diffusers_words import DEFAULTS

    theirs = dict(diffusers.UNet2DModel.from_config({"sample_size": 8}).config)
    theirs = json.loads(json.dumps({k: v for k, v in theirs.items() if not k.startswith("_")}))
    assert {**theirs, "sample_size": None} == DEFAULTS
