import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling import (
    autoguidance,
    classifier,
    classifier_free,
    classifier_free_labels,
    inpaint,
    start_from,
)
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
T = jnp.array([1, 20, 300, 500, 900, 1000])


def gaussian_eps(x, t, mean, variance):
    """Optimal ε of N(mean, variance I), in float64: −√(1 − ᾱ) times the score."""
    a = A[np.asarray(t)][:, None]
    x = np.asarray(x, np.float64)
    return np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (a * variance + 1 - a)


@given(scale=st.floats(-2, 8), mean=st.floats(-1, 1), variance=st.floats(0.1, 1))
def test_classifier_free_is_the_score_of_the_sharpened_density(scale, mean, variance):
    """ε of p(x)^(1 − w) p(x|y)^w: scores add with these weights."""
    guided = classifier_free(
        oracle.gaussian(SCHEDULE, mean, variance), oracle.gaussian(SCHEDULE, 0.0, 1.0), scale
    )
    expected = (1 - scale) * gaussian_eps(X, T, 0, 1) + scale * gaussian_eps(X, T, mean, variance)
    # Each ε, at most 3, comes within 1e-5 in float32 and is multiplied by its weight.
    atol = 1e-5 * (abs(1 - scale) + abs(scale))
    np.testing.assert_allclose(guided(X, T), expected, rtol=0, atol=atol)


def test_classifier_free_samples_the_closed_form_gaussian():
    """With equal variances, guidance moves the mean of the data to w·m."""
    guided = classifier_free(
        oracle.gaussian(SCHEDULE, 0.5, 0.3), oracle.gaussian(SCHEDULE, 0.0, 0.3), 3.0
    )
    x_T = ddim.initial_noise(jax.random.key(0), 5, (2,))
    tau = ddim.timesteps(1000, 50)
    expected = reference.ddim_loop(
        lambda x, t: gaussian_eps(x, [t], 3.0 * 0.5, 0.3), np.asarray(x_T), A, tau
    )
    np.testing.assert_allclose(ddim.sample(guided, x_T, SCHEDULE, tau), expected, atol=1e-4)


def labelled(x, t, y):
    return y[:, None] * x + t[:, None].astype(x.dtype) / 1000


