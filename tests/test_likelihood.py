"""Bits per dimension against closed forms: the bound of the chain, and the density of the ODE."""

import itertools
import json
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.evaluation import bits_per_dim
from ddim_jax.networks.unet import UNetConfig, build
from ddim_jax.process.continuous import signal_and_noise, time_at
from ddim_jax.sampling.bound import log_mass
from ddim_jax.weights import to_facts
from tests.reference import alpha_bar_linear, eta_sigma
from tests.test_cli import command as command

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
V = 0.1  # the data's variance
PIXELS = RNG.integers(60, 200, (40, 2, 2, 1))
X = jnp.asarray(PIXELS / 127.5 - 1, jnp.float32)
CHAIN = ddim.linear_schedule(100, rescale_betas=True)
GAUSSIAN = ddim.oracle.gaussian(CHAIN, 0.0, V)


def log_phi(z):
    return math.log(math.erfc(-z / math.sqrt(2)) / 2)


def expected_terms(a, tau, x, v, eta, ratio=1.0, decoder_sigma=None):
    """E of each term for one pixel x, where x̂_0 = c x_t; float64, by hand from Eq. 7 and 10.

    (x_0 − x̂_0)² has the mean (1 − c√ᾱ)² x² + c² (1 − ᾱ); μ_q − μ_p = λ (x_0 − x̂_0).
    """
    out = [(a[tau[-1]] * x**2 + (1 - a[tau[-1]]) - 1 - math.log(1 - a[tau[-1]])) / 2]
    for s, t in itertools.pairwise(tau):
        sigma = eta_sigma(a, t, s, eta)
        kappa = math.sqrt((1 - a[s] - sigma**2) / (1 - a[t]))
        lam = math.sqrt(a[s]) - kappa * math.sqrt(a[t])
        c = math.sqrt(a[t]) * v / (a[t] * v + 1 - a[t])
        squares = (1 - c * math.sqrt(a[t])) ** 2 * x**2 + c**2 * (1 - a[t])
        p = sigma**2 if ratio == 1 else 1 - a[t] / a[s]
        out.append((math.log(p / sigma**2) + (sigma**2 + lam**2 * squares) / p - 1) / 2)
    c, t = math.sqrt(a[tau[0]]) * v / (a[tau[0]] * v + 1 - a[tau[0]]), tau[0]
    sigma = eta_sigma(a, tau[1], t, 1.0)
    z, w = np.polynomial.hermite_e.hermegauss(80)
    nats = 0.0
    for node, weight in zip(z, w / w.sum(), strict=True):  # E over x_1 of −log of the bin's mass
        mean = c * (math.sqrt(a[t]) * x + math.sqrt(1 - a[t]) * node)
        high, low = (x + 1 / 255 - mean) / sigma, (x - 1 / 255 - mean) / sigma
        if mean < x:
            high, low = -low, -high
        nats -= weight * (log_phi(high) + math.log1p(-math.exp(log_phi(low) - log_phi(high))))
    return np.array([*out, nats])


@pytest.mark.parametrize(
    ("steps", "eta", "variance"),
    [
        pytest.param(100, 1.0, "small", marks=pytest.mark.slow),
        (10, 0.5, "small"),
        (100, 1.0, "large"),
    ],
)
def test_the_bound_of_a_gaussian_by_hand(steps, eta, variance):
    tau = ddim.timesteps(100, steps)
    bound = ddim.variational_bound(GAUSSIAN, X, CHAIN, KEY, tau, eta=eta, variance=variance)
    a = alpha_bar_linear(100, 1e-3, 0.2)
    one_pixel = {}
    for pixel in np.unique(PIXELS):
        x = pixel / 127.5 - 1
        ratio = 1.0 if variance == "small" else 2.0
        one_pixel[pixel] = expected_terms(a, tau, x, V, eta, ratio)
    terms = np.array([[one_pixel[p] for p in image.ravel()] for image in PIXELS]).sum(1)
    np.testing.assert_allclose(bound.prior, terms[:, 0], rtol=1e-3, atol=1e-6)
    assert bound.t[:, 0].tolist() == list(tau[1:])
    # The mean over images of what noise there is: 3.5 standard errors for each of the terms.
    for got, want in [
        *zip(np.asarray(bound.terms), terms[:, 1:-1].T, strict=True),
        (bound.decoder, terms[:, -1]),
        (bound.nats, terms.sum(1)),
    ]:
        difference = np.asarray(got) - want
        assert abs(difference.mean()) <= 3.5 * difference.std(ddof=1) / math.sqrt(len(want)) + 1e-6


