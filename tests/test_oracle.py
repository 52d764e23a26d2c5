"""Exact denoisers against direct sums and matrix inverses in float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ddim_jax as ddim
from ddim_jax.process import oracle
from tests import reference

T = 1000
A = reference.alpha_bar_linear(T)
SCHEDULE = ddim.linear_schedule(T)
EPS = np.finfo(np.float32).eps


def direct_mixture(x, t, means, variance, weights):
    """ε, log q_t and the spread of ε over the components, in plain sums, one image at a time."""
    x, means = np.asarray(x, np.float64), np.asarray(means, np.float64)
    d, eps, log_q = x[0].size, np.empty_like(x), np.empty(len(x))
    spread = np.empty(len(x))
    for i in range(len(x)):
        a = A[t[i]]
        s = a * variance + 1 - a
        r = (x[i][None] - np.sqrt(a) * means).reshape(len(means), -1)
        log_p = np.log(weights) - d / 2 * np.log(2 * np.pi * s) - (r**2).sum(1) / (2 * s)
        log_q[i] = log_p.max() + np.log(np.exp(log_p - log_p.max()).sum())
        p = np.exp(log_p - log_q[i])
        x_0 = means.reshape(len(means), -1) + (np.sqrt(a) * variance / s)[:, None] * r
        mean = (p[:, None] * x_0).sum(0).reshape(x[i].shape)  # E[x_0 | x_t]
        eps[i] = (x[i] - np.sqrt(a) * mean) / np.sqrt(1 - a)
        each = np.sqrt(1 - a) * r / s[:, None] - eps[i].reshape(-1)
        spread[i] = np.sqrt((p * (each**2).sum(1)).sum())
    return eps, log_q, spread


def noisy(rng, data, t):
    """x_t of images drawn from data, in float32."""
    x_0 = data[rng.integers(len(data), size=len(t))].astype(np.float64)
    a = A[t].reshape(-1, *(1,) * (x_0.ndim - 1))
    return (np.sqrt(a) * x_0 + np.sqrt(1 - a) * rng.normal(size=x_0.shape)).astype(np.float32)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full", "singular"])
def test_gaussian_against_matrix_inverse(kind):
    rng = np.random.default_rng(0)
    shape, d = (2, 3, 1), 6
    mean, root = rng.normal(size=shape), rng.normal(size=(d, d))
    cov = {
        "scalar": 0.3,
        "diagonal": rng.uniform(0, 2, d),
        "full": root @ root.T,
        "singular": root[:, :2] @ root[:, :2].T,
    }[kind]
    full = np.diag(np.broadcast_to(cov, d)) if np.ndim(cov) < 2 else cov
    t = np.array([1, 2, 30, 400, 1000])
    x = rng.normal(size=(5, *shape)).astype(np.float32)
    x[:2] = (np.sqrt(A[t[:2]])[:, None, None, None] * mean + 0.01 * x[:2]).astype(np.float32)
    expected = []
    for xi, ti in zip(x, t, strict=True):
        a = A[ti]
        r = (np.float64(xi) - np.sqrt(a) * mean).reshape(-1)
        expected.append(np.sqrt(1 - a) * np.linalg.inv(a * full + (1 - a) * np.eye(d)) @ r)
        m, c = oracle.gaussian_marginal(SCHEDULE, mean, cov, int(ti))
        np.testing.assert_allclose(m, np.sqrt(a) * mean, rtol=1e-9)
        wide = np.diag(np.broadcast_to(c, d)) if np.ndim(c) < 2 else c
        np.testing.assert_allclose(wide, a * full + (1 - a) * np.eye(d), rtol=1e-9, atol=1e-12)
    eps = oracle.gaussian(SCHEDULE, mean, cov)(jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(eps, np.reshape(expected, x.shape), rtol=2e-5, atol=2e-4)


def test_gaussian_marginal_is_that_of_the_forward_process():
    rng = np.random.default_rng(1)
    n, mean, root = 200_000, np.array([1.0, -2.0]), np.array([[1.0, 0.0], [0.7, 0.2]])
    x_0 = mean + rng.normal(size=(n, 2)) @ root.T
    x_t = np.sqrt(A[300]) * x_0 + np.sqrt(1 - A[300]) * rng.normal(size=(n, 2))
    m, c = oracle.gaussian_marginal(SCHEDULE, mean, root @ root.T, 300)
    assert (np.abs(x_t.mean(0) - m) < 4 * np.sqrt(np.diag(c) / n)).all()
    se = np.sqrt((np.outer(np.diag(c), np.diag(c)) + c**2) / n)
    assert (np.abs(np.cov(x_t.T) - c) < 4 * se).all()


@partial(jax.jit, static_argnames="chunk")
def mixture(x, t, means, variance, weights, chunk):
    eps = oracle.mixture(SCHEDULE, means, variance, 3 * weights, chunk=chunk)(x, t)
    return eps, oracle.mixture_log_density(SCHEDULE, x, t, means, variance, weights, chunk=chunk)


@given(
    seed=st.integers(0, 2**32 - 1),
    t=st.lists(st.integers(1, T), min_size=6, max_size=6),
    chunk=st.sampled_from([1, 4, 9]),
    shared=st.booleans(),
)
def test_mixture_against_direct_sums(seed, t, chunk, shared):
    rng, t = np.random.default_rng(seed), np.array(t)
    means = rng.uniform(-1, 1, (9, 2, 3))
    variance = np.full(9, rng.uniform(0, 0.5)) if shared else rng.uniform(0, 0.5, 9)
    weights = rng.dirichlet(np.ones(9))
    x = noisy(rng, means, t)
    numbers = (means, variance[0] if shared else variance, weights)
    got_eps, got_log_q = mixture(x, t, *(np.asarray(v, np.float32) for v in numbers), chunk)
    # x and the means, rounded, are off by EPS: ε by that over √(1 − ᾱ). An exponent, of size 10 and
    # slope up to 10/√(1 − ᾱ) where it counts, moves ε by its error times ε's spread.
    eps, log_q, spread = direct_mixture(x, t, means, variance, weights)
    off, exponent = (EPS * (c + 16 / np.sqrt(1 - A[t])) for c in (0, 100))
    assert (np.abs(got_log_q - log_q) < exponent).all()
    assert (np.abs(got_eps - eps).max((1, 2)) < off + exponent * spread).all()


def test_mixture_is_the_score_of_its_density():
    rng = np.random.default_rng(3)
    means, variance, weights = rng.normal(size=(5, 4)), rng.uniform(0.1, 1, 5), np.arange(5.0)
    t = jnp.array([1, 100, 500, 1000])
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(4, 4)))
        density = lambda x: oracle.mixture_log_density(  # noqa: E731
            SCHEDULE, x, t, means, variance, weights, chunk=2
        ).sum()
        eps = oracle.mixture(SCHEDULE, means, variance, weights, chunk=2)(x, t)
        assert eps.dtype == jnp.float64
        score = np.asarray(jax.grad(density)(x))
    np.testing.assert_allclose(eps, -np.sqrt(1 - A[np.asarray(t)])[:, None] * score, rtol=1e-8)


def test_one_component_is_a_gaussian():
    x, t = jax.random.normal(jax.random.key(0), (3, 4)), jnp.array([1, 200, 1000])
    mean = np.linspace(-1, 1, 4)
    one = oracle.mixture(SCHEDULE, mean[None], 0.2)(x, t)
    np.testing.assert_allclose(one, oracle.gaussian(SCHEDULE, mean, 0.2)(x, t), rtol=1e-5)


def test_float32_near_t_0_in_many_dimensions():
    """Two nearly equal images of 3072 pixels: ‖x‖² − 2 x·m + ‖m‖² would lose the difference."""
    rng = np.random.default_rng(4)
    base = rng.uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    step = rng.normal(size=base.shape)
    near = (base + 0.005 * step / np.sqrt((step**2).sum())).astype(np.float32)
    data = np.stack([base, near, -base])
    t = np.full(8, 1)
    x = noisy(rng, data[:2], t)
    expected, *_ = direct_mixture(x, t, data, np.zeros(3), np.ones(3) / 3)
    eps = oracle.empirical(SCHEDULE, data)(jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(eps, expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64, 299, 300, 4096])
def test_chunks_make_no_difference(chunk):
    rng = np.random.default_rng(5)
    data = rng.uniform(-1, 1, (300, 4, 4, 1)).astype(np.float32)
    t = np.array([1, 50, 300, 600, 1000])
    x = noisy(rng, data, t)
    expected, *_ = direct_mixture(x, t, data, np.zeros(300), np.full(300, 1 / 300))
    eps = oracle.empirical(SCHEDULE, data, chunk=chunk)(jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(eps, expected, rtol=1e-4, atol=1e-4)


def test_fifty_thousand_images_fit():
    """Compiled, not run: beside the data itself, no array of 50,000 × B or B × chunk × 3072."""

    def denoise(data, x, t):
        return oracle.empirical(SCHEDULE, data)(x, t)

    data, x = (jax.ShapeDtypeStruct((n, 32, 32, 3), jnp.float32) for n in (50_000, 64))
    memory = (
        jax.jit(denoise)
        .lower(data, x, jax.ShapeDtypeStruct((64,), jnp.int32))
        .compile()
        .memory_analysis()
    )
    assert memory.temp_size_in_bytes < 40e6  # one chunk of 1024 images is 13 MB


def test_data_may_be_an_argument_of_a_jitted_function():
    def draw(data, x):
        return ddim.sample(oracle.empirical(SCHEDULE, data, 0.01), x, SCHEDULE, [1, 500, 1000])

    x = jax.random.normal(jax.random.key(0), (4, 3))
    data = jax.random.normal(jax.random.key(1), (5, 3))
    np.testing.assert_allclose(jax.jit(draw)(data, x), draw(data, x), rtol=1e-4, atol=1e-4)
    cov = jnp.eye(3) * 0.5
    full = jax.jit(lambda c, x, t: oracle.gaussian(SCHEDULE, 0.0, c)(x, t))(cov, x, jnp.full(4, 9))
    np.testing.assert_allclose(
        full, oracle.gaussian(SCHEDULE, 0.0, 0.5)(x, jnp.full(4, 9)), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_follows_x(dtype):
    x, t = jnp.ones((2, 3), dtype), jnp.array([1, 9])
    means = np.zeros((2, 3))
    for denoise in (oracle.gaussian(SCHEDULE, 0.0, 1.0), oracle.mixture(SCHEDULE, means, 1.0)):
        assert denoise(x, t).dtype == dtype


def test_sampling_with_all_steps_draws_the_data():
    data = jax.random.uniform(jax.random.key(2), (20, 6), minval=-1.0)
    x_T = ddim.initial_noise(jax.random.key(0), 32, (6,))
    x_0 = ddim.sample(oracle.empirical(SCHEDULE, data), x_T, SCHEDULE, np.arange(1, T + 1))
    distance = np.sqrt(((x_0[:, None] - data[None]) ** 2).sum(-1)).min(1)
    assert np.median(distance) < 1e-3


X, STEPS = jnp.ones((2, 3)), jnp.array([1, 2])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: oracle.gaussian(SCHEDULE, 0.0, np.ones((2, 3))), ValueError, "scalar"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0, -1.0), ValueError, "semi-definite"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0, [[1.0, 2], [2, 1]]), ValueError, "semi-definite"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0, [[1.0, 0], [2, 1]]), ValueError, "symmetric"),
        (lambda: oracle.gaussian(SCHEDULE, np.nan, 1.0), ValueError, "finite"),
        (lambda: oracle.gaussian(SCHEDULE, np.zeros(4), np.ones(3)), ValueError, "pixels"),
        (lambda: oracle.gaussian(SCHEDULE, np.zeros(4))(X, STEPS), ValueError, "one image"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0, np.ones(4))(X, STEPS), ValueError, "pixels"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0)(X, jnp.array([0, 1])), ValueError, "1..T"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0)(X, jnp.full(2, 0.5)), ValueError, "1..T"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0)(X, jnp.array([1, 2, 3])), ValueError, "t must be"),
        (lambda: oracle.gaussian(SCHEDULE, 0.0)(X.astype(int), STEPS), TypeError, "floating"),
        (lambda: oracle.gaussian_marginal(SCHEDULE, 0.0, 1.0, 1001), ValueError, "1..T"),
        (lambda: oracle.empirical(SCHEDULE, np.zeros((0, 3))), ValueError, "non-empty"),
        (lambda: oracle.empirical(SCHEDULE, np.zeros((2, 3), np.uint8)), TypeError, "uint8"),
        (lambda: oracle.empirical(SCHEDULE, np.zeros((2, 3)), -0.1), ValueError, "variance"),
        (lambda: oracle.empirical(SCHEDULE, np.zeros((2, 3)), chunk=0), ValueError, "chunk"),
        (lambda: oracle.empirical(SCHEDULE, np.zeros((2, 4)))(X, STEPS), ValueError, "pixels"),
        (lambda: oracle.mixture(SCHEDULE, np.zeros((2, 3)), np.ones(3)), ValueError, "components"),
        (lambda: oracle.mixture(SCHEDULE, X, 1.0, [1.0, -1.0]), ValueError, "weights"),
        (lambda: oracle.mixture(SCHEDULE, X, 1.0, [0.0, 0.0]), ValueError, "weights"),
        (lambda: oracle.mixture(SCHEDULE, X, 1.0, [1.0]), ValueError, "components"),
        (
            lambda: oracle.mixture_log_density(SCHEDULE, X, 0, np.zeros((2, 3))),
            ValueError,
            "1..T",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_slopes_at_the_edges():
    """At t = 1 and T, on a component and where components coincide: those of the density."""
    means = jnp.array([[0.5, 0.0], [0.5, 0.0], [-1.0, 0.3]])
    for t in (1, T):
        x = float(SCHEDULE.alpha_bar[t]) ** 0.5 * means[:1]
        for denoise in (oracle.mixture(SCHEDULE, means, 0.2), oracle.empirical(SCHEDULE, means)):
            f = lambda x, d=denoise, t=t: d(x, jnp.array([t]))  # noqa: E731
            h = 1e-2 * float(1 - SCHEDULE.alpha_bar[t]) ** 0.5
            v = jnp.array([[1.0, -0.5]])
            slope, plain = jax.jvp(f, (x,), (v,))[1], (f(x + h * v) - f(x - h * v)) / (2 * h)
            np.testing.assert_allclose(slope, plain, rtol=2e-2, atol=1e-2)


def test_bfloat16_is_the_float32_result_rounded():
    x = jax.random.normal(jax.random.key(0), (3, 4)).astype(jnp.bfloat16)
    t, means = jnp.array([1, 300, 1000]), jax.random.normal(jax.random.key(1), (5, 4))
    for denoise in (oracle.gaussian(SCHEDULE, 0.5, 0.1), oracle.mixture(SCHEDULE, means, 0.1)):
        wide = denoise(x.astype(jnp.float32), t).astype(jnp.bfloat16)
        np.testing.assert_array_equal(denoise(x, t), wide)
