"""Parallel in time: what `sample` draws, in no more rounds than it has steps."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling import METHODS, find_method, parallel_sample
from ddim_jax.sampling.methods import LEARNED
from ddim_jax.sampling.plan import step_noise
from tests.tiny import padded

SCHEDULE = ddim.linear_schedule(1000)
KEY = jax.random.key(3)
X_T = ddim.initial_noise(jax.random.key(0), 2, (3,))
TAU = ddim.timesteps(1000, 20)
MEANS = jnp.array([[-1.0, 0.2, 0.5], [0.8, 0.4, -0.6], [0.1, -0.9, 0.0]])
MIXTURE = oracle.mixture(SCHEDULE, MEANS, 0.2)
# float32 rounds at every step, and the first step divides ε's rounding by √ᾱ_T = 0.006.
ROUNDING = 64 * np.finfo(np.float32).eps / float(np.sqrt(SCHEDULE.alpha_bar[1000]))


def wavy(x, t):
    """A small network that is no gradient of anything, and far from the exact ε of any data."""
    mixed = x @ jnp.array([[0.9, 0.3, -0.2], [-0.4, 0.8, 0.1], [0.2, -0.1, 0.7]])
    return jnp.sin(2 * mixed) + 0.3 * t[:, None].astype(x.dtype) / 1000


@cache
def parallel(denoise, steps, window):
    """One program for all plans that remember the same, all tolerances and all x_T."""
    tau = ddim.timesteps(1000, steps)

    @jax.jit
    def draw(x_T, plan, tolerance):
        given = lambda *_: plan  # noqa: E731
        return parallel_sample(
            denoise, x_T, SCHEDULE, tau, key=KEY, method=given, window=window, tolerance=tolerance
        )

    return lambda x_T, method, tolerance: draw(x_T, padded(method(SCHEDULE, tau)), tolerance)


@cache
def in_turn(denoise, steps):
    run = jax.jit(lambda x, p: ddim.sample(denoise, x, SCHEDULE, p.t[::-1], key=KEY,
                                           method=lambda *_: p))  # fmt: skip
    return lambda x_T, method: run(x_T, padded(method(SCHEDULE, ddim.timesteps(1000, steps))))


@pytest.mark.parametrize(
    ("denoise", "window"),
    [
        pytest.param(MIXTURE, 20, marks=pytest.mark.slow),
        (MIXTURE, 6),
        (ddim.predicts(wavy, "v"), 20),
        pytest.param(ddim.predicts(wavy, "v"), 6, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("eta", [1e-9, 0.5, 1.0, "hat"])  # 1e-9: σ of 0, in the same program
def test_it_is_sample_to_the_tolerance(denoise, window, eta):
    method = ddim.ddpm("large") if eta == "hat" else ddim.ddim(eta)
    want = in_turn(denoise, 20)(X_T, method)
    rounds = []
    for tolerance in (0.1, 1e-3, 0.0):
        got = parallel(denoise, 20, window)(X_T, method, tolerance)
        rounds.append(int(got.rounds))
        assert (got.error <= tolerance).all()
        # Steps that follow may amplify what was let pass: by less than 3 here.
        np.testing.assert_allclose(got.x_0, want, rtol=0, atol=3 * tolerance + ROUNDING)
    assert rounds == sorted(rounds)
    assert rounds[1] <= 16
    assert rounds[2] <= 20


@given(
    shape=st.sampled_from([(1, 1), (5, 3), (7, 7)]),
    eta=st.floats(0.01, 1),
    tolerance=st.one_of(st.just(0.0), st.floats(1e-6, 10)),
    scale=st.floats(0, 30),
)
def test_never_more_rounds_than_steps(shape, eta, tolerance, scale):
    steps, window = shape
    x_T = jnp.float32(scale) * X_T
    got = parallel(wavy, steps, window)(x_T, ddim.ddim(eta), tolerance)
    assert -(-steps // window) <= got.rounds <= steps
    assert (got.error <= tolerance * (1 + 1e-6)).all()
    if tolerance == 0:
        want = in_turn(wavy, steps)(x_T, ddim.ddim(eta))
        bound = ROUNDING * max(1, float(jnp.abs(want).max()))
        np.testing.assert_allclose(got.x_0, want, rtol=0, atol=bound)


def test_a_wider_window_takes_fewer_rounds():
    rounds = [
        int(parallel(MIXTURE, 20, window)(X_T, ddim.ddim(0.5), 1e-3).rounds)
        for window in (1, 6, 20)
    ]
    assert rounds[0] == 20
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[-1] < 10


def test_normal_data_take_one_round():
    """v = 0: nothing is left to the iteration, whatever η is."""
    draw = parallel(oracle.gaussian(SCHEDULE, 0.0, 1.0), 20, 20)
    assert [int(draw(X_T, ddim.ddim(eta), 1e-3).rounds) for eta in (1e-9, 0.5, 1.0)] == [1, 1, 1]


@pytest.mark.parametrize("name", [n for n in (*METHODS, "encoder") if n not in LEARNED])
def test_every_method(name):
    method = ddim.encoder() if name == "encoder" else find_method(name)
    got = parallel(MIXTURE, 20, 6)(X_T, method, 1e-4)
    np.testing.assert_allclose(got.x_0, in_turn(MIXTURE, 20)(X_T, method), atol=1e-3)
    assert got.rounds < 20


def test_denoisers_see_batches_as_from_sample():
    """Labels, known pixels and clipping are of B images, not of a window of them."""
    labels, mask = jnp.array([0.4, -0.2]), jnp.array([True, False, False])
    guided = ddim.classifier_free_labels(
        lambda x, t, y: wavy(x, t) + y[:, None], labels, 0.0, jnp.array([1.5, 3.0])
    )
    clipped = ddim.predicts(guided, x0_fn=ddim.clip_x0(0.8))
    denoise = ddim.inpaint(clipped, jnp.full((2, 3), 0.5), mask, SCHEDULE, KEY)
    got = parallel(denoise, 20, 6)(X_T, ddim.ddim(1.0), 1e-4).x_0
    np.testing.assert_allclose(got, in_turn(denoise, 20)(X_T, ddim.ddim(1.0)), atol=1e-3)
    assert (got[:, 0] == 0.5).all()


def test_the_window_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("window",))
    over = NamedSharding(mesh, PartitionSpec("window"))

    def draw(x_T, sharding):
        return parallel_sample(
            wavy, x_T, SCHEDULE, TAU, 0.5, KEY, window=16, tolerance=1e-4, sharding=sharding
        )

    spread = jax.jit(draw, static_argnums=1).lower(X_T, over).compile()
    assert "all-gather" in spread.as_text()  # each device had a part of the window
    got, alone = spread(X_T), jax.jit(draw, static_argnums=1)(X_T, None)
    np.testing.assert_allclose(got.x_0, alone.x_0, atol=1e-3)
    assert got.rounds == alone.rounds


def test_noise_given():
    plan = ddim.ddim(1.0)(SCHEDULE, TAU)
    keys = ddim.image_keys(KEY, 2)
    z = jax.vmap(lambda t: step_noise(keys, t, X_T))(jnp.asarray(plan.t))
    want = ddim.sample(MIXTURE, X_T, SCHEDULE, TAU, 1.0, KEY)
    got = ddim.sample(MIXTURE, X_T, SCHEDULE, TAU, 1.0, noise=z)
    np.testing.assert_allclose(got, want, atol=ROUNDING)
    fast = parallel_sample(MIXTURE, X_T, SCHEDULE, TAU, 1.0, noise=z, window=6, tolerance=1e-4)
    np.testing.assert_allclose(fast.x_0, want, atol=1e-3)


def test_float64():
    with jax.enable_x64(True):
        x_T, net = jnp.asarray(np.asarray(X_T, np.float64)), lambda x, t: jnp.sin(x) / 2
        got = parallel_sample(net, x_T, SCHEDULE, [300, 700], tolerance=0.0)
        want = ddim.sample(net, x_T, SCHEDULE, [300, 700])
        assert got.x_0.dtype == want.dtype == jnp.float64
        np.testing.assert_allclose(got.x_0, want, rtol=1e-13)


def test_nan_of_one_image_stays_there():
    """A network that fails on image 1 from t = 400 down, as it does in `sample`."""

    def fails(x, t):
        return jnp.where((t < 400) & (jnp.arange(2) == 1), jnp.nan, 0.1)[:, None] * wavy(x, t)

    got = parallel(fails, 20, 6)(X_T, ddim.ddim(0.5), 1e-4)
    want = in_turn(fails, 20)(X_T, ddim.ddim(0.5))
    assert jnp.isnan(got.x_0[1]).all()
    np.testing.assert_allclose(got.x_0[0], want[0], atol=1e-3)
    assert got.rounds <= 20


@dataclasses.dataclass(frozen=True)
class Foreign(ddim.Plan):
    more: object = None


def foreign(schedule, tau):
    plan = ddim.ddim()(schedule, tau)
    return Foreign(plan.t, plan.steps, more=1)


def call(x_T=X_T, **options):
    return parallel_sample(MIXTURE, x_T, SCHEDULE, TAU, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"window": 2.5}, "an int, got 2.5"),
        ({"tolerance": np.ones(2)}, "one number"),
        ({"x_T": X_T[:0]}, "an image at least"),
        ({"tolerance": -1.0}, "tolerance must be >= 0"),
        ({"tolerance": np.nan}, "tolerance must be >= 0"),
        ({"eta": 0.5}, "needs key"),
        ({"eta": 0.5, "key": KEY, "noise": jnp.ones((20, 2, 3))}, "then no key"),
        ({"eta": 0.5, "noise": jnp.ones((19, 2, 3))}, r"noise must be .* \(20, 2, 3\)"),
        ({"noise": jnp.ones((20, 2, 3))}, "adds some"),
        ({"eta": 0.5, "method": ddim.ddim()}, "not both"),
        ({"method": foreign}, r"no methods with \['more'\]"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        call(**options)


def test_a_window_that_does_not_divide():
    over = NamedSharding(Mesh(np.array(jax.devices()), ("window",)), PartitionSpec("window"))
    with pytest.raises(ValueError, match="a window of 20 steps"):
        call(sharding=over)
