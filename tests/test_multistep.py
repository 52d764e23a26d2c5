"""Adams–Bashforth DDIM: orders from fits, textbook coefficients, and plain loops from the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling.adams_bashforth import adams_bashforth_weights
from tests import reference

SCHEDULE = ddim.linear_schedule(1000)
A = reference.alpha_bar_linear(1000)


def test_order_of_convergence_in_sigma():
    """Of `"angle"` in test_methods.py, beside all other methods."""
    schedule, denoise, x_T, exact = reference.smooth_problem()
    sizes = np.array([32, 64, 128])
    least = {1: 0.95, 2: 1.9, 3: 2.8, 4: 3.7}
    with jax.enable_x64(True):

        def error(order, S):
            tau = np.arange(1, S + 1) * (schedule.num_steps // S)
            x_0 = ddim.multistep_sample(
                denoise, jnp.asarray(x_T), schedule, tau, order, variable="sigma"
            )
            return np.sqrt(np.mean((np.asarray(x_0) - exact) ** 2))

        for order, bound in least.items():
            errors = [error(order, S) for S in sizes]
            slope = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
            assert slope >= bound, (order, errors)


@pytest.mark.parametrize(
    ("order", "row"),
    [(2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12]), (4, np.divide([55, -59, 37, -9], 24))],
)
def test_even_steps_give_the_textbook_coefficients(order, row):
    w = adams_bashforth_weights(np.arange(12.0, -1, -1), order, "sigma")
    np.testing.assert_allclose(w[6:-1], np.broadcast_to(row, w[6:-1].shape), atol=1e-10)


@pytest.mark.parametrize("variable", ["angle", "sigma"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(order, variable):
    """Where ε is a polynomial of degree < order, later steps make no error at all."""
    sigma = np.sqrt(1 / A[[1000, 900, 700, 600, 420, 300, 90, 20, 0]] - 1)
    w = adams_bashforth_weights(sigma, order, variable)
    u = np.arctan if variable == "angle" else lambda s: s
    for n in range(max(order, 5), len(sigma) - 2):
        for degree in range(order):
            integral = quad(lambda s, d: u(s) ** d, sigma[n], sigma[n + 1], (degree,))[0]
            sampled = u(sigma[n - np.arange(order)]) ** degree
            h = sigma[n + 1] - sigma[n]
            np.testing.assert_allclose(h * w[n] @ sampled, integral, rtol=1e-8)


def test_every_row_integrates_a_constant():
    """Σ_j w_nj = 1, the start-up and the last step included."""
    for spacing in ("linear", "quadratic", "logsnr"):
        tau = ddim.timesteps(1000, 20, spacing, schedule=SCHEDULE)
        sigma = np.append(np.sqrt(1 / A[tau[::-1]] - 1), 0)
        for order in (1, 2, 3, 4):
            np.testing.assert_allclose(adams_bashforth_weights(sigma, order).sum(1), 1, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_order_1_is_sample(prediction):
    x_T = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
    tau = ddim.timesteps(1000, 10, "quadratic")

    def network(x, t):
        return jnp.sin(x) * (t[:, None, None, None] / 1000)

    network = ddim.predicts(network, prediction)
    got = ddim.multistep_sample(network, x_T, SCHEDULE, tau, 1)
    want = ddim.sample(network, x_T, SCHEDULE, tau)
    if prediction == "eps":
        assert (got == want).all()  # to the bit
    np.testing.assert_allclose(got, want, atol=1e-5)
    network = ddim.predicts(network, x0_fn=ddim.clip_x0(0.5))
    got = ddim.multistep_sample(network, x_T, SCHEDULE, tau, 1)
    want = ddim.sample(network, x_T, SCHEDULE, tau)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_order_2_against_a_loop():
    """The variable-step formula h((1 + r/2) ε_n − (r/2) ε_{n−1}), r = h_n/h_{n−1}."""
    tau = ddim.timesteps(1000, 12, "quadratic")
    visited = [*tau[::-1], 0]
    sigma = np.sqrt(1 / A[visited] - 1)
    x_T = np.random.default_rng(0).normal(size=(5, 3))
    x, old = x_T / np.sqrt(A[tau[-1]]), None
    for n in range(len(tau)):
        a = A[visited[n]]
        new = np.sqrt(1 - a) * (np.sqrt(a) * x) / (0.3 * a + 1 - a)  # data N(0, 0.3)
        h = sigma[n + 1] - sigma[n]
        if n == 0:
            step, first = h * new, sigma[1] - sigma[0]
        elif n == 1:  # anew from x̄_T with the line through two ε's
            whole = sigma[2] - sigma[0]
            slope = (new - old) / first
            step = whole * old + slope * whole**2 / 2 - first * old
        elif n == len(tau) - 1:
            step = h * new
        else:
            r = h / (sigma[n] - sigma[n - 1])
            step = h * ((1 + r / 2) * new - r / 2 * old)
        x, old = x + step, new
    denoise = oracle.gaussian(SCHEDULE, 0.0, 0.3)
    got = ddim.multistep_sample(
        denoise, jnp.asarray(x_T, jnp.float32), SCHEDULE, tau, 2, variable="sigma"
    )
    np.testing.assert_allclose(got, x, rtol=2e-4, atol=2e-4)


def test_pf_euler_against_a_loop():
    tau = ddim.timesteps(1000, 30)
    x_T = np.random.default_rng(0).normal(size=(5, 3))
    x_bar, visited = x_T / np.sqrt(A[1000]), [0, *tau]
    for t, s in zip(visited[:0:-1], visited[-2::-1], strict=True):
        eps = np.sqrt(1 - A[t]) * (np.sqrt(A[t]) * x_bar) / (0.3 * A[t] + 1 - A[t])
        change = ((1 - A[s]) / A[s] - (1 - A[t]) / A[t]) / 2
        x_bar = x_bar + change * np.sqrt(A[t] / (1 - A[t])) * eps
    denoise = oracle.gaussian(SCHEDULE, 0.0, 0.3)
    got = ddim.pf_euler_sample(denoise, jnp.asarray(x_T, jnp.float32), SCHEDULE, tau)
    np.testing.assert_allclose(got, x_bar, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_on_digits_20_steps_of_order_2_match_50_of_ddim(spacing):
    """Against 200 steps of order 3, which 1000 change by less than 1e-6."""
    denoise, x_T, fine = digits()

    def error(order, S):
        tau = ddim.timesteps(1000, S, spacing)
        x_0 = ddim.multistep_sample(denoise, x_T, SCHEDULE, tau, order)
        return float(jnp.sqrt(((x_0 - fine) ** 2).mean()))

    ddim_50 = error(1, 50)
    assert error(2, 20) <= ddim_50
    assert error(3, 20) <= 0.8 * ddim_50


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    data = load_digits().images[::4].astype(np.float32)[..., None] / 8 - 1
    denoise = oracle.empirical(SCHEDULE, data)
    x_T = ddim.initial_noise(jax.random.key(0), 96, (8, 8, 1))
    fine = ddim.multistep_sample(denoise, x_T, SCHEDULE, ddim.timesteps(1000, 200), 3)
    return denoise, x_T, fine


@pytest.mark.slow
def test_the_fine_solution_is_the_limit_of_ddim():
    """All 1000 steps of DDIM, and of order 3, against the 200 used above."""
    denoise, x_T, fine = digits()
    tau = np.arange(1, 1001)
    close = ddim.multistep_sample(denoise, x_T[:128], SCHEDULE, tau, 3) - fine[:128]
    assert float(jnp.sqrt((close**2).mean())) < 1e-5
    assert float(jnp.median(jnp.abs(ddim.sample(denoise, x_T, SCHEDULE, tau) - fine))) < 1e-5


@pytest.mark.parametrize(
    "order", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3)), 4]
)
def test_one_call_an_element_and_one_trace(order):
    traces, calls = [], []

    def network(x, t):
        traces.append(t)
        jax.debug.callback(lambda t: calls.append(int(t)), t[0], ordered=False)
        return x / 2

    tau = [3, 50, 200, 600, 900, 1000]
    ddim.multistep_sample(network, jnp.ones((2, 3)), SCHEDULE, tau, order).block_until_ready()
    jax.effects_barrier()
    assert sorted(calls) == tau
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("order", "S"),
    [
        pytest.param(order, S, marks=() if S in (1, order - 1) else pytest.mark.slow)
        for order in (2, 3, 4)
        for S in (1, 2, 3, 4, 5)
    ],
)
def test_fewer_steps_than_the_order(order, S):
    """A constant ε is integrated exactly by any method, from S = 1 on."""
    x_T, eps = jnp.ones((2, 3)), jnp.full((2, 3), 0.7)
    tau = np.arange(1, S + 1) * 100
    got = ddim.multistep_sample(lambda x, t: eps, x_T, SCHEDULE, tau, order)
    a = A[tau[-1]]
    np.testing.assert_allclose(got, (1 - np.sqrt(1 - a) * 0.7) / np.sqrt(a), rtol=1e-4)


def test_tau_is_traced_and_memory_does_not_grow():
    denoise = oracle.gaussian(SCHEDULE, 0.0, 0.3)
    x_T = jax.random.normal(jax.random.key(0), (64, 128))
    compilations = []

    @jax.jit
    def sampler(x_T, tau):
        compilations.append(tau)
        return ddim.multistep_sample(denoise, x_T, SCHEDULE, tau, 3)

    for spacing in ("linear", "quadratic", "linspace"):
        tau = ddim.timesteps(1000, 10, spacing)
        want = ddim.multistep_sample(denoise, x_T, SCHEDULE, tau, 3)
        np.testing.assert_allclose(sampler(x_T, tau), want, rtol=1e-3, atol=1e-3)
    assert len(compilations) == 1

    def memory(S):
        draw = jax.jit(
            lambda x: ddim.multistep_sample(denoise, x, SCHEDULE, ddim.timesteps(1000, S), 3)
        )
        return draw.lower(x_T).compile().memory_analysis().temp_size_in_bytes

    assert memory(1000) <= memory(10) + x_T.nbytes / 2


X = jnp.ones((2, 3))


def sample_with(order=2, x=X, schedule=SCHEDULE, tau=(10, 1000), network=lambda x, t: x, **options):
    return ddim.multistep_sample(network, x, schedule, tau, order, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: sample_with(order=0), ValueError, "order must be"),
        (lambda: sample_with(order=5), ValueError, "order must be"),
        (lambda: sample_with(order=True), ValueError, "order must be"),
        (lambda: sample_with(variable="t"), ValueError, "variable must be"),
        (lambda: sample_with(tau=[0, 10]), ValueError, "1..T"),
        (lambda: sample_with(tau=[10, 10]), ValueError, "strictly"),
        (lambda: sample_with(x=jnp.ones((2, 3), int)), TypeError, "floating"),
        (lambda: sample_with(network=lambda x, t: x[:, :1]), ValueError, "shape"),
        (
            lambda: sample_with(
                schedule=ddim.rescale_zero_terminal_snr(SCHEDULE),
                network=ddim.predicts(lambda x, t: x, "v"),
            ),
            ValueError,
            "sigma is infinite",
        ),
        (
            lambda: ddim.pf_euler_sample(
                lambda x, t: x, X, ddim.rescale_zero_terminal_snr(SCHEDULE), [1000]
            ),
            ValueError,
            "sigma is infinite",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
