import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.process.gamma import bound, edm, min_snr
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)
ROOT = jnp.asarray(np.sqrt(1 - A), jnp.float32)


def exact(x, t):
    return ROOT[t][:, None] * x


def test_expectation_on_gaussian_data(key):
    """Data N(0, 1), exact ε: E‖ε_θ − ε‖² = Var(ε | x_t) = ᾱ_t, so L_γ/T = mean of ᾱ_1..ᾱ_T."""
    n = 100_000
    x_0 = jax.random.normal(key, (n, 1))
    got = float(ddim.loss(exact, SCHEDULE, x_0, jax.random.key(1)))
    # Given t the squared error is ᾱ_t χ²₁: E² of the pooled variance is 3 mean ᾱ² − (mean ᾱ)².
    a = A[1:]
    standard_error = np.sqrt((3 * (a**2).mean() - a.mean() ** 2) / n)
    assert abs(got - a.mean()) < 4 * standard_error


def test_gamma_weights_each_time(key):
    n = 100_000
    x_0 = jax.random.normal(key, (n, 1))
    gamma = jnp.zeros(1001).at[:101].set(1.0)  # only t <= 100 counts
    got = float(ddim.loss(exact, SCHEDULE, x_0, jax.random.key(1), gamma))
    a = np.where(np.arange(1, 1001) <= 100, A[1:], 0)
    standard_error = np.sqrt((3 * (a**2).mean() - a.mean() ** 2) / n)
    assert abs(got - a.mean()) < 4 * standard_error


def test_times_are_uniform_in_one_to_t(key):
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    ddim.loss(network, ddim.cosine_schedule(5), jnp.zeros((50_000, 1)), key)
    counts = np.bincount(seen[0], minlength=6)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 10_000).max() < 4.5 * np.sqrt(10_000 * 0.8)


def test_noise_of_an_image_is_its_own(key):
    """Image k's draw does not depend on how many images follow it."""
    seen = []

    def network(x, t):
        seen.append((x, t))
        return x

    x_0 = jax.random.normal(key, (8, 3))
    for n in (8, 3):
        ddim.loss(network, SCHEDULE, x_0[:n], jax.random.key(2))
    (x_all, t_all), (x_few, t_few) = seen
    np.testing.assert_array_equal(t_all[:3], t_few)
    np.testing.assert_allclose(x_all[:3], x_few, rtol=1e-6)


# By kind: the exact output on data N(0, 1) given x_t, and its variance; s² = ᾱ/4 + 1 − ᾱ for "edm".
B = 1 - A
KINDS = {
    "eps": (np.sqrt(B), A),
    "x_0": (np.sqrt(A), B),
    "v": (0 * A, np.ones_like(A)),
    "edm": (np.sqrt(A * B) * 1.5 / np.sqrt(A / 4 + B), 4 * (A / 4 + B)),
}
SNR = A[1:] / B[1:]
WEIGHTS = {  # of the squared error of x̂_0, from the papers
    "bound": np.append(0.5 / B[1], (SNR[:-1] - SNR[1:]) / 2),
    "min-snr-5": np.minimum(SNR, 5),
}