def test_drawn_terms_are_unbiased_and_say_their_error():
    whole = ddim.variational_bound(GAUSSIAN, X, CHAIN, KEY)
    keys = jax.random.split(jax.random.key(1), 40)
    one = jnp.broadcast_to(X[:1], X.shape)  # one image forty times: forty independent estimates
    drawn = ddim.variational_bound(GAUSSIAN, one, CHAIN, keys, num_terms=50)
    exact = ddim.variational_bound(GAUSSIAN, one, CHAIN, jax.random.split(jax.random.key(2), 40))
    difference = np.asarray(drawn.nats - exact.nats)
    assert abs(difference.mean()) < 3 * difference.std() / math.sqrt(40)
    # Standard errors of 40 values are right within a third, and hold the noise of 50 terms.
    spread = np.asarray(drawn.nats - drawn.decoder).std()
    assert spread == pytest.approx(float(drawn.se.mean()), rel=0.4)
    assert (whole.se, drawn.terms.shape, whole.terms.shape) == (None, (50, 40), (99, 40))
    alone = ddim.variational_bound(GAUSSIAN, X[3:4], CHAIN, ddim.image_keys(KEY, [3]))
    np.testing.assert_allclose(alone.nats, whole.nats[3:4], rtol=1e-5)


def test_the_right_variance_closes_the_gap():
    """With p's variance that of q(x_s | x_t) the chain is the data's: the bound is the truth."""
    v = 0.05
    a = jnp.asarray(CHAIN.alpha_bar, jnp.float32)
    c = ddim.coefficients(CHAIN, np.arange(1, 101), np.arange(100), 1.0)
    kappa = c.direction / c.sqrt_one_minus_alpha_bar_t
    lam = c.sqrt_alpha_bar_s - kappa * c.sqrt_alpha_bar_t
    alpha = CHAIN.alpha_bar[1:]
    spread = v * (1 - alpha) / (alpha * v + 1 - alpha)  # Var[x_0 | x_t]
    log_variance = jnp.asarray(np.log(c.sigma**2 + lam**2 * spread), jnp.float32)

    def hook(x, t):
        return jnp.broadcast_to(log_variance[t - 1][:, None, None, None], x.shape)

    pixels = np.round(255 * (RNG.normal(0, math.sqrt(v), (400, 2, 2, 1)) + 1) / 2).clip(0, 255)
    x = jnp.asarray(pixels / 127.5 - 1, jnp.float32)
    oracle = ddim.oracle.gaussian(CHAIN, 0.0, v)
    bound = ddim.variational_bound(oracle, x, CHAIN, KEY, log_variance=hook)
    plain = ddim.variational_bound(oracle, x, CHAIN, KEY)
    truth = np.asarray(-log_mass(x, jnp.zeros_like(x), jnp.float32(math.sqrt(v)))).sum((1, 2, 3))
    gap = np.asarray(bound.nats) - truth
    # L_T is 5e-8 of a pixel, and discretising the pixels less than that.
    assert abs(gap.mean()) < 3 * gap.std() / math.sqrt(len(gap))
    assert np.mean(plain.nats) > np.mean(bound.nats) + 0.1
    assert a[-1] < 1e-4


def test_masses_are_those_of_the_normal():
    x = jnp.linspace(-1, 1, 256)
    for mean, sigma in [(0.0, 0.01), (1.3, 0.2), (-1.0, 1.0), (0.999, 0.004)]:
        log = np.float64(log_mass(x, jnp.float32(mean), jnp.float32(sigma)))
        edges = [-math.inf, *[(2 * k + 1) / 255 - 1 for k in range(255)], math.inf]
        phi = np.array([math.erfc(-(e - mean) / sigma / math.sqrt(2)) / 2 for e in edges])
        mass = np.diff(phi)
        seen = mass > 1e-9  # below, float64's own differences are noise
        np.testing.assert_allclose(log[seen], np.log(mass[seen]), rtol=1e-4, atol=1e-5)
        assert np.isfinite(log).all()


