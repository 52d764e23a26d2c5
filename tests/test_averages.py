"""Averages chosen after training: against direct ones in float64, and through a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.storage.weights_file import load_weights
from ddim_jax.training import averages, fit
from ddim_jax.training.averages import SIGMA_RELS, exponent, weights_of
from tests.tiny import SCHEDULE, affine, affine_params, make_config, make_dataset

pytestmark = pytest.mark.usefixtures("one_device", "one_trace")


def profile(sigma_rel, n, length):
    """(length,) float64: the weight of θ_1..θ_length in the average at n, by its definition.

    The share of each i in the integral of the power function, which is what the update makes.
    """
    edges = np.minimum(np.arange(length + 1), n) / n
    return np.diff(edges ** (exponent(sigma_rel) + 1))


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_width_is_that_asked_for(sigma_rel):
    weights, at = profile(sigma_rel, 10**5, 10**5), np.arange(10**5) / 10**5
    mean = (weights * at).sum()
    assert (weights * (at - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


def test_the_update_is_the_average(tmp_path):
    rng, length = np.random.default_rng(0), 40
    path = rng.normal(size=(length, 3)).cumsum(0)
    like, follow = {"w": jnp.zeros(3)}, jax.jit(averages.follow)
    kept = averages.begin(tmp_path, like, 0)
    for step in range(1, length + 1):
        if step == 17:  # stored and taken up
            averages.store(tmp_path, kept, 16)
            kept = averages.begin(tmp_path, like, 16)
        kept = follow(kept, {"w": jnp.asarray(path[step - 1], jnp.float32)}, jnp.int32(step))
    averages.store(tmp_path, kept, length)
    stored, _ = load_weights(tmp_path / "averages" / "00000040.safetensors")
    for sigma_rel in SIGMA_RELS:  # float32 sums of numbers of order 5
        direct = profile(sigma_rel, length, length) @ path
        np.testing.assert_allclose(stored[f"{sigma_rel:g}"]["w"], direct, atol=2e-5)


@pytest.mark.parametrize("count", [6, 16])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.07, 0.1, 0.15, 0.25])
def test_any_width_is_the_best_sum_of_those_stored(sigma_rel, count):
    """As near as any sum of the profiles is, which NumPy says of them written out."""
    length, steps = 6400, np.arange(1, count + 1) * 6400 // count
    weights, error = weights_of(sigma_rel, length, steps)
    stored = np.stack([profile(kept, n, length) for n in steps for kept in SIGMA_RELS], 1)
    want = profile(sigma_rel, length, length)
    best = stored @ np.linalg.lstsq(stored, want, rcond=None)[0] - want
    got = stored @ weights.ravel() - want
    # Profiles of 6,400 steps in place of continuous ones: 10⁻⁴ or so.
    norm = np.linalg.norm(want)
    assert np.linalg.norm(got) / norm == pytest.approx(np.linalg.norm(best) / norm, abs=3e-4)
    assert error == pytest.approx(np.linalg.norm(best) / norm, abs=3e-4)
    assert abs(weights).sum() < 10  # float32's rounding of what is stored stays small


def run(directory, updates=12, **options):
    config = make_config(post_hoc=True, num_updates=updates, sample_every=0, log_every=1)
    return fit(
        affine, affine_params(), SCHEDULE, make_dataset(), config, directory,
        facts={"model": {"kind": "affine"}}, progress=False, **options,
    )  # fmt: skip


def test_a_run_stores_them_with_its_checkpoints_and_goes_on(tmp_path, monkeypatch):
    path = []

    def keep(state, line):
        path.append(np.float64([state.params["w"], state.params["b"]]))

    run(tmp_path, 4, on_log=keep)
    run(tmp_path, 12, resume="must", on_log=keep)
    assert [int(p.stem) for p in sorted((tmp_path / "averages").iterdir())] == [4, 8, 12]

    def like(run):  # of our U-Net alone does load_model know
        return dataclasses.make_dataclass("Model", ["facts", "params", "_replace"])(
            {}, None, lambda **new: new
        )

    monkeypatch.setattr(averages, "load_model", like)
    for sigma_rel in SIGMA_RELS:
        got = averages.average(tmp_path, sigma_rel)
        direct = profile(sigma_rel, 12, 12) @ np.array(path)
        np.testing.assert_allclose(
            [got["params"]["w"], got["params"]["b"]], direct, rtol=1e-5
        )  # float32
        assert got["facts"]["average"]["step"] == 12
    first = averages.average(tmp_path, 0.1, step=4)["params"]
    np.testing.assert_allclose(first["w"], profile(0.1, 4, 4) @ np.array(path)[:4, 0], rtol=1e-5)
    with pytest.raises(ValueError, match="of 3 steps one of sigma_rel = 0.28 is not made: .* off"):
        averages.average(tmp_path, 0.28)
    with pytest.raises(ValueError, match="no averages of step 5; it has 4, 8, 12"):
        averages.average(tmp_path, 0.1, step=5)
    (tmp_path / "averages" / "00000012.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00000012"):
        run(tmp_path, 14, resume="must")


def test_what_cannot_be_averaged_is_said(tmp_path):
    for sigma_rel in (0, -0.1, 0.3, np.nan):
        with pytest.raises(ValueError, match=r"sigma_rel must be in \(0, 0.28\], got"):
            averages.average(tmp_path, sigma_rel)
    with pytest.raises(ValueError, match="holds no averages: train with --train.post-hoc"):
        averages.average(tmp_path, 0.1)
    with pytest.raises(ValueError, match="nothing is no folder of a run"):
        averages.average("nothing", 0.1)
