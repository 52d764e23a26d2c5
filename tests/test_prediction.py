"""What a network predicts travels with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.process.predictor import prediction_of

SCHEDULE = ddim.linear_schedule(1000)


def network(w, x, t):
    return w * x


EDM = ddim.predicts(network, "edm", schedule=SCHEDULE)


def test_a_bare_function_predicts_eps():
    assert prediction_of(network) == ddim.Prediction("eps", None)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: partial(f, 2.0),
        lambda f: jax.jit(partial(f, 2.0)),
        lambda f: jax.jit(f),
        lambda f: partial(jax.jit(f), 2.0),
        lambda f: ddim.watch(f, print),
        lambda f: ddim.Model(f, 2.0, SCHEDULE).denoise,
        lambda f: ddim.predicts(f),
        lambda f: ddim.classifier_free(f, f, 2.0),
        lambda f: ddim.classifier_free_labels(f, jnp.zeros(2), 0, 2.0),
        lambda f: ddim.classifier(f, lambda x, t: x[:, 0], SCHEDULE),
    ],
)
def test_it_travels(wrap):
    said = ddim.Prediction("v", ddim.clip_x0(1.0), rederive_eps=False)
    denoise = wrap(ddim.predicts(network, "v", x0_fn=said.x0_fn, rederive_eps=False))
    assert prediction_of(denoise) == said


def test_a_class_of_ones_own_says_it_in_a_word():
    class Network:
        prediction = "x_0"

        def __call__(self, x, t):
            return jnp.full_like(x, 0.25)

    x_0 = ddim.sample(Network(), jnp.ones((2, 3)), SCHEDULE, [10, 1000])
    np.testing.assert_array_equal(x_0, 0.25)


def test_a_v_network_cannot_be_read_as_eps():
    v = ddim.predicts(network, "v")
    with pytest.raises(ValueError, match="predicts 'v', and cannot be read as 'eps'"):
        ddim.predicts(v, "eps")
    clipped = ddim.predicts(v, x0_fn=ddim.clip_x0(0.5))
    assert (clipped.prediction.kind, clipped.function) == ("v", network)


def test_make_sampler_of_a_v_model_needs_no_word():
    """The exact v of data at a point: read as ε, the same outputs draw something else."""
    log = jnp.asarray(SCHEDULE.log_alpha_bar)

    def v_of_a_point(w, x, t):
        a, b = jnp.exp(log[t] / 2)[:, None], jnp.sqrt(-jnp.expm1(log[t]))[:, None]
        return a * (x - a * w) / b - b * w

    model = ddim.Model(ddim.predicts(v_of_a_point, "v"), 0.3, SCHEDULE)
    x_T = ddim.initial_noise(jax.random.key(0), 4, (3,))
    np.testing.assert_allclose(ddim.make_sampler(model, [10, 500, 1000])(x_T), 0.3, rtol=1e-4)
    bare = ddim.Model(v_of_a_point, 0.3, SCHEDULE)
    assert not np.allclose(ddim.make_sampler(bare, [10, 500, 1000])(x_T), 0.3, atol=0.1)
    half = ddim.make_sampler(ddim.predicts(model, x0_fn=lambda x_0: x_0 / 2), [1000])
    np.testing.assert_allclose(half(x_T), 0.15, rtol=1e-4)


def edm_of_a_point(w, x, t):
    """F of data at w, σ_d = 0.5, by Karras et al.'s Eq. 7; x comes scaled."""
    log = jnp.asarray(SCHEDULE.log_alpha_bar)[t][:, None]
    sigma = jnp.sqrt(-jnp.expm1(log) / jnp.exp(log))
    root = jnp.sqrt(sigma**2 + 0.25)
    c_skip, c_out, c_in = 0.25 / root**2, sigma * 0.5 / root, 1 / root
    return (w - c_skip * x / c_in) / c_out


