"""One suite over all methods: what every one of them must do, and what is special to some."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling.methods import LEARNED, METHODS, find_method
from tests import reference
from tests.tiny import padded

SCHEDULE = ddim.linear_schedule(1000)
A = reference.alpha_bar_linear()
TAU = ddim.timesteps(1000, 12, "quadratic")
EXACT = oracle.gaussian(SCHEDULE, 0.3, 0.2)
KEY = jax.random.key(3)
# Those of a learned variance need a network that has one: test_learned_variance.py.
NAMES = [name for name in METHODS if name not in LEARNED]
EVERY = pytest.mark.parametrize("name", NAMES)
NOISY = {name for name in NAMES if find_method(name)(SCHEDULE, TAU).steps.sigma is not None}
# The order that each must show; DDIM's own for whatever is not named here.
ORDERS = {
    **{"adams-bashforth-2": 1.9, "adams-bashforth-3": 2.8, "adams-bashforth-4": 3.7},
    **{"dpm-solver-2": 1.9, "dpm-solver-3": 2.8, "unipc-2": 2.8, "unipc-3": 3.8},
}


@functools.cache
def as_kind(kind):
    """The exact denoiser, as a network that predicts x_0, v or F, which is fed x_t/s."""

    def network(x, t):
        c = ddim.coefficients(SCHEDULE, t, t * 0)
        if kind == "edm":
            a = jnp.asarray(A, x.dtype)[t][:, None]
            x = x * jnp.sqrt(a / 4 + 1 - a)
        return ddim.from_x0_eps(c, *ddim.to_x0_eps(c, x, EXACT(x, t)), kind)

    return ddim.predicts(network, kind, schedule=SCHEDULE)


@functools.cache
def drawn_with(denoise):
    """`sample` by any plan at TAU: one program for all plans that remember the same."""
    run = jax.jit(
        lambda x_T, keys, plan: ddim.sample(
            denoise, x_T, SCHEDULE, plan.t[::-1], key=keys, method=lambda *_: plan
        )
    )
    return lambda name, x_T, keys: run(x_T, keys, padded(find_method(name)(SCHEDULE, TAU)))


@EVERY
def test_a_row_for_each_call_and_float64_on_the_host(name):
    plan = find_method(name)(SCHEDULE, TAU)
    assert plan.t.tolist() == TAU[::-1].tolist()
    leaves = jax.tree.leaves((plan.steps, plan.weights, plan.corrects))
    assert all(leaf.dtype == np.float64 and leaf.shape[0] == len(TAU) for leaf in leaves)
    assert plan.steps.sqrt_alpha_bar_s[-1] == 1  # every method ends at s = 0
    assert (plan.weights is None) or np.allclose(plan.weights.sum(1), 1) or name == "pf-euler"


@functools.cache
def smooth_sampler():
    """One jitted function for all methods, which shares their programs; used with x64 alone."""
    schedule, denoise, *_ = reference.smooth_problem()
    model = ddim.Model(lambda _, x, t: denoise(x, t), None, schedule)
    return ddim.make_sampler(model, [1])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOISY])
def test_order_of_convergence(name):
    """Against RK4 in float64 on the ODE of Eq. 14, by a fit over S."""
    schedule, _, x_T, exact = reference.smooth_problem()
    sizes = np.array([32, 64, 128])
    with jax.enable_x64(True):
        errors = []
        for S in sizes:
            tau = np.arange(1, S + 1) * (schedule.num_steps // S)
            x_0 = smooth_sampler()(jnp.asarray(x_T), tau=tau, method=find_method(name))
            errors.append(np.sqrt(np.mean((np.asarray(x_0) - exact) ** 2)))
    assert -np.polyfit(np.log(sizes), np.log(errors), 1)[0] >= ORDERS.get(name, 0.95), errors


@EVERY
def test_every_kind_of_prediction_draws_the_same(name):
    """Within what float32 costs: the first step divides ε's rounding by √ᾱ_T = 0.006."""
    x_T = ddim.initial_noise(KEY, 5, (3,))
    runs = [drawn_with(as_kind(kind))(name, x_T, KEY) for kind in ddim.process.PREDICTIONS]
    bound = 64 * np.finfo(np.float32).eps / np.sqrt(A[1000])
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], atol=bound * float(jnp.abs(runs[0]).max()))


@functools.cache
def path_program():
    """`trajectory` for all plans that remember the same, and the t that it says it kept."""
    visited = []

    @jax.jit
    def run(x_T, key, plan):
        method = lambda *_: dataclasses.replace(plan, t=TAU[::-1])  # noqa: E731
        path = ddim.trajectory(EXACT, x_T, SCHEDULE, TAU, key=key, method=method, at=TAU[::3])
        visited[:] = path.t.tolist()
        return path._replace(t=None)

    return run, visited