# σ from 1e-4, where the field that is held below it does not show, to 1e3, where x_T is normal
SIGMA = np.concatenate([[0], np.geomspace(1e-4, 1e3, 400)])
FINE = ddim.schedule_from_alpha_bar(1 / (1 + SIGMA**2))
WEIGHTS, VARIANCE = np.array([0.4, 0.4, 0.2]), np.array([0.1, 0.2, 0.05])
MEANS = np.array([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.0, 0.0, -0.6]])
MIXTURE = ddim.oracle.mixture(FINE, MEANS, VARIANCE, WEIGHTS)
POINTS = RNG.normal(size=(16, 3)) * 0.7


def mixture_log_density(x):
    d2 = ((x[:, None] - MEANS) ** 2).sum(-1)
    logs = np.log(WEIGHTS) - 1.5 * np.log(2 * np.pi * VARIANCE) - d2 / 2 / VARIANCE
    return np.logaddexp.reduce(logs, axis=1)


@pytest.mark.slow
def test_the_density_of_a_mixture():
    points, truth = jnp.asarray(POINTS, jnp.float32), mixture_log_density(POINTS)
    exact = ddim.ode_density(MIXTURE, points, FINE, probes="exact", rtol=1e-7, atol=1e-7)
    # 1e-4 nats a pixel: float32 over 100 steps of a log-density that starts at 3 log 1e3
    np.testing.assert_allclose(exact.log_density, truth, atol=3e-4)
    assert exact.se.tolist() == [0] * 16
    random = ddim.ode_density(MIXTURE, points, FINE, KEY, probes=32)
    off = (np.asarray(random.log_density) - truth) / np.asarray(random.se)
    assert np.abs(off).max() < 4  # of 16
    assert np.abs(off).mean() < 1.3
    assert 50 < int(random.num_calls) < 400


@pytest.mark.slow
def test_the_bound_of_digits_is_above_their_density():
    images = load("digits").take(np.arange(0, 1797, 14))["image"]
    model = ddim.load_model("digits")
    bound = bits_per_dim(model, images, num_terms=100, batch_size=129)
    ode = bits_per_dim(model, images, "ode", probes=4, tolerance=1e-4, batch_size=129)
    above = bound.per_image - ode.per_image
    assert above.mean() > 3 * above.std() / math.sqrt(len(images))
    assert 4 < ode.figure.value < bound.figure.value < 6


@pytest.mark.parametrize("kind", [pytest.param("v", marks=pytest.mark.slow), "edm"])
def test_the_density_of_a_gaussian_whatever_the_network_predicts(kind):
    """x̄_T = x̄_0 √((v + σ_T²)/v) exactly, so that log p is N(0, v ᾱ-corrected) by hand."""
    v, schedule = 0.3, FINE

    def network(x, t):
        a, b = (c[:, None] for c in signal_and_noise(schedule, t))
        scale = a * v / (a**2 * v + b**2)
        x_0 = scale * x
        eps = (x - a * x_0) / b
        return {"v": a * eps - b * x_0, "edm": b * x_0 - a * eps}[kind]  # of σ_d = 1, where s = 1

    x = jnp.asarray([[0.5], [-1.0], [0.1]], jnp.float32)
    edm = {"sigma_data": 1.0, "schedule": schedule} if kind == "edm" else {}
    denoise = ddim.predicts(network, kind, **edm)
    density = ddim.ode_density(denoise, x, schedule, probes="exact", rtol=1e-6, atol=1e-6)
    top = SIGMA[-1] ** 2
    latent = np.asarray(x) * math.sqrt((v + top) / v / (1 + top))
    np.testing.assert_allclose(density.x_T, latent, rtol=1e-4)
    truth = -np.log(2 * np.pi * v) / 2 - np.asarray(x)[:, 0] ** 2 / 2 / v
    np.testing.assert_allclose(density.log_density, truth, atol=1e-4)


def test_real_times_lie_between_the_whole_ones():
    schedule = ddim.linear_schedule(1000)
    whole = jnp.arange(1.0, 1001.0)
    a, b = signal_and_noise(schedule, whole)
    np.testing.assert_allclose(a, np.sqrt(schedule.alpha_bar[1:]), rtol=2e-6)
    np.testing.assert_allclose(b, np.sqrt(1 - schedule.alpha_bar[1:]), rtol=2e-6)
    t = jnp.asarray([1.0, 1.25, 500.5, 999.75, 1000.0])
    a, b = signal_and_noise(schedule, t)
    np.testing.assert_allclose(time_at(schedule, jnp.log(b / a)), t, rtol=1e-5)
    snr = np.exp(-2 * np.log(np.asarray(b / a)))[1]
    first, second = np.exp(np.asarray(schedule.log_snr)[1:3])
    assert snr == pytest.approx(first**0.75 * second**0.25, rel=1e-5)  # linear in log-SNR
    assert np.isnan(jax.jit(signal_and_noise)(schedule, jnp.asarray([0.5]))[0])


