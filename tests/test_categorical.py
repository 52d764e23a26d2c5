"""Appendix A: posteriors and the objective, against Bayes' rule and matrix products by hand."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import ddim_jax as ddim
from ddim_jax import categorical
from tests.categorical_reference import (
    bayes_posterior,
    family,
    noised,
    reference_posterior,
    sigma_max,
    transition,
)

SCHEDULE = ddim.linear_schedule(12, 0.02, 0.6)
ZERO_SNR = ddim.schedule_from_betas(np.append(np.linspace(0.05, 0.5, 11), 1.0))
ETAS = (0.0, 0.3, 1.0)


@st.composite
def cases(draw):
    betas = draw(st.lists(st.floats(1e-4, 0.95), min_size=1, max_size=10))
    if draw(st.booleans()):
        betas[-1] = 1.0
    t = draw(st.integers(1, len(betas)))
    fraction = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
    return betas, t, draw(st.integers(0, t - 1)), draw(st.sampled_from([2, 3, 5])), fraction


# --- marginals and posteriors -------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["linear", "zero_snr"])
@pytest.mark.parametrize("K", [2, 5])
def test_forward_marginal_is_the_product_of_the_one_step_matrices(schedule, K):
    t = np.arange(13)
    x_0 = jnp.broadcast_to(categorical.log_one_hot(np.arange(K), K), (13, K, K))
    got = np.exp(categorical.forward_marginal(schedule, x_0, t))
    want = [transition(schedule.alpha_bar, i, 0, K) for i in t]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["linear", "zero_snr"])
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("K", [2, 3, 5])
def test_posterior_of_every_pair_is_eq_19_and_bayes(schedule, eta, K):
    """All s < t at once, t and s as arrays; η = 1 is Bayes' rule on the Markov chain."""
    pairs = np.array([(t, s) for t in range(1, 13) for s in range(t)])
    x_t, x_0 = (np.tile(g, (len(pairs), 1, 1)) for g in np.indices((K, K)))
    t, s = pairs.T
    for fraction in (None, 0.0, 0.4):
        sigma = None
        if fraction is not None:
            sigma = fraction * categorical.least_stochastic_sigma(schedule, t, s)
        log_q = categorical.posterior(
            schedule, x_t, categorical.log_one_hot(x_0, K), t, s, eta, sigma=sigma
        )
        want = np.array([
            reference_posterior(
                schedule.alpha_bar, t, s, K, eta,
                None if fraction is None else fraction * sigma_max(schedule.alpha_bar, t, s),
            )
            for t, s in pairs
        ])  # fmt: skip
        np.testing.assert_allclose(np.exp(log_q), want, atol=1e-6)
    if eta == 1:
        log_q = categorical.ancestral_posterior(
            schedule, x_t, categorical.log_one_hot(x_0, K), t, s
        )
        np.testing.assert_allclose(np.exp(log_q), want, atol=1e-6)


@given(cases(), st.sampled_from(ETAS))
def test_every_sigma_and_eta_keeps_the_marginals(case, eta):
    """Σ_{x_t} q(x_s|x_t,x_0) q(x_t|x_0) = q(x_s|x_0); rows are distributions."""
    betas, t, s, K, fraction = case
    schedule = ddim.schedule_from_betas(betas)
    sigma = fraction * categorical.least_stochastic_sigma(schedule, t, s)
    x_t, x_0 = np.indices((K, K))
    x_0 = categorical.log_one_hot(x_0, K)
    q = np.exp(categorical.posterior(schedule, x_t, x_0, t, s, eta, sigma=sigma), dtype=np.float64)
    assert (q >= 0).all()
    atol = 8 * K * np.finfo(np.float32).eps  # K probabilities of a few roundings in float32
    np.testing.assert_allclose(q.sum(-1), 1, atol=atol)
    got = np.einsum("tok,ot->ok", q, transition(schedule.alpha_bar, t, 0, K))
    np.testing.assert_allclose(got, transition(schedule.alpha_bar, s, 0, K), atol=atol)


@given(cases())
def test_the_weights_of_eq_19_in_float64(case):
    """The host coefficients: the paper's, to float64, a mixture exactly on 0 ≤ σ ≤ σ_max."""
    betas, t, s, _, fraction = case
    schedule = ddim.schedule_from_betas(betas)
    a = schedule.alpha_bar
    limit = categorical.least_stochastic_sigma(schedule, t, s)
    assert limit.dtype == np.float64
    np.testing.assert_allclose(limit, sigma_max(a, t, s), rtol=1e-9, atol=1e-15)
    sigma = fraction * limit
    c = categorical.mixing.coefficients(schedule, t, s, sigma=sigma)
    want = (sigma, a[s] - sigma * a[t], (1 - a[s]) - (1 - a[t]) * sigma)
    np.testing.assert_allclose((c.x_t, c.x_0, c.uniform), want, atol=1e-12)
    assert min(c.x_t, c.x_0, c.uniform) >= 0
    assert abs(c.x_t + c.x_0 + c.uniform - 1) < 1e-12