def test_edm_is_equation_7_of_karras():
    x_T = ddim.initial_noise(jax.random.key(0), 4, (3,))
    denoise = ddim.predicts(partial(edm_of_a_point, 0.3), "edm", schedule=SCHEDULE)
    t = jnp.array([1, 200, 700, 1000])
    c = ddim.coefficients(SCHEDULE, t, t * 0)
    x_0, eps = ddim.to_x0_eps(c, x_T, denoise(x_T, t), denoise.prediction)
    # c_out/√ᾱ_T = 79 multiplies float32's rounding of the output.
    np.testing.assert_allclose(x_0, 0.3, atol=1e-4)
    np.testing.assert_allclose(ddim.forward_marginal(SCHEDULE, x_0, t, eps), x_T, atol=1e-5)
    model = ddim.Model(edm_of_a_point, 0.3, SCHEDULE)
    sampler = ddim.make_sampler(ddim.predicts(model, "edm"), [10, 500, 1000])
    np.testing.assert_allclose(sampler(x_T), 0.3, atol=1e-4)


def test_edm_of_unit_data_is_minus_v_and_undoes_itself():
    with jax.enable_x64(True):
        x_0, eps = jax.random.normal(jax.random.key(1), (2, 5, 3), jnp.float64)
        t = jnp.array([1, 3, 50, 500, 1000])
        c = ddim.coefficients(SCHEDULE, t, t * 0)
        x_t = ddim.forward_marginal(SCHEDULE, x_0, t, eps)
        v = ddim.from_x0_eps(c, x_0, eps, "v")
        unit = ddim.Prediction("edm", sigma_data=1.0)
        np.testing.assert_allclose(ddim.from_x0_eps(c, x_0, eps, unit), -v, rtol=1e-12)
        for ours, theirs in zip(unit.x0_eps(c, x_t, -v), ddim.to_x0_eps(c, x_t, v, "v")):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
        own = ddim.Prediction("edm", sigma_data=0.3)
        found = own.x0_eps(c, x_t, ddim.from_x0_eps(c, x_0, eps, own))
        np.testing.assert_allclose(found, (x_0, eps), rtol=1e-11)


def test_edm_feeds_and_asks_for_unit_variance():
    """Data of standard deviation 0.2 said to be so, wherever x and t stand among the arguments."""
    key, seen = jax.random.key(2), {}

    def network(w, x, t, labels=None):
        seen["x"], seen["labels"] = x, labels
        return w * x

    denoise = ddim.predicts(network, "edm", sigma_data=0.2, schedule=SCHEDULE)
    x_0, eps = jax.random.normal(key, (2, 100_000)) * jnp.array([[0.2], [1.0]])
    for t in (1, 300, 1000):
        times = jnp.full(len(x_0), t)
        denoise(jnp.float32(2), ddim.forward_marginal(SCHEDULE, x_0, t, eps), times, labels=3)
        target = ddim.from_x0_eps(ddim.coefficients(SCHEDULE, t, 0), x_0, eps, denoise.prediction)
        # Var of a sample variance is 2/n.
        np.testing.assert_allclose([seen["x"].var(), target.var()], 1, atol=4 * np.sqrt(2e-5))
    assert seen["labels"] == 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ddim.predicts(network, "edm"), "give its schedule"),
        (lambda: ddim.predicts(network, "v", sigma_data=0.5), 'sigma_data is of "edm"'),
        (lambda: ddim.Prediction("edm", sigma_data=0.0), "positive and finite"),
        (lambda: ddim.predicts(EDM, sigma_data=0.7), "sigma_data = 0.5, and not 0.7"),
        (lambda: ddim.predicts(EDM, "v"), "predicts 'edm', and cannot be read as 'v'"),
    ],
)
def test_what_edm_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_edm_needs_t():
    with pytest.raises(TypeError, match="x and, after it, t of integers"):
        EDM(jnp.ones((2, 3)), jnp.ones((2, 3)))
