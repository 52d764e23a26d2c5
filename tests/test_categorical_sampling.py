"""Appendix A: the oracle and the sampler, against enumeration of every state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ddim_jax as ddim
from ddim_jax import categorical
from tests.categorical_reference import noised, states, transition, tv

SCHEDULE = ddim.linear_schedule(12, 0.02, 0.6)
ZERO_SNR = ddim.schedule_from_betas(np.append(np.linspace(0.05, 0.5, 11), 1.0))
ETAS = (0.0, 0.3, 1.0)
X = np.zeros(2, int)


def enumerate_library(schedule, probs, tau, eta=0.0, fraction=None, start=None):
    """The exact distribution of the library's sampler, by products of its own kernels."""
    K, d = probs.shape[0], probs.ndim
    x = states(K, d)
    denoise = categorical.joint_denoiser(schedule, probs)
    out = noised(schedule.alpha_bar, tau[-1], probs)[0] if start is None else start
    for t, s in zip(tau[::-1], [*tau[-2::-1], 0]):
        sigma = None
        if fraction is not None:
            sigma = fraction * categorical.least_stochastic_sigma(schedule, t, s)
        log_p = categorical.posterior(schedule, x, denoise(x, t), t, s, eta, sigma=sigma)
        p = np.exp(np.asarray(log_p, np.float64))  # [x_t, i, k]
        out = out @ np.prod(p[:, np.arange(d), x], axis=-1)
    return out


def chi_square_excess(counts, p):
    """Pearson's χ² in standard errors above its mean, over the cells that can occur."""
    n, cells = counts.sum(), p > 1e-9
    assert counts[~cells].sum() == 0
    chi2 = ((counts - n * p)[cells] ** 2 / (n * p[cells])).sum()
    dof = cells.sum() - 1
    return (chi2 - dof) / np.sqrt(2 * dof)


# --- the oracle and the sampler, by enumeration -------------------------------------------------


def test_joint_denoiser_is_bayes_rule():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(27)).reshape(3, 3, 3)
    probs[0, 1] = 0
    probs /= probs.sum()
    denoise = categorical.joint_denoiser(SCHEDULE, probs)
    x = states(3, 3)
    for t in (1, 5, 12):
        want = noised(SCHEDULE.alpha_bar, t, probs)[1]
        np.testing.assert_allclose(np.exp(denoise(x, t)), want, atol=1e-6)
        every = jax.jit(denoise)(jnp.asarray(x), jnp.full(27, t))
        np.testing.assert_allclose(np.exp(every), want, atol=1e-6)


ONE = np.array([0.55, 0.25, 0.2, 0.0])
INDEPENDENT = np.outer([0.6, 0.3, 0.1], [0.2, 0.1, 0.7])
DEPENDENT = np.array([[0.4, 0.05, 0.0], [0.05, 0.2, 0.05], [0.0, 0.05, 0.2]])


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("fraction", [None, 0.0, 0.5], ids=["sigma_max", "sigma_0", "half"])
@pytest.mark.parametrize("probs", [ONE, INDEPENDENT], ids=["one", "independent"])
def test_the_sampler_is_exact_where_it_should_be(probs, fraction, eta):
    """One variable, or independent ones: the data distribution for every length of τ."""
    for size in (1, 2, 5, 12):
        tau = ddim.timesteps(12, size).tolist()
        out = enumerate_library(SCHEDULE, probs, tau, eta, fraction)
        assert tv(out, probs) < 1e-6


def test_uniform_x_T_costs_at_most_the_signal_left_at_T():
    K, d = 3, 2
    for schedule in (SCHEDULE, ZERO_SNR):
        left = schedule.alpha_bar[-1]
        start = np.full(K**d, K**-d)
        error = tv(enumerate_library(schedule, INDEPENDENT, [3, 12], 0.3, start=start), INDEPENDENT)
        assert error < d * left * (1 - 1 / K) + 1e-6


