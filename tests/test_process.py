import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import ddim_jax as ddim
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["linear", "scaled", "cosine", "betas"]))
    num_steps = draw(st.integers(2, 300))
    if kind == "linear":
        end = draw(st.floats(2e-4, 0.3))
        return ddim.schedule_from_betas(np.linspace(1e-4, end, num_steps))
    if kind == "scaled":
        return ddim.schedule_from_betas(np.linspace(0.00085**0.5, 0.012**0.5, num_steps) ** 2)
    if kind == "cosine":
        return ddim.cosine_schedule(num_steps)
    betas = draw(st.lists(st.floats(1e-5, 0.9), min_size=2, max_size=30))
    return ddim.schedule_from_betas(betas)


@st.composite
def steps(draw):
    schedule = draw(schedules())
    t = draw(st.integers(1, schedule.num_steps))
    return schedule, t, draw(st.integers(0, t - 1))


# In float64: κ, λ, σ and all their products lie in [0, 1] and are off by some 1e-15; only a κ or σ
# near 0, the root of a difference that vanishes, is off by up to √1e-15 = 3e-8.
@given(steps(), st.floats(0, 1))
def test_every_sigma_keeps_the_marginals(case, fraction):
    """Lemma 1: pushing q(x_t|x_0) through q_σ(x_s|x_t,x_0) gives q(x_s|x_0), for any σ."""
    schedule, t, s = case
    a = schedule.alpha_bar
    sigma = fraction * np.sqrt(1 - a[s])
    kappa, lam, out = ddim.posterior(schedule, t, s, sigma=sigma)
    assert out == sigma
    np.testing.assert_allclose(kappa * np.sqrt(a[t]) + lam, np.sqrt(a[s]), atol=1e-12)
    np.testing.assert_allclose(kappa**2 * (1 - a[t]) + sigma**2, 1 - a[s], atol=1e-12)