@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_ancestral_kernel_is_in_the_family_for_two_categories_only(K):
    """K = 2: σ = a(1−ᾱ_s²)/(1−ᾱ_t²). K ≥ 3: no σ of the family fits Bayes' rule."""
    a, t, s = SCHEDULE.alpha_bar, 7, 3
    bayes = bayes_posterior(a, t, s, K)
    grid = np.linspace(0, sigma_max(a, t, s), 2001)
    gap = min(np.abs(family(a, t, s, K, sigma) - bayes).max() for sigma in grid)
    if K > 2:
        assert gap > 0.01
        return
    sigma = a[t] / a[s] * (1 - a[s] ** 2) / (1 - a[t] ** 2)
    np.testing.assert_allclose(family(a, t, s, K, sigma), bayes, atol=1e-12)
    x_t, x_0 = np.indices((2, 2))
    x_0 = categorical.log_one_hot(x_0, 2)
    np.testing.assert_allclose(
        np.exp(categorical.posterior(SCHEDULE, x_t, x_0, t, s, sigma=sigma)),
        np.exp(categorical.ancestral_posterior(SCHEDULE, x_t, x_0, t, s)),
        atol=1e-6,
    )


@pytest.mark.parametrize("eta", ETAS)
def test_a_distribution_over_x_0_is_summed_exactly(eta, key):
    K, t, s = 4, 9, 5
    logits = 3 * jax.random.normal(key, (K, K))
    f = np.exp(logits, dtype=np.float64)
    f /= f.sum(-1, keepdims=True)
    got = np.exp(categorical.posterior(SCHEDULE, np.arange(K), logits, t, s, eta))
    q = reference_posterior(SCHEDULE.alpha_bar, t, s, K, eta)
    np.testing.assert_allclose(got, np.einsum("tok,to->tk", q, f), atol=1e-6)


def test_sigma_zero_forgets_x_t_and_s_zero_returns_the_network():
    logits = jnp.tile(jnp.array([[0.3, -1.0, 2.0]]), (3, 1))
    x_t = np.arange(3)
    redraw = categorical.posterior(SCHEDULE, x_t, logits, 9, 4, sigma=0.0)
    marginal = categorical.forward_marginal(SCHEDULE, logits, 4)
    np.testing.assert_allclose(redraw, marginal, atol=1e-6)
    for eta in (0.0, 0.5):
        last = categorical.posterior(SCHEDULE, x_t, logits, 6, 0, eta, sigma=0.0)
        if eta == 0:
            np.testing.assert_allclose(last, jax.nn.log_softmax(logits), atol=1e-6)
        assert np.isfinite(last).all()


@pytest.mark.parametrize("eta", ETAS)
def test_traced_schedule_and_times_agree_with_the_host(eta):
    schedule = ddim.linear_schedule(1000)
    x_t = jnp.array([0, 1, 2, 0])
    logits = jnp.array([[0.0, 1, 2], [3, 1, 0], [0, 0, 0], [0, 0, -40]])
    t, s = jnp.array([1, 2, 500, 1000]), jnp.array([0, 1, 499, 20])
    host = categorical.posterior(schedule, x_t, logits, t, s, eta)
    traced = jax.jit(categorical.posterior)(schedule, x_t, logits, t, s, jnp.float32(eta))
    np.testing.assert_allclose(np.exp(traced), np.exp(host), atol=1e-6)


def test_what_cannot_be_checked_under_a_trace_is_nan_not_another_entry():
    logits, x_t = jnp.zeros((1, 3)), jnp.array([0])

    @jax.jit
    def q(t, s, eta, sigma):
        return categorical.posterior(SCHEDULE, x_t, logits, t, s, eta, sigma=sigma)

    assert np.isfinite(q(5, 3, 0.5, 0.1)).all()
    for bad in [(13, 3, 0.5, 0.1), (5, -1, 0.5, 0.1), (3, 5, 0.5, 0.1), (5, 3, 1.5, 0.1),
                (5, 3, 0.5, 0.999), (5, 3, 0.5, -0.1)]:  # fmt: skip
        assert np.isnan(q(*bad)).all(), bad