@pytest.mark.slow
def test_dependent_variables_are_approximated_better_by_more_steps():
    """Error O(step size) for σ_max at every η; σ = 0 redraws all at once and keeps its error."""
    schedule = ddim.schedule_from_alpha_bar(np.linspace(1, 0, 257))

    def error(size, eta=0.0, fraction=None):
        tau = ddim.timesteps(256, size).tolist()
        return tv(enumerate_library(schedule, DEPENDENT, tau, eta, fraction), DEPENDENT)

    for eta in (0.0, 1.0):
        errors = [error(size, eta) for size in (16, 32, 64)]
        rates = np.log2(np.divide(errors[:-1], errors[1:]))
        assert errors[0] > 1e-3
        assert ((rates > 0.8) & (rates < 1.3)).all(), (errors, rates)
    redrawn = [error(size, fraction=0.0) for size in (64, 128)]
    assert redrawn[1] > 0.8 * redrawn[0] > 4 * errors[-1]


def test_normalising_after_plugging_in_the_network_is_another_kernel():
    """Bayes' formula with f_θ for x_0 (not the sum over x_0) misses the data even for exact f."""
    a, K, t, s = SCHEDULE.alpha_bar, 4, 6, 2
    q_t, f = noised(a, t, ONE)
    f = f[:, 0]
    plugged = transition(a, t, s, K).T * (f @ transition(a, s, 0, K))
    plugged /= plugged.sum(-1, keepdims=True)
    q_s = noised(a, s, ONE)[0]
    assert tv(q_t @ plugged, q_s) > 0.03
    ours = np.exp(
        categorical.ancestral_posterior(SCHEDULE, np.arange(K), np.log(np.maximum(f, 1e-30)), t, s)
    )
    assert tv(q_t @ ours, q_s) < 1e-6


# --- the sampler, drawn -------------------------------------------------------------------------

DRAWS = 20_000


@functools.cache
def compiled(dependent):
    denoise = categorical.joint_denoiser(ZERO_SNR, DEPENDENT if dependent else INDEPENDENT)

    @jax.jit
    def draw(key, tau, eta):
        x_T = categorical.initial(key, DRAWS, (2,), 3)
        x_0 = categorical.sample(denoise, x_T, ZERO_SNR, tau, eta, key)
        return jnp.bincount(x_0 @ jnp.array([3, 1], jnp.int32), length=9)

    return lambda key, tau, eta: np.asarray(draw(key, jnp.asarray(tau), jnp.float32(eta)))


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("size", [4, *(pytest.param(S, marks=pytest.mark.slow) for S in (1, 12))])
def test_draws_have_the_data_distribution_within_sampling_error(size, eta, key):
    counts = compiled(False)(key, ddim.timesteps(12, size), eta)
    assert abs(chi_square_excess(counts, INDEPENDENT.ravel())) < 5


@pytest.mark.parametrize("eta", ETAS)
def test_draws_have_the_enumerated_distribution_where_it_is_not_the_data(eta, key):
    tau = ddim.timesteps(12, 4)
    counts = compiled(True)(key, tau, eta)
    out = enumerate_library(ZERO_SNR, DEPENDENT, tau.tolist(), eta)
    assert abs(chi_square_excess(counts, out)) < 5
    wrong = (counts - DRAWS * DEPENDENT.ravel())[DEPENDENT.ravel() > 0]
    assert (wrong**2 / (DRAWS * DEPENDENT[DEPENDENT > 0])).sum() > 100  # the test has power


def test_an_example_depends_on_its_key_and_number_alone(key):
    denoise = categorical.joint_denoiser(SCHEDULE, DEPENDENT)
    tau = ddim.timesteps(12, 3)

    @jax.jit
    def draw(indices):
        x_T = categorical.initial(key, indices, (2,), 3)
        return x_T, categorical.sample(denoise, x_T, SCHEDULE, tau, 0.5, key, indices=indices)

    whole = draw(jnp.arange(16))
    parts = [draw(jnp.arange(16)[i : i + 4]) for i in range(0, 16, 4)]
    for a, b in zip(whole, map(jnp.concatenate, zip(*parts))):
        np.testing.assert_array_equal(a, b)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    spread = jax.device_put(jnp.arange(16), NamedSharding(mesh, PartitionSpec("batch")))
    for a, b in zip(whole, draw(spread)):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(whole[0], whole[1])


