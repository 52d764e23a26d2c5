"""A variance that the network learned: steps, chains and the bound against float64 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.evaluation import bits_per_dim
from ddim_jax.process.predictor import variance_of
from ddim_jax.sampling.learned import learned_variance
from ddim_jax.sampling.methods import LEARNED, METHODS, find_method
from tests import reference

SCHEDULE = ddim.linear_schedule(1000)
A = reference.alpha_bar_linear()
TAU = np.array([2, 90, 300, 650, 1000])
RNG = np.random.default_rng(5)
X_T = RNG.standard_normal((3, 4, 2))
Z = RNG.standard_normal((5, 3, 4, 2))
SHARES = RNG.uniform(-0.4, 1.4, (4, 2))  # theirs is not bounded either
KEY = jax.random.key(2)


def eps_of(x, t, xp):
    return xp.sin(x) * (0.5 + t / 2000)


def network(x, t):
    """ε of a formula, and shares v that depend on the pixel and on x."""
    eps = eps_of(x, t[:, None, None].astype(x.dtype), jnp)
    v = jnp.asarray(SHARES, x.dtype)[None] + 0.1 * jnp.tanh(x)
    return jnp.concatenate([eps, 2 * v - 1], axis=-1)


LEARNER = ddim.predicts(network, learned_variance=True)


def variances(t, s, floor):
    """β̃ and β of the step t → s of the chain along τ, in float64."""
    beta = 1 - A[t] / A[s]
    small = beta * (1 - A[s]) / (1 - A[t])
    return (small if s else floor), beta


def step_by_hand(x, t, s, z, in_family):
    """(mean, σ², x_s) of Nichol & Dhariwal's Eq. 10, 11 and 15, or of Eq. 7 with that σ."""
    eps = eps_of(x, t, np)
    v = SHARES + 0.1 * np.tanh(x)
    x_0 = (x - np.sqrt(1 - A[t]) * eps) / np.sqrt(A[t])
    low, high = variances(t, s, variances(TAU[1], TAU[0], None)[0])
    sigma2 = np.exp(v * np.log(high) + (1 - v) * np.log(low))
    if in_family:
        sigma2 = np.minimum(sigma2, 1 - A[s])
        kappa = np.sqrt((1 - A[s] - sigma2) / (1 - A[t]))
        mean = kappa * x + (np.sqrt(A[s]) - kappa * np.sqrt(A[t])) * x_0
    else:  # the mean of the posterior of Ho et al., Eq. 7, from t to s
        beta, ratio = high, A[t] / A[s]
        mean = np.sqrt(A[s]) * beta / (1 - A[t]) * x_0
        mean = mean + np.sqrt(ratio) * (1 - A[s]) / (1 - A[t]) * x
    return mean, sigma2, mean + (np.sqrt(sigma2) * z if s else 0)


@pytest.mark.parametrize("name", LEARNED)
def test_mean_and_variance_of_a_step(name):
    """From x_650 to x_300, in float64."""
    tau, in_family = np.array([300, 650]), name == "ddim-learned"
    plan = find_method(name)(SCHEDULE, tau)
    with jax.enable_x64(True):
        x = jnp.asarray(X_T)
        output, v = variance_of(LEARNER)(x, jnp.full(3, 650))
        c, learned = jax.tree.map(lambda a: a[0], (plan.steps, plan.learned))
        steps = learned.steps(c, v)
        x_0 = (x - c.sqrt_one_minus_alpha_bar_t * output) / c.sqrt_alpha_bar_t
        mean = np.asarray(c.sqrt_alpha_bar_s * x_0 + steps.direction * output)
        sigma = np.asarray(steps.sigma)
    want, sigma2, _ = step_by_hand(X_T, 650, 300, 0.0, in_family)
    np.testing.assert_allclose(mean, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sigma**2, sigma2, rtol=1e-12)
    assert (sigma >= 0).all()


@pytest.mark.parametrize("name", LEARNED)
def test_a_chain_of_five_steps(name):
    """In float32, whose ε is divided by √ᾱ_T = 0.006 in the first step."""
    x = X_T
    for i, (t, s) in enumerate(zip(TAU[::-1], [*TAU[-2::-1], 0])):
        x = step_by_hand(x, t, s, Z[i], name == "ddim-learned")[2]
    x_T, noise = X_T.astype(np.float32), jnp.asarray(Z, jnp.float32)
    got = ddim.sample(
        LEARNER, jnp.asarray(x_T), SCHEDULE, TAU, method=find_method(name), noise=noise
    )
    np.testing.assert_allclose(got, x, atol=16 * 2**-23 / np.sqrt(A[1000]) * np.abs(x).max())


