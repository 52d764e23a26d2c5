"""Any network is a denoiser: the same weights in four frameworks give the same samples."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ddim_jax as ddim
from ddim_jax.sampling import encode, invert

SCHEDULE = ddim.linear_schedule(1000)
TAU = ddim.timesteps(1000, 8)
WIDTH = 5
SHAPES = {"vectors": (4, 3), "audio": (4, 6, 2), "images": (4, 5, 4, 2)}


def weights(channels):
    """Dense layers over the last axis; time is one more channel."""
    rng = np.random.default_rng(0)
    sizes = [(channels + 1, WIDTH), (WIDTH, channels)]
    return [
        (
            jnp.asarray(rng.normal(size=s) / 4, jnp.float32),
            jnp.asarray(rng.normal(size=s[1:]) / 4, jnp.float32),
        )
        for s in sizes
    ]


def with_time(x, t):
    time = jnp.broadcast_to(t.reshape(-1, *(1,) * (x.ndim - 1)), (*x.shape[:-1], 1))
    return jnp.concatenate([x, time.astype(x.dtype) / 1000], axis=-1)


def plain(params):
    (w_1, b_1), (w_2, b_2) = params

    def denoise(x, t):
        over = (*(None,) * (x.ndim - 1), slice(None))
        return jnp.tanh(with_time(x, t) @ w_1 + b_1[over]) @ w_2 + b_2[over]

    return denoise


def flax_linen(params):
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, t):
            h = linen.tanh(linen.Dense(WIDTH, name="inner")(with_time(x, t)))
            return linen.Dense(x.shape[-1], name="outer")(h)

    variables = {
        "params": {n: {"kernel": w, "bias": b} for n, (w, b) in zip(("inner", "outer"), params)}
    }
    return lambda x, t: Network().apply(variables, x, t)


def flax_nnx(params):
    class Network(nnx.Module):
        def __init__(self, channels, rngs):
            self.inner = nnx.Linear(channels + 1, WIDTH, rngs=rngs)
            self.outer = nnx.Linear(WIDTH, channels, rngs=rngs)

        def __call__(self, x, t):
            return self.outer(nnx.tanh(self.inner(with_time(x, t))))

    network = Network(params[1][0].shape[1], nnx.Rngs(0))
    graph, state = nnx.split(network, nnx.Param)
    values = {n: {"kernel": w, "bias": b} for n, (w, b) in zip(("inner", "outer"), params)}
    nnx.replace_by_pure_dict(state, values)
    return lambda x, t: nnx.merge(graph, state)(x, t)


def equinox(params):
    class Network(eqx.Module):
        inner: eqx.nn.Linear
        outer: eqx.nn.Linear

        def __call__(self, pixel):  # Equinox layers take one vector
            return self.outer(jnp.tanh(self.inner(pixel)))

    def layer(w, b):
        linear = eqx.nn.Linear(*w.shape, key=jax.random.key(0))
        return eqx.tree_at(lambda m: (m.weight, m.bias), linear, (w.T, b))

    network = Network(*(layer(w, b) for w, b in params))

    def denoise(x, t):
        pixels = with_time(x, t)
        return jax.vmap(network)(pixels.reshape(-1, pixels.shape[-1])).reshape(x.shape)

    return denoise


@pytest.mark.parametrize("framework", [flax_linen, flax_nnx, equinox])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_framework_gives_the_samples_of_the_plain_function(framework, kind, key):
    shape = SHAPES[kind]
    params = weights(shape[-1])
    x_T = ddim.initial_noise(key, shape[0], shape[1:])
    expected, got = (
        ddim.sample(network(params), x_T, SCHEDULE, TAU, 0.5, key) for network in (plain, framework)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    up, got_up = (
        encode(network(params), expected, SCHEDULE, TAU) for network in (plain, framework)
    )
    np.testing.assert_allclose(got_up, up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_pixelwise_network_treats_every_array_rank_alike(kind, key):
    """Images are their pixels here: reshaped to vectors, they give the same samples."""
    shape = SHAPES[kind]
    denoise = plain(weights(shape[-1]))
    x_T = ddim.initial_noise(key, shape[0], shape[1:])
    whole = ddim.sample(denoise, x_T, SCHEDULE, TAU)
    flat = ddim.sample(denoise, x_T.reshape(-1, shape[-1]), SCHEDULE, TAU)
    assert whole.shape == shape
    np.testing.assert_allclose(whole.reshape(flat.shape), flat, rtol=1e-4, atol=1e-4)


def test_a_network_is_inverted_exactly(key):
    shape = SHAPES["images"]
    denoise, tau = plain(weights(shape[-1])), ddim.timesteps(1000, 20, "quadratic")[:15]
    x_0 = ddim.initial_noise(key, shape[0], shape[1:]) / 4
    x_T = invert(denoise, x_0, SCHEDULE, tau).check()
    np.testing.assert_allclose(ddim.sample(denoise, x_T, SCHEDULE, tau), x_0, atol=1e-4)


@pytest.mark.parametrize("framework", [plain, flax_linen, flax_nnx, equinox])
def test_weights_are_arguments_of_a_jitted_sampler(framework, key):
    """New weights take effect and nothing recompiles."""
    traces = []

    @jax.jit
    def run(params, x_T):
        traces.append(1)
        return ddim.sample(framework(params), x_T, SCHEDULE, TAU)

    x_T = ddim.initial_noise(key, 4, (3,))
    first, second = (run(jax.tree.map(lambda w, s=s: s * w, weights(3)), x_T) for s in (1.0, 0.5))
    assert len(traces) == 1
    assert float(jnp.abs(first - second).max()) > 0.01
