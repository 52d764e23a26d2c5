import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ddim_jax as ddim
from tests import reference


def test_linear_is_the_papers():
    ours = ddim.linear_schedule(1000, 1e-4, 0.02)
    np.testing.assert_allclose(ours.alpha_bar, reference.alpha_bar_linear(), rtol=1e-13)
    assert ours.alpha_bar.dtype == np.float64
    assert ours.num_steps == 1000


def test_scaled_linear_interpolates_square_roots():
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    ours = ddim.scaled_linear_schedule(1000)
    np.testing.assert_allclose(ours.alpha_bar[1:], np.cumprod(1 - beta), rtol=1e-12)


def test_cosine_follows_its_definition_until_the_cap():
    ours = ddim.cosine_schedule(1000).alpha_bar
    t = np.arange(1001)
    f = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(ours[:1000], (f / f[0])[:1000], rtol=1e-10)
    assert ours[1000] > 0  # the capped last beta
    np.testing.assert_allclose(1 - ours[1000] / ours[999], 0.999)


@given(st.integers(2, 2000), st.floats(1e-5, 1e-2), st.floats(1.0, 50.0))
def test_any_linear_schedule_decreases_from_one(num_steps, start, ratio):
    schedule = ddim.linear_schedule(num_steps, start, min(start * ratio, 0.5))
    a = schedule.alpha_bar
    assert a[0] == 1
    assert (np.diff(a) < 0).all()
    assert (np.diff(schedule.log_snr) < 0).all()


def test_zero_terminal_snr_keeps_the_first_and_kills_the_last():
    before = ddim.linear_schedule(1000)
    after = ddim.rescale_zero_terminal_snr(before)
    assert after.alpha_bar[-1] == 0
    np.testing.assert_allclose(after.alpha_bar[1], before.alpha_bar[1], rtol=1e-12)
    assert np.isfinite(after.alpha_bar).all()


def test_float32_argument_keeps_precision_near_zero():
    """Trap 4: 1 − ᾱ₁ through a float32 ᾱ is off by 6e-4; through log ᾱ it is not."""
    schedule = ddim.linear_schedule(1000)
    exact = 1 - schedule.alpha_bar[1]

    @jax.jit
    def noise_level(schedule, t):
        x = ddim.forward_marginal(schedule, jnp.zeros((1, 1)), t, jnp.ones((1, 1)))
        return x[0, 0] ** 2

    got = float(noise_level(schedule, 1))
    assert abs(got / exact - 1) < 1e-6
    assert abs((1 - np.float32(schedule.alpha_bar[1])) / exact - 1) > 1e-4


def test_is_a_pytree():
    schedule = ddim.linear_schedule(10)
    assert [leaf.shape for leaf in jax.tree.leaves(schedule)] == [(11,)]
    copy = jax.tree.map(lambda leaf: leaf, schedule)
    assert copy.num_steps == 10
    assert isinstance(copy, ddim.Schedule)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ddim.linear_schedule(0), "num_steps"),
        (lambda: ddim.linear_schedule(10, 0.02, 0.01), "beta_start"),
        (lambda: ddim.linear_schedule(10, -0.1, 0.01), "beta_start"),
        (lambda: ddim.schedule_from_betas([]), "non-empty"),
        (lambda: ddim.schedule_from_betas([[0.1]]), r"shape \(1, 1\)"),
        (lambda: ddim.schedule_from_betas([0.1, 1.5]), r"betas\[1\] = 1.5"),
        (lambda: ddim.schedule_from_betas([1.0, 0.1]), r"betas\[0\]"),
        (lambda: ddim.schedule_from_betas([0.1, float("nan")]), r"betas\[1\] = nan"),
        (lambda: ddim.schedule_from_alpha_bar([0.9, 0.5]), "prepend 1.0"),
        (lambda: ddim.schedule_from_alpha_bar([1.0, 0.5, 0.5]), r"alpha_bar\[2\] = 0.5"),
        (lambda: ddim.schedule_from_alpha_bar([1.0, -0.5]), r"alpha_bar\[1\] = -0.5"),
        (lambda: ddim.schedule_from_alpha_bar([1.0, float("nan")]), r"alpha_bar\[1\] = nan"),
        (lambda: ddim.schedule_from_alpha_bar([1.0]), "T >= 1"),
        (lambda: ddim.cosine_schedule(10, max_beta=1.5), "max_beta"),
        (lambda: ddim.ScheduleConfig("cubic").build(), "unknown schedule kind 'cubic'; choose lin"),
        (lambda: ddim.rescale_zero_terminal_snr(ddim.linear_schedule(1)), "T >= 2"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_traced_betas_are_refused():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda b: ddim.schedule_from_betas(b).log_alpha_bar)(jnp.full((3,), 0.1))
