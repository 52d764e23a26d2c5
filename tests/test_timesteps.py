from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ddim_jax as ddim

ALWAYS_EXACT = ["linear", "quadratic", "leading", "trailing", "linspace"]


@pytest.mark.parametrize("spacing", ALWAYS_EXACT)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64, 1000])
def test_every_s_gives_exactly_s_increasing_steps(spacing, num_steps):
    for s in range(1, num_steps + 1):
        tau = ddim.timesteps(num_steps, s, spacing)
        assert tau.shape == (s,)
        assert tau.dtype == np.int32
        assert tau[0] >= 1
        assert tau[-1] <= num_steps
        assert (np.diff(tau) > 0).all()


@given(st.integers(1, 400), st.data(), st.booleans())
def test_log_snr_for_every_s(num_steps, data, zero_terminal):
    s = data.draw(st.integers(1, num_steps))
    schedule = ddim.schedule_from_betas(np.linspace(1e-4, 0.02, num_steps))
    if zero_terminal and num_steps > 1:
        schedule = ddim.rescale_zero_terminal_snr(schedule)
    tau = ddim.timesteps(num_steps, s, "logsnr", schedule=schedule)
    assert tau.shape == (s,)
    assert tau[-1] == num_steps
    assert (np.diff(tau) > 0).all()


def test_log_snr_of_one_step_to_pure_noise():
    schedule = ddim.schedule_from_alpha_bar([1.0, 0.0])  # log SNR is infinite at both ends
    assert ddim.timesteps(1, 1, "logsnr", schedule=schedule).tolist() == [1]


def test_log_snr_is_even_in_log_snr():
    schedule = ddim.linear_schedule(1000)
    tau = ddim.timesteps(1000, 10, "logsnr", schedule=schedule)
    gaps = -np.diff(schedule.log_snr[tau])
    assert gaps.std() / gaps.mean() < 0.03
    uneven = -np.diff(schedule.log_snr[ddim.timesteps(1000, 10)])
    assert uneven.std() / uneven.mean() > 0.2


@given(st.integers(1, 3000), st.data())
def test_paper_formulas_in_exact_arithmetic(num_steps, data):
    s = data.draw(st.integers(1, num_steps))
    c = Fraction(num_steps, s)
    linear = [int(c * i) for i in range(1, s + 1)]
    assert ddim.timesteps(num_steps, s).tolist() == linear
    c = Fraction(num_steps, s * s)
    quadratic = [max(i, int(c * i * i)) for i in range(1, s + 1)]
    assert ddim.timesteps(num_steps, s, "quadratic").tolist() == quadratic
    trailing = [round(Fraction(num_steps * i, s)) for i in range(1, s + 1)]
    assert ddim.timesteps(num_steps, s, "trailing").tolist() == trailing


def test_released_uniform():
    assert ddim.timesteps(1000, 10, "uniform").tolist() == list(range(1, 1000, 100))
    with pytest.raises(ValueError, match="8 steps.*S = 7.*exact=False"):
        ddim.timesteps(1000, 7, "uniform")
    released = [i + 1 for i in range(0, 1000, 1000 // 7)]
    assert ddim.timesteps(1000, 7, "uniform", exact=False).tolist() == released


def test_released_quad():
    released = [int(v) for v in np.linspace(0, np.sqrt(1000 * 0.8), 10) ** 2]
    assert ddim.timesteps(1000, 10, "quad").tolist() == [i + 1 for i in released]
    assert ddim.timesteps(1000, 10, "quad")[-1] == 801
    with pytest.raises(ValueError, match="96 of them distinct"):
        ddim.timesteps(1000, 100, "quad")
    assert len(ddim.timesteps(1000, 100, "quad", exact=False)) == 96


@given(st.integers(1, 1500), st.data(), st.sampled_from(["uniform", "quad"]))
def test_released_spacings_are_exact_or_an_error(num_steps, data, spacing):
    s = data.draw(st.integers(1, num_steps))
    loose = ddim.timesteps(num_steps, s, spacing, exact=False)
    assert (np.diff(loose) > 0).all()
    try:
        assert ddim.timesteps(num_steps, s, spacing).tolist() == loose.tolist()
        assert len(loose) == s
    except ValueError as error:
        assert "exact=False" in str(error)  # noqa: PT017


def test_single_steps_start_from_noise():
    assert ddim.timesteps(1000, 1, "linspace").tolist() == [1000]
    assert ddim.timesteps(1000, 1, "trailing").tolist() == [1000]
    assert ddim.timesteps(1000, 1, "logsnr", schedule=ddim.linear_schedule(1000)).tolist() == [1000]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ddim.timesteps(10, 11), ValueError, "S = 11 and T = 10"),
        (lambda: ddim.timesteps(10, 0), ValueError, "S = 0"),
        (lambda: ddim.timesteps(10, 2.0), TypeError, "must be an int"),
        (lambda: ddim.timesteps(10, 2, "cubic"), ValueError, "unknown spacing 'cubic'.*quadratic"),
        (lambda: ddim.timesteps(10, 2, "logsnr"), ValueError, "needs schedule"),
        (
            lambda: ddim.timesteps(10, 2, "logsnr", schedule=ddim.cosine_schedule(20)),
            ValueError,
            "schedule.num_steps is 20",
        ),
        (lambda: ddim.as_timesteps([], 10), ValueError, "non-empty"),
        (lambda: ddim.as_timesteps([[1]], 10), ValueError, "vector"),
        (lambda: ddim.as_timesteps([1, 1], 10), ValueError, "got 1 then 1"),
        (lambda: ddim.as_timesteps([3, 2], 10), ValueError, "got 3 then 2"),
        (lambda: ddim.as_timesteps(np.uint8([9, 3]), 10), ValueError, "got 9 then 3"),
        (lambda: ddim.as_timesteps([0, 1], 10), ValueError, "add 1 to 0-based"),
        (lambda: ddim.as_timesteps([1, 11], 10), ValueError, r"1..11"),
        (lambda: ddim.as_timesteps([1.5, 3], 10), ValueError, "whole"),
        (lambda: ddim.as_timesteps(["a"], 10), ValueError, "whole"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()