def test_one_compilation_for_every_eta_sigma_tau_key_and_weight(key):
    traces = 0

    @jax.jit
    def draw(weights, x_T, schedule, tau, eta, sigma, key):
        nonlocal traces
        traces += 1

        def denoise(x, t):
            return weights[x] + jnp.zeros((2, 1)).at[:, 0].set(t.astype(jnp.float32))[..., None]

        return categorical.sample(denoise, x_T, schedule, tau, eta, key, sigma=sigma)

    x_T = categorical.initial(key, 2, (1,), 3)
    for i in range(10):
        tau = jnp.array([1 + i // 5, 3 + i // 3, 12])
        weights = jnp.full((3, 3), float(i))
        x_0 = draw(weights, x_T, SCHEDULE, tau, i / 10, jnp.full(3, i / 1e3), jax.random.key(i))
        assert x_0.dtype == jnp.int32
    assert traces == 1
    assert (x_0 == -1).all()  # σ > 0 in the step to s = 0 is no mixture: under a trace it is NaN


def test_the_host_and_the_traced_path_draw_the_same(key):
    denoise = categorical.joint_denoiser(SCHEDULE, DEPENDENT)
    x_T = categorical.initial(key, 64, (2,), 3)
    tau = ddim.timesteps(12, 4)

    def draw(schedule, tau, eta):
        return categorical.sample(denoise, x_T, schedule, tau, eta, key)

    host = draw(SCHEDULE, tau, 0.5)
    np.testing.assert_array_equal(host, jax.jit(draw)(SCHEDULE, jnp.asarray(tau), 0.5))


def test_any_shape_of_state_and_per_step_eta_and_sigma(key):
    def denoise(x, t):
        assert x.shape == (4, 2, 3)
        assert t.shape == (4,)
        return jnp.zeros((4, 2, 3, 5), jnp.bfloat16)

    x_T = categorical.initial(key, 4, (2, 3), 5)
    tau = [2, 7, 12]
    sigma = 0.5 * categorical.least_stochastic_sigma(SCHEDULE, tau, [0, 2, 7])
    x_0 = categorical.sample(denoise, x_T, SCHEDULE, tau, np.array([0, 0.5, 1]), key, sigma=sigma)
    assert x_0.shape == (4, 2, 3)
    assert ((x_0 >= 0) & (x_0 < 5)).all()


def test_nan_logits_are_marked_not_drawn(key):
    def denoise(x, t):
        bad = (jnp.arange(2) == 1) & (t == 5)
        return jnp.where(bad, jnp.nan, 0.0)[:, None] + jnp.zeros((2, 3))

    x_0 = categorical.sample(denoise, jnp.zeros(2, int), SCHEDULE, [2, 5, 12], key=key)
    assert x_0[0] >= 0
    assert x_0[1] == -1


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"key": None}, ValueError, "pass key"),
        ({"tau": [3, 1]}, ValueError, "increase strictly"),
        ({"tau": [0, 1]}, ValueError, "1..T"),
        ({"tau": [1, 13]}, ValueError, "1..T"),
        ({"eta": 1.5}, ValueError, "eta must lie"),
        ({"eta": np.zeros(3)}, ValueError, "element of tau"),
        ({"sigma": 0.5}, ValueError, "negative weight"),
        ({"x_T": X + 3}, ValueError, "x_T must lie"),
        ({"x_T": X - 1}, ValueError, "x_T must lie"),
        ({"x_T": X.astype(np.float32)}, TypeError, "integers"),
        ({"x_T": 0}, ValueError, "batch axis"),
        ({"indices": 3}, ValueError, "number the 2 examples"),
        ({"denoise": lambda x, t: jnp.zeros((2, 4, 3))}, ValueError, "last axis"),
        ({"denoise": lambda x, t: x[:, None]}, TypeError, "floating"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_sampler_input_raises_before_running(changes, error, match, key):
    arguments = {
        "denoise": lambda x, t: jnp.zeros((*x.shape, 3)),
        "x_T": X,
        "schedule": SCHEDULE,
        "tau": [2, 12],
        "key": key,
    }
    with pytest.raises(error, match=match):
        categorical.sample(**(arguments | changes))


def test_wide_numbers_draw_the_same_examples(key):
    """JAX's default width changes no draw of a network that answers in float32."""

    def draw():
        x_T = categorical.initial(key, 5, (4,), 3)
        network = lambda x, t: jnp.zeros((*x.shape, 3), jnp.float32)  # noqa: E731
        return np.stack([x_T, categorical.sample(network, x_T, SCHEDULE, [3, 12], key=key)])

    narrow = draw()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(), narrow)