@pytest.fixture(scope="module")
def judged():
    """(kind, γ, scale) → loss of `scale` times the exact output, always on the same draws."""
    x_0 = jax.random.normal(jax.random.key(0), (20_000, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def judge(kind, gamma, scale):
        table = jnp.asarray(KINDS[kind][0], jnp.float32)
        # An "edm" network is fed x_t/s.
        s = jnp.asarray(np.sqrt(A / 4 + B) if kind == "edm" else np.ones_like(A), jnp.float32)
        network = lambda x, t: scale * (table * s)[t][:, None] * x  # noqa: E731
        denoise = ddim.predicts(network, kind, schedule=SCHEDULE)
        return ddim.loss(denoise, SCHEDULE, x_0, jax.random.key(1), gamma)

    return judge


@pytest.mark.parametrize("name", ddim.GAMMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_is_least_at_the_oracle(judged, kind, name):
    """There it is mean_t γ_t Var(output | x_t), whatever is predicted and however it is weighed."""
    gamma = ddim.find_gamma(name)(SCHEDULE, ddim.Prediction(kind))
    least = gamma[1:] * KINDS[kind][1][1:]
    got, low, high = (
        float(judged(kind, jnp.asarray(gamma, jnp.float32), jnp.float32(scale)))
        for scale in (1, 0.8, 1.2)
    )
    standard_error = np.sqrt((3 * (least**2).mean() - least.mean() ** 2) / 20_000)
    assert abs(got - least.mean()) < 4 * standard_error
    assert min(low, high) > got or kind == "v"  # the exact v of these data is 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weighting_of_the_error_of_x_0(name):
    """γ_t (output's error)² is the papers' w_t (x̂_0's error)² for every kind, in float64."""
    t, (x_t, wrong) = np.arange(1, 1001), np.random.default_rng(0).normal(size=(2, 1000))
    c = ddim.coefficients(SCHEDULE, t, 0)
    with jax.enable_x64(True):
        for kind in KINDS:
            prediction = ddim.Prediction(kind)
            gamma = ddim.find_gamma(name)(SCHEDULE, prediction)
            assert (gamma.shape, gamma.dtype) == ((1001,), np.float64)
            there, here = (
                np.asarray(prediction.x0_eps(c, jnp.asarray(x_t), jnp.asarray(output))[0])
                for output in (wrong, 0 * wrong)
            )
            want = WEIGHTS[name] * (there - here) ** 2
            # x̂_0 from ε loses 1/√ᾱ_T = 157 times the rounding.
            np.testing.assert_allclose(gamma[1:] * wrong**2, want, rtol=1e-9)


def test_min_snr_as_it_is_printed():
    want = {"eps": np.minimum(SNR, 5) / SNR, "x_0": np.minimum(SNR, 5)}
    want["v"] = np.minimum(SNR, 5) / (SNR + 1)
    for kind, gamma in want.items():
        got = ddim.find_gamma("min-snr-5")(SCHEDULE, ddim.Prediction(kind))
        np.testing.assert_allclose(got[1:], gamma, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_bound_is_the_sum_of_divergences(eta):
    """KL of two normals of one variance, their means by Eq. 7, for an x̂_0 that errs by 0.1."""
    total, sigma = 0.1**2 / (2 * B[1]), eta * np.sqrt(B[:-1] / B[1:] * (1 - A[1:] / A[:-1]))
    for t in range(2, 1001):
        kappa = np.sqrt((B[t - 1] - sigma[t - 1] ** 2) / B[t])
        lam = np.sqrt(A[t - 1]) - kappa * np.sqrt(A[t])
        total += (lam * 0.1) ** 2 / (2 * sigma[t - 1] ** 2)
    gamma = bound(SCHEDULE, ddim.Prediction("x_0"), eta)
    np.testing.assert_allclose((gamma[1:] * 0.1**2).sum(), total, rtol=1e-6)


def test_edm_trains_at_its_own_noise_levels():
    """Up to each t, γ holds the probability that ln σ is nearer to an earlier t."""
    gamma = ddim.find_gamma("edm")(SCHEDULE, ddim.Prediction("edm", sigma_data=0.3))
    log_sigma = np.log(B[1:] / A[1:]) / 2
    normal = statistics.NormalDist(-1.2, 1.2)
    for t in (1, 10, 300, 999):
        edge = (log_sigma[t - 1] + log_sigma[t]) / 2
        assert gamma[1 : t + 1].sum() / 1000 == pytest.approx(normal.cdf(edge), abs=1e-9)
    assert gamma[1:].mean() == pytest.approx(1)


@pytest.mark.parametrize("name", ddim.GAMMAS)
def test_zero_terminal_snr_has_weights_for_all_but_eps(name):
    schedule = ddim.rescale_zero_terminal_snr(SCHEDULE)
    for kind in ("x_0", "v", "edm"):
        assert np.isfinite(ddim.find_gamma(name)(schedule, ddim.Prediction(kind))).all()
    if name != "one":
        with pytest.raises(ValueError, match="zero terminal SNR"):
            ddim.find_gamma(name)(schedule, ddim.Prediction("eps"))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ddim.find_gamma("two"), "unknown gamma 'two'; choose one, bound"),
        (lambda: ddim.find_gamma("math:two"), "no gamma 'two'"),
        (lambda: bound(SCHEDULE, ddim.Prediction(), eta=0.0), "eta > 0"),
        (lambda: min_snr(SCHEDULE, ddim.Prediction(), 0.0), "cap must be > 0"),
        (lambda: edm(SCHEDULE, ddim.Prediction(), std=0.0), "std must be > 0"),
    ],
)
def test_bad_gammas(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_target_is_what_is_predicted(prediction, key):
    """A network that returns the target itself has loss 0, one that is off by 1 has loss 1."""
    x_0 = jax.random.normal(key, (16, 4))

    def knows_x0(x, t, shift=0.0):
        a = jnp.asarray(A, jnp.float32)[t][:, None]
        eps = (x - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        target = {"eps": eps, "x_0": x_0, "v": jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x_0}
        return target[prediction] + shift

    schedule = ddim.linear_schedule(1000)
    args = (schedule, x_0, jax.random.key(1))
    assert float(ddim.loss(ddim.predicts(knows_x0, prediction), *args)) < 1e-4
    wrong = ddim.predicts(lambda x, t: knows_x0(x, t, 1.0), prediction)
    off = ddim.loss(wrong, *args)
    np.testing.assert_allclose(off, 1.0, rtol=1e-2)


def test_bad_input(key):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"shape \(T\+1,\) = \(1001,\)"):
        ddim.loss(exact, SCHEDULE, x, key, gamma=jnp.ones(1000))
    with pytest.raises(ValueError, match=r"finite and >= 0, got gamma\[7\] = -1"):
        ddim.loss(exact, SCHEDULE, x, key, gamma=np.where(np.arange(1001) == 7, -1.0, 1.0))
    with pytest.raises(TypeError, match="127.5"):
        ddim.loss(exact, SCHEDULE, x.astype(jnp.uint8), key)
    with pytest.raises(ValueError, match="shape of its input"):
        ddim.loss(lambda x, t: x[:1], SCHEDULE, x, key)
    with pytest.raises(ValueError, match="'w'"):
        ddim.loss(ddim.predicts(exact, "w"), SCHEDULE, x, key)


def test_a_bfloat16_network_is_judged_in_float32():
    x_0 = jax.random.normal(jax.random.key(1), (64, 8))
    seen = []

    def network(x, t):
        seen.append(x.dtype)
        return x / 2

    low, high = (
        ddim.loss(network, SCHEDULE, x.astype(dtype), jax.random.key(0))
        for x, dtype in ((x_0, jnp.bfloat16), (x_0, jnp.float32))
    )
    assert seen == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(low, high, rtol=2e-3)
