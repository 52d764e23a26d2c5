import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)
ROOT = jnp.asarray(np.sqrt(1 - A), jnp.float32)


def exact(x, t):
    return ROOT[t][:, None] * x


def test_expectation_on_gaussian_data(key):
    """Data N(0, 1), exact ε: E‖ε_θ − ε‖² = Var(ε | x_t) = ᾱ_t, so L_γ/T = mean of ᾱ_1..ᾱ_T."""
    n = 100_000
    x_0 = jax.random.normal(key, (n, 1))
    got = float(ddim.loss(exact, SCHEDULE, x_0, jax.random.key(1)))
    # Given t the squared error is ᾱ_t χ²₁: E² of the pooled variance is 3 mean ᾱ² − (mean ᾱ)².
    a = A[1:]
    standard_error = np.sqrt((3 * (a**2).mean() - a.mean() ** 2) / n)
    assert abs(got - a.mean()) < 4 * standard_error


def test_gamma_weights_each_time(key):
    n = 100_000
    x_0 = jax.random.normal(key, (n, 1))
    gamma = jnp.zeros(1001).at[:101].set(1.0)  # only t <= 100 counts
    got = float(ddim.loss(exact, SCHEDULE, x_0, jax.random.key(1), gamma))
    a = np.where(np.arange(1, 1001) <= 100, A[1:], 0)
    standard_error = np.sqrt((3 * (a**2).mean() - a.mean() ** 2) / n)
    assert abs(got - a.mean()) < 4 * standard_error


def test_times_are_uniform_in_one_to_t(key):
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    ddim.loss(network, ddim.cosine_schedule(5), jnp.zeros((50_000, 1)), key)
    counts = np.bincount(seen[0], minlength=6)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 10_000).max() < 4.5 * np.sqrt(10_000 * 0.8)


def test_noise_of_an_image_is_its_own(key):
    """Image k's draw does not depend on how many images follow it."""
    seen = []

    def network(x, t):
        seen.append((x, t))
        return x

    x_0 = jax.random.normal(key, (8, 3))
    for n in (8, 3):
        ddim.loss(network, SCHEDULE, x_0[:n], jax.random.key(2))
    (x_all, t_all), (x_few, t_few) = seen
    np.testing.assert_array_equal(t_all[:3], t_few)
    np.testing.assert_allclose(x_all[:3], x_few, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_target_is_what_is_predicted(prediction, key):
    """A network that returns the target itself has loss 0, one that is off by 1 has loss 1."""
    x_0 = jax.random.normal(key, (16, 4))

    def knows_x0(x, t, shift=0.0):
        a = jnp.asarray(A, jnp.float32)[t][:, None]
        eps = (x - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        target = {"eps": eps, "x_0": x_0, "v": jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x_0}
        return target[prediction] + shift

    schedule = ddim.linear_schedule(1000)
    args = (schedule, x_0, jax.random.key(1))
    assert float(ddim.loss(ddim.predicts(knows_x0, prediction), *args)) < 1e-4
    wrong = ddim.predicts(lambda x, t: knows_x0(x, t, 1.0), prediction)
    off = ddim.loss(wrong, *args)
    np.testing.assert_allclose(off, 1.0, rtol=1e-2)


def test_bad_input(key):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"shape \(T\+1,\) = \(1001,\)"):
        ddim.loss(exact, SCHEDULE, x, key, gamma=jnp.ones(1000))
    with pytest.raises(TypeError, match="127.5"):
        ddim.loss(exact, SCHEDULE, x.astype(jnp.uint8), key)
    with pytest.raises(ValueError, match="shape of its input"):
        ddim.loss(lambda x, t: x[:1], SCHEDULE, x, key)
    with pytest.raises(ValueError, match="'w'"):
        ddim.loss(ddim.predicts(exact, "w"), SCHEDULE, x, key)


def test_a_bfloat16_network_is_judged_in_float32():
    x_0 = jax.random.normal(jax.random.key(1), (64, 8))
    seen = []

    def network(x, t):
        seen.append(x.dtype)
        return x / 2

    low, high = (
        ddim.loss(network, SCHEDULE, x.astype(dtype), jax.random.key(0))
        for x, dtype in ((x_0, jnp.bfloat16), (x_0, jnp.float32))
    )
    assert seen == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(low, high, rtol=2e-3)