@EVERY
def test_trajectory_is_sample(name):
    x_T, method = ddim.initial_noise(KEY, 4, (3,)), find_method(name)
    run, t = path_program()
    kept = run(x_T, KEY, padded(method(SCHEDULE, TAU)))
    np.testing.assert_allclose(kept.sample, drawn_with(EXACT)(name, x_T, KEY), rtol=1e-6, atol=1e-6)
    assert t == TAU[::3][::-1].tolist()


@EVERY
def test_an_image_does_not_depend_on_its_batch(name):
    x_T, draw = ddim.initial_noise(KEY, 5, (3,)), drawn_with(EXACT)
    whole = draw(name, x_T, KEY)
    part = draw(name, x_T[3:], ddim.image_keys(KEY, [3, 4]))
    np.testing.assert_allclose(part, whole[3:], rtol=1e-5, atol=1e-5)


@functools.cache
def counted():
    """`drawn_with` a network that counts its calls and its traces."""
    calls, traces = [], []

    def network(x, t):
        traces.append(t)
        return 0.9 * x

    return drawn_with(ddim.watch(network, lambda t: calls.append(int(t)))), calls, traces


@EVERY
def test_the_network_is_called_once_a_row(name):
    draw, calls, traces = counted()
    calls.clear(), traces.clear()
    draw(name, jnp.ones((2, 3)), KEY).block_until_ready()
    jax.effects_barrier()
    assert sorted(calls) == TAU.tolist()
    assert len(traces) <= 1  # none where another method's program is this one's too


@EVERY
def test_noise_needs_a_key_and_only_noise(name):
    run = functools.partial(drawn_with(EXACT), name, jnp.ones((2, 3)))
    if name in NOISY:
        with pytest.raises(ValueError, match="needs key"):
            run(None)
    else:
        np.testing.assert_array_equal(run(None), run(KEY))


def test_one_program_for_each_memory_length():
    """Every table, τ, η and set of weights of one memory length runs the same compiled function."""
    traces = []

    def apply_fn(w, x, t):
        traces.append(1)
        return w * EXACT(x, t)

    x_T = ddim.initial_noise(KEY, 4, (3,))
    sampler = ddim.make_sampler(ddim.Model(apply_fn, jnp.float32(1), SCHEDULE), TAU)
    outputs = []
    for method in (ddim.ddim(), ddim.ddim(0.5), ddim.ddim(1.0), ddim.ddpm("large")):
        for tau in (TAU, ddim.timesteps(1000, 12)):
            outputs.append(sampler(x_T, KEY, method=method, tau=tau, params=jnp.float32(0.9)))
    assert len(traces) == 1
    for method in (ddim.adams_bashforth(2), ddim.adams_bashforth(2, variable="sigma")):
        for tau in (TAU, ddim.timesteps(1000, 12)):
            outputs.append(sampler(x_T, method=method, tau=tau))
    assert len(traces) == 2
    for method in (ddim.dpm_solver(3), ddim.unipc(3, corrector=False)):
        for tau in (TAU, ddim.timesteps(1000, 12)):
            outputs.append(sampler(x_T, method=method, tau=tau))
    assert len(traces) == 3
    for method in (ddim.unipc(2), ddim.unipc(2, variant="B1")):
        outputs.append(sampler(x_T, method=method))
    assert len(traces) == 4
    assert len({float(out.sum()) for out in outputs}) == len(outputs)


def test_a_table_of_ones_own():
    """What a stranger writes: the midpoint of DDIM and Eq. 15, by name from another module."""

    def between(schedule, tau):
        plan = ddim.pf_euler()(schedule, tau)
        return ddim.Plan(plan.t, plan.steps, (plan.weights + 1) / 2)

    x_T = ddim.initial_noise(KEY, 4, (3,))
    x, visited = np.asarray(x_T, np.float64) / np.sqrt(A[TAU[-1]]), [*TAU[::-1], 0]
    for t, s in itertools.pairwise(visited):
        sigma = np.sqrt(1 / A[[t, s]] - 1)
        mean, b = np.sqrt(A[t]) * 0.3, 1 - A[t]
        eps = np.sqrt(b) * (np.sqrt(A[t]) * x - mean) / (A[t] * 0.2 + b)
        euler = sigma[1] - sigma[0]
        x = x + (euler + (sigma[1] ** 2 - sigma[0] ** 2) / (2 * sigma[0])) / 2 * eps
    got = ddim.sample(EXACT, x_T, SCHEDULE, TAU, method=between)
    np.testing.assert_allclose(got, x, rtol=1e-3, atol=1e-3)
    assert find_method("ddim_jax.sampling.methods:ddim")(SCHEDULE, TAU).weights is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: find_method("heun"), "unknown method 'heun'"),
        (lambda: find_method("pf-euler", 0.5), "has no eta"),
        (lambda: find_method("math:nothing"), "no method 'nothing'"),
    ],
)
def test_bad_names(call, match):
    with pytest.raises(ValueError, match=match):
        call()