def test_shares_0_and_1_are_the_two_variances_of_ddpm():
    x_T, tau = jnp.asarray(X_T, jnp.float32), ddim.timesteps(1000, 5)
    for share, variance in ((0.0, "small"), (1.0, "large")):

        def constant(x, t, share=share):
            eps = eps_of(x, t[:, None, None].astype(x.dtype), jnp)
            return jnp.concatenate([eps, jnp.full_like(x, 2 * share - 1)], axis=-1)

        learner = ddim.predicts(constant, learned_variance=True)
        run = lambda net, how: ddim.sample(  # noqa: E731
            net, x_T, SCHEDULE, tau, key=KEY, method=ddim.ddpm(how)
        )
        np.testing.assert_allclose(run(learner, "learned"), run(learner, variance), rtol=2e-5)


def test_the_family_keeps_to_the_limit_of_eq_7():
    """σ² ≤ 1 − ᾱ_s also where β is above it: from t = 2 to 1, and at every coarse last step."""
    t, s = np.arange(1000, 0, -1), np.arange(999, -1, -1)
    rows = learned_variance(SCHEDULE, t, s, in_family=True)
    c = ddim.coefficients(SCHEDULE, t, s, 1.0)
    limit = 1 - A[s]
    assert (np.exp(rows.high) > limit * (1 + 1e-6)).sum() >= 2  # so that there is something to keep
    for share in (0.0, 0.5, 1.0, 1.5):
        with jax.enable_x64(True):
            steps = rows.steps(jax.tree.map(jnp.asarray, c), jnp.full(1000, share))
            sigma, direction = np.asarray(steps.sigma), np.asarray(steps.direction)
        assert (sigma >= 0).all()
        assert (sigma**2 <= limit * (1 + 1e-12)).all()
        np.testing.assert_allclose(sigma**2 + direction**2, limit, atol=1e-15)
        assert np.isfinite(direction).all()


def test_what_carries_a_learned_variance():
    x, t = jnp.ones((2, 4, 2)), jnp.array([5, 9])
    both = network(x, t)
    partly = jax.jit(ddim.predicts(lambda w, x, t: w * network(x, t), learned_variance=True))
    model = ddim.Model(partly, jnp.float32(1), SCHEDULE)
    clipped = ddim.predicts(model, x0_fn=ddim.clip_x0(1.0))
    seen = []
    for net in (LEARNER, model.denoise, clipped.denoise, ddim.watch(LEARNER, seen.append)):
        np.testing.assert_array_equal(net(x, t), both[..., :2])
        output, v = variance_of(net)(x, t)
        np.testing.assert_allclose(2 * v - 1, both[..., 2:], atol=1e-6)
        np.testing.assert_array_equal(output, both[..., :2])
    mask = jnp.array([[[True, False]]])
    given = ddim.inpaint(LEARNER, jnp.full_like(x, 9.0), mask, SCHEDULE)
    np.testing.assert_array_equal(variance_of(given)(x, t)[1], variance_of(LEARNER)(x, t)[1])
    guided = ddim.classifier(LEARNER, lambda x, t: -(x**2).sum((1, 2)), SCHEDULE)
    output, v = variance_of(guided)(x, t)
    np.testing.assert_allclose(output, guided(x, t), rtol=1e-6)
    np.testing.assert_allclose(2 * v - 1, both[..., 2:], atol=1e-6)
    assert variance_of(lambda x, t: x) is None


def test_one_call_of_the_network_a_step_and_one_trace():
    calls, traces = [], []

    def counted(x, t):
        traces.append(t)
        return network(x, t)

    learner = ddim.watch(
        ddim.predicts(counted, learned_variance=True), lambda t: calls.append(int(t))
    )
    x_T = jnp.asarray(X_T, jnp.float32)
    ddim.sample(learner, x_T, SCHEDULE, TAU, key=KEY, method=ddim.ddpm("learned"))
    jax.effects_barrier()
    assert sorted(calls) == TAU.tolist()
    assert len(traces) == 1


def images_learner(w, x, t):
    v = 0.3 + 0.2 * jnp.tanh(x)
    return jnp.concatenate([w * x, 2 * v - 1], axis=-1)