@given(steps(), st.floats(0, 1))
def test_every_eta_keeps_the_marginals(case, eta):
    schedule, t, s = case
    a = schedule.alpha_bar
    kappa, lam, sigma = ddim.posterior(schedule, t, s, eta)
    np.testing.assert_allclose(sigma, reference.eta_sigma(a, t, s, eta), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(kappa * np.sqrt(a[t]) + lam, np.sqrt(a[s]), atol=1e-12)
    np.testing.assert_allclose(kappa**2 * (1 - a[t]) + sigma**2, 1 - a[s], atol=1e-12)


@given(schedules(), st.data(), st.floats(0, 1), st.floats(0, 1))
def test_two_steps_compose(schedule, data, eta_1, eta_2):
    """t → s → r keeps the marginal at r, mean and variance, whatever the two η."""
    assume(schedule.num_steps >= 3)
    r, s, t = sorted(data.draw(st.sets(st.integers(0, schedule.num_steps), min_size=3, max_size=3)))
    a = schedule.alpha_bar
    k1, l1, s1 = ddim.posterior(schedule, t, s, eta_1)
    k2, l2, s2 = ddim.posterior(schedule, s, r, eta_2)
    mean = k2 * (k1 * np.sqrt(a[t]) + l1) + l2
    variance = k2**2 * (k1**2 * (1 - a[t]) + s1**2) + s2**2
    np.testing.assert_allclose(mean, np.sqrt(a[r]), atol=1e-10)
    np.testing.assert_allclose(variance, 1 - a[r], atol=1e-10)


@given(steps())
def test_eta_one_is_the_markov_posterior(case):
    """At η = 1 q_σ is Bayes' rule for the Markov chain x_0 → x_s → x_t (Ho et al. Eq. 6–7)."""
    schedule, t, s = case
    a = schedule.alpha_bar
    assume(s >= 1)
    ratio = a[t] / a[s]  # x_t = √ratio x_s + √(1 − ratio) z
    variance = 1 / (ratio / (1 - ratio) + 1 / (1 - a[s]))
    kappa, lam, sigma = ddim.posterior(schedule, t, s, eta=1.0)
    np.testing.assert_allclose(sigma**2, variance, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(kappa, variance * np.sqrt(ratio) / (1 - ratio), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(lam, variance * np.sqrt(a[s]) / (1 - a[s]), rtol=1e-6, atol=1e-7)


def test_eta_zero_is_deterministic_and_last_step_returns_x0():
    assert ddim.posterior(SCHEDULE, 500, 300)[2] == 0
    assert ddim.posterior(SCHEDULE, 1, 0, eta=1.0) == (0, 1, 0)


@pytest.mark.parametrize(
    ("t", "s", "variance"),
    [(421, 401, 0.14771), (981, 961, 0.32460), (488, 487, 0.00979), (1000, 999, 0.02)],
)
def test_golden_variances(t, s, variance):
    assert abs(float(ddim.ddim_sigma(SCHEDULE, t, s)) ** 2 - variance) < 1e-5


def test_sigma_hat():
    np.testing.assert_allclose(ddim.sigma_hat(SCHEDULE, 500, 499) ** 2, 1 - A[500] / A[499])
    c = ddim.coefficients(SCHEDULE, 500, 400, eta=1.0, use_sigma_hat=True)
    np.testing.assert_allclose(c.sigma, np.sqrt(1 - A[500] / A[400]))
    np.testing.assert_allclose(
        c.direction**2, 1 - A[400] - reference.eta_sigma(A, 500, 400, 1.0) ** 2
    )


def test_coefficients_are_float64_and_broadcast():
    c = ddim.coefficients(SCHEDULE, np.array([10, 20]), 5, eta=0.5)
    assert all(v.shape == (2,) and v.dtype == np.float64 for v in c)


def test_traced_coefficients_agree_with_the_host():
    """τ and η may be traced; float32 then costs at most 1e-4 of σ, 1e-6 of the rest."""
    t = np.arange(1, 1001)
    s = t - 1
    host = ddim.coefficients(SCHEDULE, t, s, eta=0.7)
    traced = jax.jit(lambda t, s, eta: ddim.coefficients(SCHEDULE, t, s, eta))(t, s, 0.7)
    for name in ("sqrt_alpha_bar_t", "sqrt_one_minus_alpha_bar_t", "sqrt_alpha_bar_s"):
        np.testing.assert_allclose(getattr(traced, name), getattr(host, name), rtol=1e-6)
    np.testing.assert_allclose(traced.sigma, host.sigma, rtol=1e-4)
    np.testing.assert_allclose(traced.direction, host.direction, rtol=1e-4, atol=1e-7)


def test_traced_eta_too_large_is_nan_not_a_number_that_looks_right():
    bad = jax.jit(lambda eta: ddim.coefficients(SCHEDULE, 500, 499, eta).direction)
    assert np.isfinite(bad(1.0))
    assert np.isnan(bad(1e3))


@pytest.mark.parametrize("t", [-1, 1001])
def test_traced_time_out_of_range_is_nan_not_a_neighbour(t):
    """Trap 3: JAX would wrap −1 around and clamp T + 1."""
    x = jnp.ones((2, 3))
    run = jax.jit(lambda t: ddim.forward_marginal(SCHEDULE, x, t, x))
    assert np.isfinite(run(1000)).all()
    assert np.isnan(run(t)).all()


def test_zero_terminal_snr_and_eta_one_has_no_nan():
    """Trap 5: the radicand rounds to −6e-8 there."""
    schedule = ddim.rescale_zero_terminal_snr(SCHEDULE)
    t = np.arange(1, 1001)
    for c in (
        ddim.coefficients(schedule, t, t - 1, eta=1.0),
        jax.jit(lambda t, e: ddim.coefficients(schedule, t, t - 1, e))(t, 1.0),
    ):
        assert all(np.isfinite(v).all() for v in c)


@given(steps(), st.integers(0, 2**31 - 1), st.sampled_from(ddim.process.PREDICTIONS))
def test_predictions_round_trip(case, seed, prediction):
    schedule, t, s = case
    rng = np.random.default_rng(seed)
    x_0, eps = rng.standard_normal((2, 3, 4)).astype(np.float32)
    a = float(schedule.alpha_bar[t])
    x_t = jnp.asarray(np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps, jnp.float32)
    c = ddim.coefficients(schedule, t, s)
    output = ddim.from_x0_eps(c, jnp.asarray(x_0), jnp.asarray(eps), prediction)
    back_x_0, back_eps = ddim.to_x0_eps(c, x_t, output, prediction)
    # |x| < 6 rounded some 8 times in float32 is off by 3e-6, and then divided.
    np.testing.assert_allclose(back_x_0, x_0, atol=2e-5 / np.sqrt(a))
    np.testing.assert_allclose(back_eps, eps, atol=2e-5 / np.sqrt(1 - a))


def test_v_at_zero_terminal_snr():
    """v at ᾱ_T = 0 is −x_0, and stays exact where ε says nothing."""
    schedule = ddim.rescale_zero_terminal_snr(SCHEDULE)
    c = ddim.coefficients(schedule, 1000, 900)
    x_0, eps = jnp.full((1, 2), 0.3), jnp.full((1, 2), -0.7)
    v = ddim.from_x0_eps(c, x_0, eps, "v")
    np.testing.assert_allclose(v, -x_0)
    np.testing.assert_allclose(ddim.to_x0_eps(c, eps, v, "v"), (x_0, eps))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        ddim.to_x0_eps(c, eps, eps, "eps")


@given(steps(), st.floats(0, 1), st.integers(0, 2**31 - 1))
def test_step_is_equation_12(case, eta, seed):
    schedule, t, s = case
    a = schedule.alpha_bar
    assume(a[t] > 1e-4)
    x, e, z = np.random.default_rng(seed).standard_normal((3, 2, 3)).astype(np.float32)
    got = ddim.ddim_step(schedule, jnp.asarray(x), jnp.asarray(e), t, s, eta, jnp.asarray(z))
    sigma = reference.eta_sigma(a, t, s, eta)
    x_0 = (x - np.sqrt(1 - a[t]) * e) / np.sqrt(a[t])
    want = np.sqrt(a[s]) * x_0 + np.sqrt(max(1 - a[s] - sigma**2, 0)) * e + sigma * z
    # x̂_0 is rounded at the size of x/√ᾱ_t, some 8 times 6e-8 of it, and multiplied by √ᾱ_s.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.sqrt(a[s] / a[t]))


def test_step_per_image_times():
    x, e = jax.random.normal(jax.random.key(0), (2, 3, 5))
    t, s = jnp.array([1000, 500, 3]), jnp.array([900, 1, 0])
    together = ddim.ddim_step(SCHEDULE, x, e, t, s)
    alone = [
        ddim.ddim_step(SCHEDULE, x[i : i + 1], e[i : i + 1], int(t[i]), int(s[i])) for i in range(3)
    ]
    np.testing.assert_allclose(together, jnp.concatenate(alone), rtol=1e-6)


def test_forward_marginal_moments(key):
    x_0 = jnp.full((20000, 1), 0.5)
    x_t = ddim.forward_marginal(SCHEDULE, x_0, 300, jax.random.normal(key, x_0.shape))
    n, a = 20000, A[300]
    assert abs(float(x_t.mean()) - 0.5 * np.sqrt(a)) < 4 * np.sqrt((1 - a) / n)
    assert abs(float(x_t.var()) - (1 - a)) < 4 * (1 - a) * np.sqrt(2 / n)


def test_clipping_with_and_without_rederived_eps():
    """Trap 6: the two differ; re-derived is Eq. 7 with the clipped x̂_0 in place of x_0."""
    x_t, eps = jnp.array([[2.0, -0.1]]), jnp.array([[-1.0, 0.2]])
    c, clip = ddim.coefficients(SCHEDULE, 600, 400, eta=0.3), ddim.clip_x0(1.0)
    kept, x_0 = ddim.step(c, x_t, eps, prediction=ddim.Prediction("eps", clip, rederive_eps=False))
    again, _ = ddim.step(c, x_t, eps, prediction=ddim.Prediction("eps", clip))
    kappa, lam, _ = ddim.posterior(SCHEDULE, 600, 400, eta=0.3)
    assert float(jnp.abs(x_0).max()) <= 1
    np.testing.assert_allclose(again, kappa * x_t + lam * x_0, rtol=1e-5)
    np.testing.assert_allclose(kept, np.sqrt(A[400]) * x_0 + c.direction * eps, rtol=1e-5)
    assert not np.allclose(kept, again)


def test_dynamic_threshold_per_image():
    x_0 = jnp.array([[[0.5, -0.25]], [[8.0, -4.0]]])
    got = ddim.dynamic_threshold(1.0)(x_0)
    np.testing.assert_allclose(got, [[[0.5, -0.25]], [[1.0, -0.5]]])


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ddim.posterior(SCHEDULE, 500, 500), ValueError, "down to s < t"),
        (lambda: ddim.posterior(SCHEDULE, 1001, 5), ValueError, "1..1000, got 1001"),
        (lambda: ddim.posterior(SCHEDULE, 5, -1), ValueError, "0..1000, got -1"),
        (lambda: ddim.posterior(SCHEDULE, 5.0, 1), TypeError, "integer"),
        (lambda: ddim.posterior(SCHEDULE, 5, 1, eta=-0.1), ValueError, "eta must be >= 0"),
        (lambda: ddim.posterior(SCHEDULE, 5, 1, eta=float("nan")), ValueError, "eta must be >= 0"),
        (lambda: ddim.posterior(SCHEDULE, 1000, 1, eta=1.5), ValueError, "too large.*t = 1000"),
        (lambda: ddim.posterior(SCHEDULE, 5, 1, sigma=0.9), ValueError, "too large"),
        (lambda: ddim.posterior(SCHEDULE, 5, 1, sigma=-0.1), ValueError, "sigma must be >= 0"),
        (lambda: ddim.ddim_step(SCHEDULE, X, X, 5, 1, eta=0.5), ValueError, "pass noise="),
        (lambda: ddim.ddim_step(SCHEDULE, X, X[:1], 5, 1), ValueError, "eps must have the shape"),
        (lambda: ddim.ddim_step(SCHEDULE, X, X, jnp.array([5, 6, 7]), 1), ValueError, "per image"),
        (lambda: ddim.ddim_step(SCHEDULE, X, X, 5, 1, prediction="w"), ValueError, "'w'.*eps"),
        (lambda: ddim.from_x0_eps(ddim.coefficients(SCHEDULE, 5, 1), X, X, "w"), ValueError, "'w'"),
        (lambda: ddim.ddim_step(SCHEDULE, X.astype(int), X, 5, 1), TypeError, "127.5"),
        (lambda: ddim.forward_marginal(SCHEDULE, X, 1001, X), ValueError, "got 1001"),
        (lambda: ddim.forward_marginal(SCHEDULE, X, jnp.array([1, -1]), X), ValueError, "0..T"),
        (lambda: ddim.clip_x0(0.0), ValueError, "bound > 0"),
        (lambda: ddim.dynamic_threshold(1.5), ValueError, "quantile"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()