@pytest.fixture(scope="module")
def coded():
    """A model of pixels of variance V, as bits_per_dim takes it."""
    return ddim.Model(lambda w, x, t: w * GAUSSIAN(x, t), jnp.float32(1.0), CHAIN)


def test_bits_are_those_of_a_code_for_the_pixels(coded):
    images = PIXELS.astype(np.uint8)
    truth = -np.asarray(log_mass(X, jnp.zeros_like(X), jnp.float32(math.sqrt(V))))
    truth = truth.mean((1, 2, 3)) / math.log(2)
    ode = bits_per_dim(coded, images, "ode", probes="exact", tolerance=1e-4, batch_size=25)
    # 0.005: the field is held below σ_1 = 0.03, by which log p is off by σ_1²/v/2. The rest is u.
    difference = ode.per_image - truth
    assert abs(difference.mean()) < 3 * difference.std() / math.sqrt(40) + 0.005
    assert difference.std() < 0.02
    assert str(ode).startswith("bits/dim (ODE) ")
    bound = bits_per_dim(coded, images, batch_size=25)
    assert bound.figure.value > ode.figure.value + 0.01
    assert sum(bound.parts.values()) == pytest.approx(bound.figure.value)
    assert bound.by_t.sum() + bound.parts["prior"] == pytest.approx(bound.figure.value, rel=1e-5)
    again = bits_per_dim(coded, images[25:], numbers=np.arange(25, 40), batch_size=25)
    np.testing.assert_allclose(again.per_image, bound.per_image[25:], rtol=1e-5)
    saved = bound.to_json()
    assert saved["bits"]["name"] == "bits/dim (bound)"
    assert (saved["size"], len(saved["per_image"]), len(saved["by_t"])) == (40, 40, 100)


ZERO = ddim.rescale_zero_terminal_snr(ddim.linear_schedule(1000))
IMAGES = PIXELS.astype(np.uint8)


def bound(x=X, schedule=CHAIN, denoise=GAUSSIAN, **options):
    return ddim.variational_bound(denoise, x, schedule, KEY, **options)


def density(x=X, schedule=CHAIN, denoise=GAUSSIAN, key=KEY, **options):
    return ddim.ode_density(denoise, x, schedule, key, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: bound(IMAGES), TypeError, "of uint8 ones take x / 127.5 - 1"),
        (lambda m: bound(X[..., 0] + 0.001), ValueError, "at the 256 levels"),
        (lambda m: bound(2 * X), ValueError, "at the 256 levels"),
        (lambda m: bound(X[0, 0, 0]), ValueError, r"images \(B, ...\)"),
        (lambda m: bound(eta=0.0), ValueError, "eta must be above 0, got 0.0.*infinite"),
        (lambda m: bound(eta=40.0), ValueError, "too large for the step"),
        (lambda m: bound(variance="huge"), ValueError, "got 'huge'"),
        (
            lambda m: bound(variance="large", log_variance=lambda x, t: x),
            ValueError,
            "not both",
        ),
        (lambda m: bound(X[:0]), ValueError, r"and some, got shape \(0, 2"),
        (lambda m: bound(eta=np.ones(100)), ValueError, "one number"),
        (lambda m: bound(num_terms=2.5), ValueError, "an int.* got 2.5"),
        (lambda m: density(X[:0]), ValueError, "an image at least"),
        (lambda m: bits_per_dim(m, IMAGES, probes=4), ValueError, 'are of by="ode"'),
        (lambda m: bits_per_dim(m, IMAGES, "ode", num_terms=4), ValueError, 'are of by="bound"'),
        (lambda m: bound(num_terms=1), ValueError, "num_terms must be at least 2"),
        (lambda m: bound(tau=[5, 3]), ValueError, "increase strictly"),
        (lambda m: bound(tau=[101]), ValueError, "1..T"),
        (lambda m: bound(schedule=ZERO), ValueError, "zero terminal SNR"),
        (lambda m: density(schedule=ZERO), ValueError, "zero terminal SNR"),
        (lambda m: density(key=None), ValueError, "random probes need key"),
        (lambda m: density(probes=0), ValueError, 'int >= 1, or "exact", got 0'),
        (lambda m: density(rtol=2.0), ValueError, "rtol must lie in"),
        (
            lambda m: density(denoise=lambda x, t: x * jnp.ones(100)[t][:, None, None, None]),
            TypeError,
            "does not take floating t",
        ),
        (lambda m: bits_per_dim(m, IMAGES, "guess"), ValueError, "got 'guess'"),
        (lambda m: bits_per_dim(m, PIXELS), TypeError, "uint8"),
        (lambda m: bits_per_dim(m, IMAGES[:0]), ValueError, "and some"),
        (lambda m: bits_per_dim(m, IMAGES, batch_size=0), ValueError, "batch_size"),
        (lambda m: bits_per_dim(m, IMAGES, numbers=np.arange(3)), ValueError, "one per image"),
        (
            lambda m: bits_per_dim(ddim.load_model("digits"), IMAGES),
            ValueError,
            r"\(8, 8, 1\), got \(2, 2, 1\)",
        ),
        (
            lambda m: bits_per_dim(m._replace(params=jnp.float32(np.nan)), IMAGES),
            FloatingPointError,
            "not finite for 40 of 40 images, such as number 0",
        ),
    ],
)
def test_bad_input(coded, call, error, match):
    with pytest.raises(error, match=match):
        call(coded)


