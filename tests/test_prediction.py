"""What a network predicts travels with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.process.prediction import prediction_of

SCHEDULE = ddim.linear_schedule(1000)


def network(w, x, t):
    return w * x


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
