import dataclasses
import json
import warnings

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that do not reach noise
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
    schedule = ddim.cosine_schedule(10)
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
        (lambda: ddim.linear_schedule(20, rescale_betas=True), "stay below 1: take more than 20"),
        (lambda: ddim.scaled_linear_schedule(9, rescale_betas=True), "stay below 1"),
        (lambda: ddim.ScheduleConfig("cosine", beta_end=0.02).build(), "cosine .* has no betas"),
        (lambda: ddim.ScheduleConfig("cosine", rescale_betas=True).build(), "has no betas"),
        (lambda: ddim.ScheduleConfig("cubic").build(), "unknown schedule kind 'cubic'; choose lin"),
        (lambda: ddim.rescale_zero_terminal_snr(ddim.cosine_schedule(1)), "T >= 2"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_traced_betas_are_refused():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda b: ddim.schedule_from_betas(b).log_alpha_bar)(jnp.full((3,), 0.1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ddim.linear_schedule(100), "0.364.*rescale_betas=True"),
        (lambda: ddim.scaled_linear_schedule(100), "0.584.*rescale_betas=True"),
        (lambda: ddim.cosine_schedule(1000, max_beta=0.001), "0.404.*max_beta"),
        (lambda: ddim.ScheduleConfig("linear", 100).build(), "0.364.*rescale_betas=True"),
    ],
)
def test_a_schedule_that_never_reaches_noise_says_so(make, says):
    with pytest.warns(UserWarning, match=f"alpha_bar_T = {says}"):
        make()


def test_the_warning_is_right_and_rescaled_betas_mend_what_it_says():
    """Exact denoiser of N(0.8, 0.01): the mean of the samples, for T = 100."""
    x_T = ddim.initial_noise(jax.random.key(0), 500, (1,))

    def draw(schedule):
        exact = ddim.oracle.gaussian(schedule, 0.8, 0.01)
        return ddim.sample(exact, x_T, schedule, ddim.timesteps(100, 50))

    with pytest.warns(UserWarning, match="never reaches noise"):
        assert abs(draw(ddim.linear_schedule(100)).mean() - 0.8) > 0.04
    x_0 = draw(ddim.ScheduleConfig("linear", 100, rescale_betas=True).build())
    assert abs(x_0.mean() - 0.8) < 0.02


def test_one_definition_of_each_kind():
    for kind, schedule in {
        "linear": ddim.linear_schedule(),
        "scaled_linear": ddim.scaled_linear_schedule(),
        "cosine": ddim.cosine_schedule(),
    }.items():
        built = ddim.ScheduleConfig(kind).build()
        np.testing.assert_array_equal(built.log_alpha_bar, schedule.log_alpha_bar)


OLD_BETAS = {"num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def test_facts_of_older_files_mean_the_same_schedule():
    made = {
        "linear": ddim.linear_schedule(1000, 1e-4, 0.02),
        "scaled_linear": ddim.scaled_linear_schedule(1000, 1e-4, 0.02),
        "cosine": ddim.cosine_schedule(1000),  # its betas were stored and never used
    }
    for kind, schedule in made.items():
        old = {"kind": kind, **OLD_BETAS}
        config = ddim.ScheduleConfig.from_facts(old)
        np.testing.assert_array_equal(config.build().log_alpha_bar, schedule.log_alpha_bar)
        assert config.facts() == old  # so that a run can be resumed
    with pytest.raises(ValueError, match="has no betas"):
        ddim.ScheduleConfig.from_facts({"kind": "cosine", **OLD_BETAS, "beta_end": 0.5}).build()


@pytest.mark.parametrize(
    "config",
    [
        ddim.ScheduleConfig(),
        ddim.ScheduleConfig("scaled_linear", 50, beta_end=0.3),
        ddim.ScheduleConfig("cosine", 10),
        ddim.ScheduleConfig("linear", 200, rescale_betas=True),
        ddim.ScheduleConfig("scaled_linear", 100, zero_terminal_snr=True),
        ddim.ScheduleConfig("cosine", 10, zero_terminal_snr=True),
    ],
)
def test_facts_round_trip(config):
    back = ddim.ScheduleConfig.from_facts(json.loads(json.dumps(config.facts())))
    np.testing.assert_array_equal(back.build().log_alpha_bar, config.build().log_alpha_bar)
    assert back == dataclasses.replace(config, beta_start=back.beta_start, beta_end=back.beta_end)


def test_zero_terminal_snr_of_few_steps_has_nothing_to_warn_of():
    """Warnings are errors here."""
    schedule = ddim.linear_schedule(100, zero_terminal_snr=True)
    raw = ddim.schedule_from_betas(np.linspace(1e-4, 0.02, 100))
    want = ddim.rescale_zero_terminal_snr(raw)
    np.testing.assert_array_equal(schedule.log_alpha_bar, want.log_alpha_bar)
    assert ddim.ScheduleConfig(num_steps=100, zero_terminal_snr=True).build().alpha_bar[-1] == 0


def test_repr_is_short_whatever_the_leaf():
    schedule = ddim.linear_schedule(1000)
    assert repr(schedule) == "Schedule(num_steps=1000, alpha_bar_T=4.04e-05)"
    assert repr(ddim.rescale_zero_terminal_snr(schedule)).endswith("alpha_bar_T=0)")
    seen = []
    jax.make_jaxpr(lambda s: seen.append(repr(s)))(schedule)
    assert seen == ["Schedule(num_steps=1000, alpha_bar_T=traced)"]
    for change in (lambda _: None, np.shape, lambda leaf: leaf[:0], lambda leaf: leaf[0], type):
        assert len(repr(jax.tree.map(change, schedule))) < 100
    assert (
        len(repr(jax.vmap(lambda s: s)(jax.tree.map(lambda v: jnp.ones((2, 9)), schedule)))) < 200
    )


def test_log_snr_has_its_gradient_although_infinite_at_zero():
    schedule = ddim.schedule_from_alpha_bar([1.0, 0.5, 0.0])
    slope = jax.grad(lambda s: s.log_snr[1])(jax.tree.map(jnp.float32, schedule)).log_alpha_bar
    np.testing.assert_allclose(slope, [0, 2, 0], rtol=1e-6)  # d log(ᾱ/(1 − ᾱ))/d log ᾱ = 1/(1 − ᾱ)
    assert schedule.log_snr.tolist() == [np.inf, 0, -np.inf]
