import itertools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling import encode, invert, reconstruct, reconstruction_error
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)
ANGLES = np.arange(8) * np.pi / 4
EIGHT = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
VARIANCE = 0.01


def numpy_mixture(means, variance):
    """Optimal ε of an equal mixture, from Bayes' rule, in float64."""

    def eps(x, t):
        a, s = A[t], A[t] * variance + 1 - A[t]
        squared = ((x[:, None] - np.sqrt(a) * means) ** 2).sum(-1)
        w = np.exp(-(squared - squared.min(1, keepdims=True)) / (2 * s))
        mean = w @ means / w.sum(1, keepdims=True)
        return np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / s

    return eps


def numpy_encode(eps, x, tau, eps_at):
    """Eq. 13 upwards: Euler in x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ)."""
    bar, sigma = np.asarray(x, np.float64), np.sqrt((1 - A) / A)
    for s, t in zip([0, *tau[:-1]], tau):
        label = t if eps_at == "target" else max(s, 1)
        bar = bar + (sigma[t] - sigma[s]) * eps(np.sqrt(A[s]) * bar, label)
    return np.sqrt(A[tau[-1]]) * bar


def draw(means, n, seed=0):
    """n images of the mixture."""
    rng = np.random.default_rng(seed)
    x = means[rng.integers(len(means), size=n)]
    return jnp.asarray(x + np.sqrt(VARIANCE) * rng.normal(size=x.shape), jnp.float32)


def smooth_eps(x, t):
    """Some smooth ε that is no oracle's, for JAX and for NumPy."""
    xp = np if isinstance(x, np.ndarray) else jnp
    scale = (t / 1000 if xp is np else t.astype(x.dtype)[:, None] / 1000) + 0.2
    return xp.sin(2 * x) * scale + 0.1 * xp.roll(x, 1, axis=1)


QUICK = [(1, "linear", "source"), (7, "quadratic", "source"), (7, "linear", "target")]


@pytest.mark.parametrize(
    ("steps", "spacing", "eps_at"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product((1, 7, 50), ("linear", "quadratic"), ("source", "target"))
    ],
)
def test_encode_is_eulers_method_upwards(eps_at, spacing, steps):
    tau = ddim.timesteps(1000, steps, spacing)
    x_0 = np.random.default_rng(1).normal(size=(5, 3))
    expected = numpy_encode(smooth_eps, x_0, tau, eps_at)
    got = encode(smooth_eps, jnp.asarray(x_0, jnp.float32), SCHEDULE, tau, eps_at=eps_at)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("eps_at", ["source", "target"])
def test_encode_of_every_prediction_type_agrees(eps_at):
    """A network is one function ε(x, t), whatever it is parametrised to predict."""
    eps = oracle.mixture(SCHEDULE, EIGHT, VARIANCE)

    def as_prediction(prediction):
        def network(x, t):
            a, b = (jnp.asarray(v, jnp.float32)[t][:, None] for v in (np.sqrt(A), np.sqrt(1 - A)))
            e = eps(x, t)
            x_0 = (x - b * e) / a
            return {"eps": e, "x_0": x_0, "v": a * e - b * x_0}[prediction]

        return network

    tau, x_0 = ddim.timesteps(1000, 20), draw(EIGHT, 16)
    one, *others = (
        encode(ddim.predicts(as_prediction(p), p), x_0, SCHEDULE, tau, eps_at=eps_at)
        for p in ("eps", "x_0", "v")
    )
    for other in others:
        np.testing.assert_allclose(other, one, atol=2e-3)  # x_0 → ε at t = 1 loses two digits


def test_encode_with_traced_tau_and_schedule_compiles_once():
    calls = []

    @jax.jit
    def run(schedule, x_0, tau):
        calls.append(1)
        return encode(smooth_eps, x_0, schedule, tau)

    x_0 = jnp.ones((2, 3))
    for spacing in ("linear", "quadratic", "trailing"):
        tau = ddim.timesteps(1000, 20, spacing)
        expected = encode(smooth_eps, x_0, SCHEDULE, tau)
        np.testing.assert_allclose(run(SCHEDULE, x_0, tau), expected, atol=1e-4)
    assert len(calls) == 1


def test_the_default_encoder_reconstructs_better_and_both_improve_with_steps():
    denoise, x_0 = oracle.mixture(SCHEDULE, EIGHT, VARIANCE), draw(EIGHT, 64)
    error = {}
    for eps_at in ("source", "target"):
        for steps in (10, 50):
            tau = ddim.timesteps(1000, steps)
            rebuilt = reconstruct(denoise, x_0, SCHEDULE, tau, eps_at=eps_at)
            error[eps_at, steps] = float(reconstruction_error(x_0, rebuilt).mean())
    assert error["target", 10] < error["source", 10]
    for eps_at in ("source", "target"):
        assert error[eps_at, 50] < error[eps_at, 10] / 3