# --- the objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", ETAS)
def test_variational_loss_is_the_kl_and_the_cross_entropy_bounds_it(eta, key):
    K = 4
    logits = 2 * jax.random.normal(key, (K, K, K))
    x_t, x_0 = np.indices((K, K))
    f = np.exp(np.asarray(logits, np.float64))
    f /= f.sum(-1, keepdims=True)
    for t, s in [(1, 0), (6, 0), (6, 5), (12, 3)]:
        q = reference_posterior(SCHEDULE.alpha_bar, t, s, K, eta)
        p = np.einsum("tok,tnk->tnok", q, np.ones((K, K, K)))  # [x_t, n, x_0, x_s]
        p = np.einsum("tnok,tno->tnk", p, f)
        with np.errstate(divide="ignore", invalid="ignore"):
            want = np.where(q > 0, q * (np.log(q) - np.log(p)), 0).sum(-1)
        got = categorical.variational_loss(SCHEDULE, logits, x_0, x_t, t, s, eta)
        np.testing.assert_allclose(got, want, atol=3e-6)
        bound = categorical.cross_entropy_bound(SCHEDULE, logits, x_0, t, s)
        weight = SCHEDULE.alpha_bar[s] - sigma_max(SCHEDULE.alpha_bar, t, s) * SCHEDULE.alpha_bar[t]
        cross_entropy = -np.log(np.take_along_axis(f, x_0[..., None], -1)[..., 0])
        np.testing.assert_allclose(bound, weight * cross_entropy, rtol=1e-5)
        if eta == 0:
            assert (got <= bound + 1e-6).all()
        if s == 0:
            np.testing.assert_allclose(got, cross_entropy, rtol=1e-5)


def test_the_ancestral_bound_of_an_exact_model_is_the_entropy_of_the_data():
    """q and p_θ are then one Markov chain: E[NELBO] = H(x_0) + KL(q(x_T) ‖ uniform)."""
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    K, x = 4, np.arange(4)
    denoise = categorical.joint_denoiser(SCHEDULE, probs)
    x_t, x_0 = np.indices((K, K))

    def nelbo(tau, eta):
        prior = transition(SCHEDULE.alpha_bar, tau[-1], 0, K)
        total = probs @ (prior * np.log(prior * K)).sum(-1)
        for t, s in zip(tau, [0, *tau[:-1]]):
            logits = jnp.broadcast_to(denoise(x[:, None], t), (K, K, K))
            loss = categorical.variational_loss(SCHEDULE, logits, x_0, x_t, t, s, eta)
            weight = transition(SCHEDULE.alpha_bar, t, 0, K).T * probs  # [x_t, x_0]
            total += (weight * np.asarray(loss, np.float64)).sum()
        return total

    entropy = -(probs * np.log(probs)).sum()
    for tau in ([12], [4, 12], list(range(1, 13))):
        final = noised(SCHEDULE.alpha_bar, tau[-1], probs)[0]
        exact = entropy + (final * np.log(final * K)).sum()
        assert abs(nelbo(tau, 1.0) - exact) < 1e-5
        assert nelbo(tau, 0.0) > exact - 1e-5  # not Markov given x_t alone: only a bound
    assert nelbo(list(range(1, 13)), 0.0) > exact + 0.1


@pytest.mark.parametrize("eta", ETAS)
def test_the_exact_posterior_minimises_the_loss(eta):
    probs, t, s = np.array([0.6, 0.3, 0.1]), 6, 2
    x_t, x_0 = np.indices((3, 3))
    weight = jnp.asarray(transition(SCHEDULE.alpha_bar, t, 0, 3).T * probs, jnp.float32)
    exact = categorical.joint_denoiser(SCHEDULE, probs)(np.arange(3)[:, None], t)

    def expected(logits):
        logits = jnp.broadcast_to(logits, (3, 3, 3))
        loss = categorical.variational_loss(SCHEDULE, logits, x_0, x_t, t, s, eta)
        return (weight * loss).sum()

    gradient = jax.grad(expected)
    np.testing.assert_allclose(gradient(exact), 0, atol=1e-6)
    assert np.abs(gradient(exact + jnp.array([[[0.5, 0, 0]]]))).max() > 1e-4


@pytest.mark.parametrize("eta", ETAS)
def test_gradients_stay_finite_with_masked_and_extreme_logits(eta):
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -200.0]])

    def loss(logits):
        return categorical.variational_loss(SCHEDULE, logits, [0], [2], 5, 4, eta).sum()

    assert np.isfinite(loss(logits))
    assert np.isfinite(jax.grad(loss)(logits)).all()
    reconstruction = categorical.variational_loss(SCHEDULE, logits, [3], [2], 1, 0, eta)
    np.testing.assert_allclose(reconstruction, 200 + np.log(1 + np.e), rtol=1e-6)


# --- bad input ----------------------------------------------------------------------------------