def test_diffrax_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ModuleNotFoundError, match="needs diffrax: pip install diffrax"):
        density(probes="exact")


def test_the_command(command, tmp_path):
    config = UNetConfig(8, 1, 32, (1,), 1, (), 0.0)
    facts = to_facts(ddim.ScheduleConfig(num_steps=1000), config, "eps")
    apply_fn, params = build(config, KEY)
    model = ddim.Model(apply_fn, params, ddim.linear_schedule(1000), config, facts)
    ddim.save_model("m.safetensors", model)
    few = "--data digits --num-images 5 --num-terms 8 --batch-size 3"
    said = command(f"evaluate m.safetensors --bits bound {few} --out b.json")
    assert re.fullmatch(r"bits/dim \(bound\) [\d.]+ ± [\d.]+ \(5 images\): .*decoder.*\n", said)
    saved = json.loads(pathlib.Path("b.json").read_text())
    assert (saved["size"], saved["num_terms"], saved["model"]) == (5, 8, "m.safetensors")
    assert saved["data"]["name"] == "digits"
    # The network gives ε = 0: the squares of ε itself, so that the digits' 5 bits become many.
    assert 8 < saved["bits"]["value"] < 40
    assert "(12 images)" in command(  # all of them, fewer than the usual 256
        "evaluate m.safetensors --bits bound --data digits --split train[:12] --num-terms 2"
    )
    with pytest.raises(SystemExit, match="--label and --labels are not for --bits"):
        command("evaluate m.safetensors --bits bound --data digits --label 3")
    for line, says in [
        (f"--bits bound {few} --out b.json", "b.json exists; choose another, or pass --overwrite"),
        ("--bits bound --data digits --num-images 1798", "at most 1,797"),
        ("--bits bound --data digits --num-images 0", "--num-images must be at least 1"),
        ("--bits bound --data digits --num-terms 1", "at least 2, or 0 for all"),
        ("--bits bound --data digits --eta 0", "--eta must be above 0"),
        ("--bits bound --data digits --probes 3", "--probes has no meaning with --bits bound"),
        ("--bits ode --data digits --eta 0.5", "--eta has no meaning with --bits ode"),
        ("--bits ode --data digits --tolerance 2", "--tolerance must lie in"),
        ("--bits ode --data digits --seed -1", "--seed must be in"),
        ("--bits ode --data digits --blocks 3", "are not for --bits"),
        ("--bits ode --data nothing", "no data set 'nothing'"),
        ("--data digits --num-terms 8", "say --bits bound or --bits ode"),
    ]:
        with pytest.raises(SystemExit, match=says):
            command(f"evaluate m.safetensors {line}")
    with pytest.raises(SystemExit, match="no model 'nothing'"):
        command("evaluate nothing --bits ode --data digits")