def test_the_bound_is_that_of_the_log_variance_by_hand():
    """`variance="learned"` against the same bound with log σ² given as a function."""
    schedule = ddim.linear_schedule(100, rescale_betas=True)
    denoise = ddim.predicts(lambda x, t: images_learner(0.9, x, t), learned_variance=True)
    tau = np.array([1, 20, 60, 100])
    a = np.asarray(schedule.alpha_bar)
    s = np.array([0, 1, 20, 60])
    beta = 1 - a[tau] / a[s]
    small = beta * (1 - a[s]) / (1 - a[tau])
    small[0] = small[1]
    low, high = (jnp.asarray(np.log(v), jnp.float32) for v in (small, beta))

    def log_variance(x, t):
        v = 0.3 + 0.2 * jnp.tanh(x)
        row = jnp.searchsorted(jnp.asarray(tau), t)[:, None, None, None]
        return v * high[row] + (1 - v) * low[row]

    x_0 = jnp.asarray(RNG.integers(0, 256, (3, 2, 2, 1)) / 127.5 - 1, jnp.float32)
    got = ddim.variational_bound(denoise, x_0, schedule, KEY, tau, variance="learned")
    want = ddim.variational_bound(denoise, x_0, schedule, KEY, tau, log_variance=log_variance)
    for part in ("nats", "decoder", "terms"):
        np.testing.assert_allclose(getattr(got, part), getattr(want, part), rtol=2e-5)
    other = ddim.variational_bound(denoise, x_0, schedule, KEY, tau)
    assert not np.allclose(got.nats, other.nats, rtol=1e-3)


def test_bits_take_the_learned_variance_where_there_is_one():
    schedule = ddim.linear_schedule(50, rescale_betas=True)
    apply_fn = ddim.predicts(images_learner, learned_variance=True)
    learner = ddim.Model(apply_fn, jnp.float32(0.9), schedule)
    plain = ddim.Model(lambda w, x, t: w * x, jnp.float32(0.9), schedule)
    images = RNG.integers(0, 256, (2, 2, 2, 1), np.uint8)
    bits = bits_per_dim(learner, images)
    assert bits.facts["variance"] == "learned"
    small = bits_per_dim(learner, images, variance="small")
    np.testing.assert_allclose(small.per_image, bits_per_dim(plain, images).per_image, rtol=1e-6)
    assert not np.allclose(bits.per_image, small.per_image, rtol=1e-3)
    with pytest.raises(ValueError, match="no learned variance"):
        bits_per_dim(plain, images, variance="learned")


def test_bits_tell_the_labels_that_they_are_given():
    schedule = ddim.linear_schedule(50, rescale_betas=True)

    def apply_fn(w, x, t, labels):
        return w[labels][:, None, None, None] * x

    model = ddim.Model(apply_fn, jnp.array([0.5, 0.9]), schedule)
    images = RNG.integers(0, 256, (3, 2, 2, 1), np.uint8)
    labels = np.array([0, 1, 1])
    got = bits_per_dim(model, images, labels=labels, batch_size=2)
    each = [
        bits_per_dim(ddim.Model(lambda w, x, t: w * x, w, schedule), images).per_image
        for w in model.params
    ]
    np.testing.assert_allclose(got.per_image, np.choose(labels, each), rtol=1e-5)
    with pytest.raises(ValueError, match="labels must be one per image"):
        bits_per_dim(model, images, labels=labels[:2])


def test_refusals():
    plain = lambda x, t: x  # noqa: E731
    x_T = jnp.asarray(X_T, jnp.float32)
    for name in LEARNED:
        method = METHODS[name]()
        for run in (
            lambda m=method: ddim.sample(plain, x_T, SCHEDULE, TAU, key=KEY, method=m),
            lambda m=method: ddim.make_sampler(
                ddim.Model(lambda w, x, t: x, (), SCHEDULE), TAU, method=m
            ),
        ):
            with pytest.raises(ValueError, match="no learned variance"):
                run()
        with pytest.raises(ValueError, match="needs key"):
            ddim.sample(LEARNER, x_T, SCHEDULE, TAU, method=method)
        with pytest.raises(ValueError, match="no methods with .'learned'"):
            ddim.parallel_sample(LEARNER, x_T, SCHEDULE, TAU, key=KEY, method=method)
        with pytest.raises(ValueError, match="learned variance"):
            ddim.encode_stochastic(LEARNER, x_T, SCHEDULE, TAU, key=KEY, method=method)
    with pytest.raises(ValueError, match="known already"):
        ddim.predicts(LEARNER, learned_variance=True)
    for channels in (3, 6):
        wrong = ddim.predicts(lambda x, t, n=channels: jnp.ones((3, 4, n)), learned_variance=True)
        with pytest.raises(ValueError, match="twice the channels"):
            ddim.sample(wrong, x_T, SCHEDULE, TAU, key=KEY, method=ddim.ddpm("learned"))
    with pytest.raises(ValueError, match='numbers or "learned"'):
        ddim.ddim(sigma="large")
    with pytest.raises(ValueError, match="final_noise"):
        ddim.ddpm("learned", final_noise=True)
    with pytest.raises(ValueError, match="not both"):
        ddim.ddim(0.5, sigma="learned")