LOGITS = np.zeros((2, 3), np.float32)
X = np.zeros(2, int)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: categorical.log_one_hot([0, 3], 3), ValueError, r"0\.\.2, got 0\.\.3"),
        (lambda: categorical.log_one_hot([0.5], 3), TypeError, "integers"),
        (lambda: categorical.log_one_hot([0], 1), ValueError, "at least 2"),
        (lambda: categorical.forward_marginal(SCHEDULE, LOGITS, 13), ValueError, r"0\.\.12"),
        (lambda: categorical.forward_marginal(SCHEDULE, LOGITS, [1, 2, 3]), ValueError, "per exa"),
        (lambda: categorical.forward_marginal(SCHEDULE, X, 1), TypeError, "log_one_hot"),
        (lambda: categorical.forward_marginal(SCHEDULE, LOGITS, 1.0), TypeError, "integers"),
        (lambda: categorical.forward_marginal(SCHEDULE, np.float32(0), 1), ValueError, "scalar"),
        (lambda: categorical.least_stochastic_sigma(SCHEDULE, 0, 0), ValueError, r"t must lie"),
        (lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 3), ValueError, "need s < t"),
        (lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, -1), ValueError, "s must lie"),
        (lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 1, 1.1), ValueError, "eta must"),
        (lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 1, -0.1), ValueError, "eta must"),
        (lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 1, np.nan), ValueError, "eta must"),
        (
            lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 1, sigma=0.9),
            ValueError,
            "negative weight",
        ),
        (
            lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 1, sigma=-0.1),
            ValueError,
            "negative weight",
        ),
        (
            lambda: categorical.posterior(SCHEDULE, X, LOGITS, 3, 1, sigma=np.zeros(3)),
            ValueError,
            "sigma must be a scalar",
        ),
        (lambda: categorical.posterior(SCHEDULE, X[:1], LOGITS, 3, 1), ValueError, "last axis"),
        (lambda: categorical.posterior(SCHEDULE, X + 3, LOGITS, 3, 1), ValueError, "x_t must lie"),
        (
            lambda: categorical.variational_loss(SCHEDULE, LOGITS, 0, X, 3, 1),
            ValueError,
            "one shape",
        ),
        (
            lambda: categorical.cross_entropy_bound(SCHEDULE, LOGITS, X - 1, 3, 1),
            ValueError,
            "x_0 must lie",
        ),
        (lambda: categorical.joint_denoiser(SCHEDULE, np.ones((2, 3)) / 6), ValueError, "shape"),
        (lambda: categorical.joint_denoiser(SCHEDULE, np.ones(3)), ValueError, "add to 1"),
        (
            lambda: categorical.joint_denoiser(SCHEDULE, np.ones(3) / 3)(X, 1),
            ValueError,
            "column per variable",
        ),
        (
            lambda: categorical.initial(jax.random.key(0), [-1], (), 3),
            ValueError,
            r"0\.\.2\*\*32 - 1, got -1",
        ),
        (
            lambda: categorical.initial(jax.random.key(0), [[1]], (), 3),
            ValueError,
            "vector",
        ),
        (lambda: categorical.initial(jax.random.key(0), 2, (), 1), ValueError, "at least 2"),
        (
            lambda: categorical.initial(jax.random.key(0), np.array([2**32 + 5]), (), 3),
            ValueError,
            "take another key",
        ),
        (lambda: categorical.initial(None, 2, (), 3), TypeError, "must be one JAX key"),
    ],
)
def test_bad_input_raises(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_the_derivative_by_eta_at_its_edges(edge):
    """p is linear in η, so d log p/dη = (p₁ − p₀)/p wherever p > 0."""
    known = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))

    def log_p(eta):
        return categorical.posterior(SCHEDULE, jnp.array([2]), known, 8, 5, eta)

    p_0, p_1 = jnp.exp(log_p(0.0)), jnp.exp(log_p(1.0))
    _, slope = jax.jvp(log_p, (edge,), (1.0,))
    np.testing.assert_allclose(slope, (p_1 - p_0) / (p_0, p_1)[int(edge)], rtol=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("eta", "f"), [(0.0, [0.7, 0.2, 0.1]), (0.5, [0.7, 0.3, 0.0])])
def test_the_derivative_by_sigma_at_its_edges(eta, f, fraction):
    """p is linear in σ: one slope from 0 to σ_max, also of a category that Eq. 19 leaves out."""
    x_t, logits = jnp.array([0]), jnp.log(jnp.array([f]))
    limit = float(categorical.least_stochastic_sigma(SCHEDULE, 8, 5))

    def p(sigma):
        return jnp.exp(categorical.posterior(SCHEDULE, x_t, logits, 8, 5, eta, sigma=sigma))

    _, slope = jax.jvp(p, (fraction * limit,), (1.0,))
    np.testing.assert_allclose(slope, (p(limit) - p(0.0)) / limit, rtol=1e-5, atol=1e-6)