@pytest.mark.parametrize(
    "steps", [10, *(pytest.param(S, marks=pytest.mark.slow) for S in (20, 50))]
)
def test_invert_is_exact_on_the_mixture(steps):
    tau, x_0 = ddim.timesteps(1000, steps), draw(EIGHT, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = invert(oracle.mixture(SCHEDULE, EIGHT, VARIANCE), x_0, SCHEDULE, tau)
    assert np.mean(result.converged) >= 0.95
    # Decoded by the loop of Eq. 12 in float64, which knows nothing of the solver.
    eps = numpy_mixture(EIGHT.astype(np.float64), VARIANCE)
    decoded = reference.ddim_loop(eps, result.x_T, A, tau)
    error = np.abs(decoded - np.asarray(x_0)).max(axis=1)
    assert error[np.asarray(result.converged)].max() <= 1e-4


@pytest.mark.slow
def test_invert_is_exact_on_the_smooth_digits():
    digits = (load_digits().data / 8 - 1).astype(np.float32)
    denoise = jax.jit(oracle.empirical(SCHEDULE, digits, VARIANCE))
    tau, x_0 = ddim.timesteps(1000, 50), draw(digits, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = invert(denoise, x_0, SCHEDULE, tau)
    assert np.mean(result.converged) >= 0.95
    decoded = ddim.sample(denoise, result.x_T, SCHEDULE, tau)
    error = np.abs(np.asarray(decoded - x_0)).max(axis=1)
    assert error[np.asarray(result.converged)].max() <= 1.01e-4
    plain = reconstruct(denoise, x_0, SCHEDULE, tau)
    assert np.abs(np.asarray(plain - x_0)).max() > 100 * np.median(error)


@partial(jax.jit, static_argnames="steps")
def invert_gaussian(x_0, mean, variance, steps):
    denoise = oracle.gaussian(SCHEDULE, mean, variance)
    return invert(denoise, x_0, SCHEDULE, ddim.timesteps(1000, steps))


@given(
    seed=st.integers(0, 10**6),
    variance=st.floats(0.05, 2.0),
    mean=st.floats(-1, 1),
    steps=st.sampled_from([6, 20]),
    shape=st.sampled_from([(3, 2), (2, 2, 2, 1)]),
)
def test_invert_against_the_closed_form_of_gaussian_data(seed, variance, mean, steps, shape):
    """Each step is affine for Gaussian data, so that its inverse can be written down."""
    tau = ddim.timesteps(1000, steps)
    x_0 = np.random.default_rng(seed).uniform(-1, 1, size=shape)
    bar, gain, sigma = x_0, 1.0, np.sqrt((1 - A) / A)
    for s, t in zip([0, *tau[:-1]], tau):
        # x̄_s = x̄_t + (σ_s − σ_t) g (x̄_t − mean)
        g = np.sqrt(A[t]) * np.sqrt(1 - A[t]) / (A[t] * variance + 1 - A[t])
        h = sigma[s] - sigma[t]
        bar = (bar + h * g * mean) / (1 + h * g)
        gain /= 1 + h * g
    expected = np.sqrt(A[tau[-1]]) * bar
    x_T = invert_gaussian(jnp.asarray(x_0, jnp.float32), mean, variance, steps).check()
    # The errors of x_0 grow by the gain of the map, as x_0 itself; those of x_T are its own.
    atol = 2e-5 * max(1, np.sqrt(A[tau[-1]]) * gain, np.abs(expected).max())
    np.testing.assert_allclose(x_T, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_invert_other_predictions(prediction):
    network = {"x_0": lambda x, t: 0.6 * jnp.tanh(x), "v": lambda x, t: -0.3 * jnp.sin(x)}
    tau, x_0 = ddim.timesteps(1000, 20, "quadratic")[:12], jnp.linspace(-0.2, 0.2, 12).reshape(4, 3)
    denoise = ddim.predicts(network[prediction], prediction)
    x_T = invert(denoise, x_0, SCHEDULE, tau).check()
    np.testing.assert_allclose(ddim.sample(denoise, x_T, SCHEDULE, tau), x_0, atol=1e-4)


def test_an_image_is_solved_alike_in_any_batch():
    denoise, tau = oracle.mixture(SCHEDULE, EIGHT, VARIANCE), ddim.timesteps(1000, 20)
    x_0 = draw(EIGHT, 8, seed=3)
    whole = invert(denoise, x_0, SCHEDULE, tau).check()
    for i in (0, 7):
        alone = invert(denoise, x_0[i : i + 1], SCHEDULE, tau).check()
        np.testing.assert_allclose(alone[0], whole[i], atol=2e-4)


def test_failure_is_never_silent():
    """x ∓ d·30 leaves a gap around 0 that no x_t reaches: 0.1 has no encoding, 50 has one."""

    def no_solution(x, t):
        return jnp.where(x > 0, -30.0, 30.0) + 0 * x

    x_0 = jnp.concatenate([jnp.full((1, 2), 0.1), jnp.full((2, 2), 50.0)])
    tau = [500]
    with pytest.warns(RuntimeWarning, match="did not converge"):
        result = invert(no_solution, x_0, SCHEDULE, tau)
    assert not np.asarray(result.converged)[0]
    decoded = ddim.sample(no_solution, result.x_T, SCHEDULE, tau)
    true_error = np.abs(np.asarray(decoded - x_0)).max(axis=1)
    np.testing.assert_allclose(result.residual, true_error, rtol=1e-6)
    assert (np.asarray(result.converged) == (true_error <= 1e-4)).all()
    with pytest.raises(RuntimeError, match="more steps"):
        result.check()
    jitted = jax.jit(lambda x: invert(no_solution, x, SCHEDULE, tau))(x_0)
    np.testing.assert_array_equal(jitted.converged, result.converged)


def test_not_a_number_is_a_failure():
    with pytest.warns(RuntimeWarning, match="2 of 2"):
        result = invert(lambda x, t: x * jnp.nan, jnp.ones((2, 2)), SCHEDULE, [10, 500])
    assert not np.any(result.converged)


def test_max_iterations_bounds_the_network_calls():
    with pytest.warns(RuntimeWarning, match="max_iterations"):
        result = invert(
            oracle.mixture(SCHEDULE, EIGHT, VARIANCE), draw(EIGHT, 4), SCHEDULE, [300, 900],
            max_iterations=2,
        )  # fmt: skip
    assert result.iterations.tolist() == [2, 2]


def test_float64_reaches_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x_0 = jnp.asarray(np.asarray(draw(EIGHT, 16), np.float64))
        denoise, tau = oracle.mixture(SCHEDULE, EIGHT, VARIANCE), ddim.timesteps(1000, 20)
        assert invert(denoise, x_0, SCHEDULE, tau, tol=1e-11).check().dtype == jnp.float64


def test_reconstruction_error_is_table_2s():
    x_0 = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1))
    other = np.random.default_rng(1).uniform(-1, 1, x_0.shape)
    in_unit = ((x_0 + 1) / 2 - (other + 1) / 2) ** 2
    got = reconstruction_error(jnp.asarray(x_0, jnp.float32), jnp.asarray(other, jnp.float32))
    np.testing.assert_allclose(got, in_unit.reshape(3, -1).mean(1), rtol=1e-5)


ONES = jnp.ones((2, 3))
ZERO_SNR = ddim.rescale_zero_terminal_snr(SCHEDULE)
V = ddim.predicts(smooth_eps, "v")


@pytest.mark.parametrize("function", [encode, invert, reconstruct])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_0": jnp.ones((2, 3), jnp.uint8)}, TypeError, "floating"),
        ({"tau": [10, 5]}, ValueError, "increase strictly"),
        ({"tau": [10, 2000]}, ValueError, "1..1000"),
        ({"denoise": lambda x, t: x[:1]}, ValueError, "shape of its input"),
        ({"schedule": ZERO_SNR, "tau": [10, 1000]}, ValueError, "zero terminal SNR"),
    ],
)
def test_bad_input(function, changes, error, message):
    good = {"denoise": smooth_eps, "x_0": ONES, "schedule": SCHEDULE, "tau": [10, 100]}
    with pytest.raises(error, match=message):
        function(**(good | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode(smooth_eps, ONES, SCHEDULE, [10], eps_at="middle"), "eps_at"),
        (lambda: invert(smooth_eps, ONES, SCHEDULE, [10], tol=0.0), "tol"),
        (lambda: invert(smooth_eps, ONES, SCHEDULE, [10], max_iterations=0), "max_iterations"),
        (lambda: invert(V, ONES, ZERO_SNR, [1000]), "no inverse"),
        (lambda: reconstruction_error(ONES, ONES[:1]), "shape of x_0"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()