@pytest.mark.parametrize(
    "scale",
    [
        *(pytest.param(scale, marks=pytest.mark.slow) for scale in (0.0, 1.0)),
        2.5,
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    ],
)
@pytest.mark.parametrize("interval", [None, (20, 500)])
def test_one_doubled_call_equals_two_calls(scale, interval):
    labels, null, calls = jnp.arange(1.0, 7.0), -1.0, []

    def network(x, t, y):
        calls.append(x.shape[0])
        return labelled(x, t, y)

    one = classifier_free_labels(network, labels, null, jnp.asarray(scale), interval=interval)
    two = classifier_free(
        lambda x, t: labelled(x, t, labels),
        lambda x, t: labelled(x, t, jnp.full(6, null)),
        jnp.asarray(scale),
        interval=interval,
    )
    np.testing.assert_allclose(one(X, T), two(X, T), rtol=1e-6)
    assert calls == [12]
    weight = np.where((interval is None) | ((T >= 20) & (T <= 500)), np.asarray(scale), 1)
    expected = (-1 + weight[:, None] * (np.asarray(labels)[:, None] + 1)) * X
    np.testing.assert_allclose(one(X, T), expected + T[:, None] / 1000, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", pytest.param("x_0", marks=pytest.mark.slow), "v"])
def test_autoguidance_of_gaussians_whatever_is_predicted(kind):
    """Scores add with the weights 1 − w and w: a float64 loop of Eq. 12 with their sum."""
    tau, w = ddim.timesteps(1000, 20), 2.0

    def as_kind(mean, variance):
        exact = oracle.gaussian(SCHEDULE, mean, variance)

        def network(x, t):
            c = ddim.coefficients(SCHEDULE, t, t * 0)
            return ddim.from_x0_eps(c, *ddim.to_x0_eps(c, x, exact(x, t)), kind)

        return ddim.predicts(network, kind)

    x_T = ddim.initial_noise(jax.random.key(0), 5, (2,))
    guided = autoguidance(as_kind(0.5, 0.3), as_kind(0.2, 0.6), w)
    assert guided.prediction.kind == kind
    expected = reference.ddim_loop(
        lambda x, t: w * gaussian_eps(x, [t], 0.5, 0.3) + (1 - w) * gaussian_eps(x, [t], 0.2, 0.6),
        np.asarray(x_T), A, tau,
    )  # fmt: skip
    # The first step divides ε's rounding, times w, by √ᾱ_T = 0.006.
    np.testing.assert_allclose(ddim.sample(guided, x_T, SCHEDULE, tau), expected, atol=2e-3)
    limited = autoguidance(as_kind(0.5, 0.3), as_kind(0.2, 0.6), w, interval=(20, 500))
    plain, inside = as_kind(0.5, 0.3)(X, T), np.asarray((T >= 20) & (T <= 500))
    np.testing.assert_allclose(limited(X, T)[~inside], plain[~inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(limited(X, T)[inside], guided(X, T)[inside])


@pytest.mark.parametrize("phi", [0.7, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]])
def test_rescaled_guidance_has_the_contrast_of_the_conditional(phi):
    """Lin et al. 2023, Eq. 14–16, in NumPy; of labels in one call the same."""
    x, labels = np.asarray(X, np.float64), np.arange(1.0, 7.0)
    cond, uncond = (y[:, None] * x + T[:, None] / 1000 for y in (labels, np.full(6, -1.0)))
    guided = uncond + 3 * (cond - uncond)
    share = np.asarray(phi) * cond.std(axis=1) / guided.std(axis=1)
    expected = (share + 1 - np.asarray(phi))[:, None] * guided
    options = {"scale": 3.0, "rescale": jnp.asarray(phi)}
    one = classifier_free_labels(labelled, jnp.asarray(labels, jnp.float32), -1.0, **options)
    two = classifier_free(
        lambda x, t: labelled(x, t, jnp.asarray(labels, jnp.float32)),
        lambda x, t: labelled(x, t, jnp.full(6, -1.0)),
        **options,
    )
    for denoise in (one, two):
        np.testing.assert_allclose(denoise(X, T), expected, rtol=1e-5, atol=1e-5)
    if phi == 1.0:
        np.testing.assert_allclose(np.std(two(X, T), axis=1), cond.std(axis=1), rtol=1e-5)


def test_an_image_without_contrast_is_left_alone():
    flat = classifier_free(lambda x, t: 2 * x, zero, 3.0, rescale=0.7)
    np.testing.assert_array_equal(flat(ONES, TIMES), 6 * ONES)
    slope = jax.grad(lambda x: flat(x, TIMES).sum())(ONES)
    np.testing.assert_array_equal(slope, 6 * ONES)


def test_labels_may_be_embeddings():
    labels = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)
    guided = classifier_free_labels(lambda x, t, y: x * y, labels, jnp.zeros(3), 2.0)
    np.testing.assert_allclose(guided(X, T), 2 * labels * X, rtol=1e-6)


def test_scale_is_traced():
    compiled = []

    @jax.jit
    def run(scale):
        compiled.append(1)
        guided = classifier_free(lambda x, t: 0.5 * x, lambda x, t: 0.1 * x, scale)
        return ddim.sample(guided, X, SCHEDULE, [10, 500])

    outputs = [run(w) for w in (0.0, 1.0, 7.5)]
    assert len(compiled) == 1
    assert not np.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_classifier_guidance_with_an_exact_likelihood_is_the_posteriors_denoiser(prediction):
    """x_0 ~ N(m, C), y | x_0 ~ N(h·x_0, r²): p(x_0 | y) is Gaussian, by the textbook formula."""
    rng = np.random.default_rng(2)
    root = rng.normal(size=(3, 3))
    cov, mean, h, r2, y = root @ root.T / 3 + 0.1 * np.eye(3), rng.normal(size=3), root[0], 0.2, 1.3
    gain = cov @ h / (h @ cov @ h + r2)
    posterior_mean, posterior_cov = mean + gain * (y - h @ mean), cov - np.outer(gain, h @ cov)

    def exact_eps(x, t, m, c):
        a = A[t]
        score = -np.linalg.solve(a * c + (1 - a) * np.eye(3), x - np.sqrt(a) * m)
        return -np.sqrt(1 - a) * score

    variance, offset, slope = np.zeros(1001), np.zeros(1001), np.zeros((1001, 3))
    for t in range(1, 1001):  # y | x_t ~ N(offset + slope·x_t, variance)
        w = np.linalg.solve(A[t] * cov + (1 - A[t]) * np.eye(3), np.sqrt(A[t]) * cov @ h)
        slope[t], offset[t] = w, h @ mean - np.sqrt(A[t]) * w @ mean
        variance[t] = h @ cov @ h - np.sqrt(A[t]) * w @ cov @ h + r2
    variance, offset, slope = (jnp.asarray(v, jnp.float32) for v in (variance, offset, slope))

    def log_prob(x, t):
        return -((y - offset[t] - (slope[t] * x).sum(axis=1)) ** 2) / (2 * variance[t])

    a, b = (np.sqrt(v)[np.asarray(T)][:, None] for v in (A, 1 - A))

    def as_prediction(eps):
        x_0 = (X - b * eps) / a
        return {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[prediction]

    x, t = np.asarray(X, np.float64), np.asarray(T)
    before, after = (
        as_prediction(np.stack([exact_eps(x[i], t[i], m, c) for i in range(6)]))
        for m, c in ((mean, cov), (posterior_mean, posterior_cov))
    )
    unguided = ddim.predicts(lambda x, t: jnp.asarray(before, jnp.float32), prediction)
    guided = classifier(unguided, log_prob, SCHEDULE)
    assert guided.prediction.kind == prediction
    assert np.abs(before - after).max() > 0.01
    np.testing.assert_allclose(guided(X, T), after, rtol=2e-4, atol=2e-5)


CORRELATION = np.array([[1.0, 0.9], [0.9, 1.0]])


def linear_replacement(tau, eta, fresh, k):
    """Mean and variance of the unknown pixel under replacement, a linear recursion in float64.

    The state is (noise of the known pixel at this t, unknown pixel), both Gaussian.
    """
    mean, cov = np.zeros(2), np.eye(2)  # (z, u); z is standard normal at every t
    steps = [0, *[int(t) for t in tau]]
    for i in range(len(steps) - 1, 0, -1):
        t, s = steps[i], steps[i - 1]
        a, b = np.sqrt(A[t]), np.sqrt(1 - A[t])
        if fresh:  # a new z, independent of u
            mean[0], cov = 0, np.diag([1, cov[1, 1]])
        gain = b * np.linalg.inv(A[t] * CORRELATION + (1 - A[t]) * np.eye(2))[1]
        # ε_u = gain · (a k + b z, u)
        eps_mean, eps_z, eps_u = gain[0] * a * k, gain[0] * b, gain[1]
        sigma = reference.eta_sigma(A, t, s, eta)
        ratio, direction = np.sqrt(A[s]) / a, np.sqrt(1 - A[s] - sigma**2)
        e = direction - ratio * b  # u_s = ratio u + e ε_u + σ n
        own = direction / np.sqrt(1 - A[s]) if s else 0  # z_s = own z + rest n'
        matrix = np.array([[own, 0], [e * eps_z, ratio + e * eps_u]])
        noise = np.diag([1 - own**2, sigma**2])
        mean = matrix @ mean + np.array([0, e * eps_mean])
        cov = matrix @ cov @ matrix.T + noise
    return mean[1], cov[1, 1]


@pytest.mark.parametrize(
    ("fresh", "eta"),
    [
        (True, 1.0),
        (False, 0.0),
        pytest.param(True, 0.0, marks=pytest.mark.slow),
        pytest.param(False, 1.0, marks=pytest.mark.slow),
    ],
)
def test_inpainting_a_gaussian(fresh, eta):
    n, k, tau = 4000, 2.0, ddim.timesteps(1000, 50)
    known = jnp.array([[k, np.nan]]).repeat(n, axis=0)  # what is unknown is never looked at
    x_T = ddim.initial_noise(jax.random.key(0), n, (2,))
    if not fresh:  # the known region of x_T must be drawn from q(x_T | k)
        x_T = x_T.at[:, 0].set(np.sqrt(A[1000]) * k + np.sqrt(1 - A[1000]) * x_T[:, 0])
    key = jax.random.key(1)  # one for both: what is drawn from it differs
    given = inpaint(
        oracle.gaussian(SCHEDULE, 0.0, CORRELATION), known, jnp.array([True, False]), SCHEDULE,
        key if fresh else None,
    )  # fmt: skip
    x_0 = ddim.sample(given, x_T, SCHEDULE, tau, eta, key)
    assert (x_0[:, 0] == k).all()
    unknown = np.asarray(x_0[:, 1], np.float64)
    mean, variance = linear_replacement(tau, eta, fresh, k)
    assert abs(unknown.mean() - mean) < 4 * np.sqrt(variance / n)
    assert abs(unknown.var() - variance) < 4 * variance * np.sqrt(2 / n)
    # Replacement pulls the mean towards the exact 0.9 k from 0 but falls short of it.
    assert 0.4 * 0.9 * k < unknown.mean() < 0.9 * k


def test_inpainting_an_image_does_not_depend_on_its_batch(key):
    denoise, mask = oracle.gaussian(SCHEDULE, 0.2, 0.3), jnp.array([True, False, False])
    x_T = ddim.initial_noise(key, 6, (3,))
    tau, last = ddim.timesteps(1000, 10), ddim.image_keys(key, [4, 5])
    given = inpaint(denoise, X, mask, SCHEDULE, key)
    whole = ddim.sample(given, x_T, SCHEDULE, tau, 0.7, key)
    given = inpaint(denoise, X[4:], mask, SCHEDULE, last)
    part = ddim.sample(given, x_T[4:], SCHEDULE, tau, 0.7, last)
    np.testing.assert_allclose(part, whole[4:], rtol=1e-5, atol=1e-6)
    assert (whole[:, 0] == X[:, 0]).all()


def test_inpainting_nothing_and_everything(key):
    denoise, tau = oracle.gaussian(SCHEDULE, 0.2, 0.3), ddim.timesteps(1000, 10)
    denoise = ddim.predicts(denoise, x0_fn=ddim.clip_x0(0.5))
    for known in (True, False):
        given = inpaint(denoise, X, jnp.array([known]), SCHEDULE)
        x_0 = ddim.sample(given, 2 * X, SCHEDULE, tau)
        plain = ddim.sample(denoise, 2 * X, SCHEDULE, tau)
        np.testing.assert_array_equal(x_0, X if known else plain)


def test_start_from():
    noise, tau = jnp.flip(X), ddim.timesteps(1000, 10)
    x_t, rest = start_from(SCHEDULE, X, tau, 300, noise)
    assert rest.tolist() == [100, 200, 300]
    np.testing.assert_allclose(
        x_t, np.sqrt(A[300]) * X + np.sqrt(1 - A[300]) * noise, rtol=1e-5, atol=1e-6
    )
    # Gaussian data stays Gaussian data: the variance after noising and sampling is the data's.
    n = 4000
    x_0 = 0.5 * ddim.initial_noise(jax.random.key(0), n, (1,))
    z = ddim.initial_noise(jax.random.key(1), n, (1,))
    x_t, rest = start_from(SCHEDULE, x_0, ddim.timesteps(1000, 500), 300, z)
    out = ddim.sample(oracle.gaussian(SCHEDULE, 0.0, 0.25), x_t, SCHEDULE, rest)
    assert abs(float(out.var()) - 0.25) < 4 * 0.25 * np.sqrt(2 / n) + 0.004  # 0.004: Euler at S
    assert 0.1 < np.corrcoef(np.asarray(out[:, 0]), np.asarray(x_0[:, 0]))[0, 1] < 0.99


def zero(x, t):
    return jnp.zeros_like(x)


ONES = jnp.ones((2, 3))
TIMES = jnp.array([5, 5])
MASK = jnp.array([True, False, True])
TAU = [10, 100]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: classifier_free(zero, zero, np.inf), ValueError, "finite"),
        (lambda: classifier_free(zero, zero, np.ones((2, 2))), ValueError, "scalar"),
        (lambda: classifier_free(zero, zero, 1.0, interval=(9, 3)), ValueError, "lo <= hi"),
        (lambda: classifier_free(zero, zero, 1.0, interval=(0.2, 0.8)), ValueError, "times T"),
        (lambda: autoguidance(zero, zero, 1.0, interval=5), ValueError, r"\(lo, hi\).*got 5"),
        (lambda: classifier_free(zero, zero, np.ones(3))(ONES, TIMES), ValueError, "3"),
        (lambda: classifier_free(zero, zero, 2.0, rescale=1.5), ValueError, r"in \[0, 1\]"),
        (lambda: classifier_free(zero, zero, 2.0, rescale=np.nan), ValueError, r"in \[0, 1\]"),
        (
            lambda: classifier_free(zero, zero, 2.0, rescale=np.ones(3))(ONES, TIMES),
            ValueError,
            "rescale is for",
        ),
        (
            lambda: classifier_free(zero, zero, 2.0, rescale=np.ones((1, 2))),
            ValueError,
            "rescale must be a scalar",
        ),
        (lambda: autoguidance(zero, ddim.predicts(zero, "v"), 2.0), ValueError, "predict the same"),
        (
            lambda: classifier_free_labels(lambda x, t, y: x, TIMES[:1], 0, 1.0)(ONES, TIMES),
            ValueError,
            "labels for 1",
        ),
        (
            lambda: classifier_free_labels(lambda x, t, y: x[:2], TIMES, 0, 1.0)(ONES, TIMES),
            ValueError,
            "shape of its input",
        ),
        (
            lambda: classifier_free(zero, ddim.predicts(zero, "v"), 2.0),
            ValueError,
            "must predict the same",
        ),
        (lambda: classifier(zero, zero, SCHEDULE)(ONES, TIMES), ValueError, "one log-probability"),
        (lambda: inpaint(zero, ONES, MASK.astype(float), SCHEDULE), TypeError, "bool"),
        (lambda: inpaint(zero, ONES, MASK[:2], SCHEDULE), ValueError, "broadcast"),
        (lambda: inpaint(zero, ONES * np.nan, MASK, SCHEDULE), ValueError, "finite"),
        (
            lambda: ddim.sample(inpaint(zero, ONES[:1], MASK, SCHEDULE), ONES, SCHEDULE, TAU),
            ValueError,
            "the sampler's are",
        ),
        (lambda: start_from(SCHEDULE, ONES, TAU, 50, ONES), ValueError, "nearest is 10"),
        (lambda: start_from(SCHEDULE, ONES, TAU, 10, ONES[:1]), ValueError, "shape"),
        (lambda: start_from(SCHEDULE, ONES, [100, 10], 10, ONES), ValueError, "increase"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
