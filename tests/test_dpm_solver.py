"""DPM-Solver++ and UniPC: plain loops from the papers, limits, and what they refuse.

Their orders of convergence are in test_methods.py, and peers in test_peers_solvers.py.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling.dpm_solver import dpm_solver_weights
from ddim_jax.sampling.methods import find_method
from ddim_jax.sampling.unipc import corrector_weights, predictor_weights
from tests import reference

SCHEDULE = ddim.linear_schedule(1000)
A = reference.alpha_bar_linear(1000)
TAU = ddim.timesteps(1000, 8, "logsnr", schedule=SCHEDULE)
EXACT = oracle.gaussian(SCHEDULE, 0.3, 0.2)
KEY = jax.random.key(2)
X_T = np.random.default_rng(0).normal(size=(5, 3))
LAMBDA = np.array([-4.0, -2.5, -1.8, -0.2, 0.4, 2.0, 3.0, np.inf])


def x0_hat(x, t):
    """E[x_0 | x_t] of N(0.3, 0.2)."""
    gain = np.sqrt(A[t]) * 0.2 / (A[t] * 0.2 + 1 - A[t])
    return 0.3 + gain * (x - np.sqrt(A[t]) * 0.3)


def drawn(method, tau=TAU, key=None):
    return ddim.sample(EXACT, jnp.asarray(X_T, jnp.float32), SCHEDULE, tau, key=key, method=method)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_order_1_is_ddim(eta):
    one, want = (f(SCHEDULE, TAU) for f in (ddim.dpm_solver(1, eta=eta), ddim.ddim(eta)))
    assert one.weights is None
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_2m_and_its_sde_form_against_the_papers_loop(eta):
    """Lu et al. 2022 in α = √ᾱ, σ = √(1 − ᾱ): D by the line through two x̂_0, then one update."""
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(5))
    x, old, visited = X_T, None, [*TAU[::-1], 0]
    alpha, sigma = np.sqrt(A[visited]), np.sqrt(1 - A[visited])
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    for n, (t, s) in enumerate(itertools.pairwise(visited)):
        h, new = lam[n + 1] - lam[n], x0_hat(x, t)
        r = np.inf if n == 0 or s == 0 else (lam[n] - lam[n - 1]) / h
        D = new if old is None else (1 + 1 / (2 * r)) * new - 1 / (2 * r) * old
        if eta:
            z = jax.vmap(lambda k, t=t: jax.random.normal(jax.random.fold_in(k, t), (3,)))(keys)
            x = sigma[n + 1] / sigma[n] * np.exp(-h) * x - alpha[n + 1] * np.expm1(-2 * h) * D
            x = x + sigma[n + 1] * np.sqrt(-np.expm1(-2 * h)) * np.asarray(z)
        else:
            x = sigma[n + 1] / sigma[n] * x - alpha[n + 1] * np.expm1(-h) * D
        old = new
    got = drawn(ddim.dpm_solver(2, eta=eta), key=KEY)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["dpm", "predictor", "corrector"])
def test_weights_integrate_polynomials_in_lambda_exactly(weights):
    """No error past the start where x̂_0 is a polynomial of degree < 3, or < 4 if corrected."""
    w = {"dpm": dpm_solver_weights, "predictor": predictor_weights, "corrector": corrector_weights}
    w, new = w[weights](LAMBDA, 3), int(weights == "corrector")
    for n in (3, 4):
        h = LAMBDA[n + 1] - LAMBDA[n]
        u = LAMBDA[n + new - np.arange(3 + new)] - LAMBDA[n]
        for degree in range(3 + new):
            total = quad(lambda v, d=degree: np.exp(v) * v**d, 0, h)[0]
            assert w[n] @ u**degree == pytest.approx(total / np.expm1(h), rel=1e-9, abs=1e-12)


def test_the_start_of_order_3_is_an_integral_from_x_T():
    """Σ over the first steps of h_n Σ_j w_nj x̂_0 is the whole integral of what is known at last."""
    w, kappa = dpm_solver_weights(LAMBDA, 3), np.exp(LAMBDA[:-1])
    for degree, steps in ((0, 1), (1, 2), (2, 3)):
        f = LAMBDA**degree
        total = sum(
            (kappa[n + 1] - kappa[n]) * (w[n] @ np.where(n < np.arange(3), 0, f[n - np.arange(3)]))
            for n in range(steps)
        )
        want = quad(lambda v, d=degree: np.exp(v) * v**d, LAMBDA[0], LAMBDA[steps])[0]
        assert total == pytest.approx(want, rel=1e-9)


def test_every_row_of_every_memory_has_sum_1_and_a_correction_0():
    for order, variant in itertools.product((1, 2, 3), ("B1", "B2")):
        plan = ddim.unipc(order, variant=variant)(SCHEDULE, TAU)
        np.testing.assert_allclose(plan.weights.sum(1), 1, rtol=1e-9)
        np.testing.assert_allclose(plan.corrects.sum(1), 0, atol=1e-9)
        assert plan.weights.shape == plan.corrects.shape == (len(TAU), order + 1)
        assert not plan.corrects[0].any()
    np.testing.assert_allclose(ddim.dpm_solver(3)(SCHEDULE, TAU).weights.sum(1), 1, rtol=1e-9)


def test_unipc_without_its_corrector_is_2m():
    plans = [m(SCHEDULE, TAU) for m in (ddim.unipc(2, corrector=False), ddim.dpm_solver(2))]
    for a, b in zip(*map(jax.tree.leaves, plans), strict=True):
        np.testing.assert_array_equal(a, b)


def test_unipc_corrects_x_t_by_the_trapezium():
    """Order 1 written out: x_s anew from x_t with ½(x̂_0 + x̂_0') once x̂_0 is known there."""
    x, old, visited, g = X_T, None, [*TAU[::-1], 0], 0.0
    for t, s in itertools.pairwise(visited):
        new = x0_hat(x, t)
        if old is not None:
            x = x + g * ((new + old) / 2 - old)
        ratio = np.sqrt((1 - A[s]) / (1 - A[t]))
        g = np.sqrt(A[s]) - ratio * np.sqrt(A[t])
        x, old = ratio * x + g * new, new
    np.testing.assert_allclose(drawn(ddim.unipc(1)), x, rtol=1e-4, atol=1e-4)


METHODS = {
    "dpm-2": ddim.dpm_solver(2),
    "dpm-3": ddim.dpm_solver(3),
    "unipc-1": ddim.unipc(1),
    "unipc-3": ddim.unipc(3),
    "unipc-3-B1": ddim.unipc(3, variant="B1"),
}


@pytest.mark.parametrize("S", [1, 2, 3, 4, 5])
def test_fewer_steps_than_the_order_and_no_signal_at_T(S):
    """A constant x̂_0 is integrated exactly by any of them, from S = 1 on, also from ᾱ_T = 0."""
    constant = ddim.predicts(lambda x, t: jnp.full_like(x, 0.7), "x_0")
    for method, schedule in itertools.product(
        METHODS.values(), (SCHEDULE, ddim.rescale_zero_terminal_snr(SCHEDULE))
    ):
        plan = method(schedule, ddim.timesteps(1000, S))
        leaves = jax.tree.leaves(plan)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        np.testing.assert_allclose(plan.weights.sum(1), 1, rtol=1e-9)
        newest = np.eye(plan.weights.shape[1])[0]
        np.testing.assert_array_equal(plan.weights[[0, -1]], [newest, newest])
    got = ddim.sample(constant, jnp.ones((2, 3)), schedule, ddim.timesteps(1000, S), method=method)
    np.testing.assert_allclose(got, 0.7, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_no_signal_at_T_is_the_limit_of_little(name):
    """The tables of ᾱ_T = 0 are those of ᾱ_T → 0, where λ_T → −∞."""
    t = np.array([0, 0.1, 0.4, 0.7, 1.0])
    zero = np.where(t == 1, 0, np.exp(-9 * t**2))
    tables = []
    for last in (0.0, 1e-300):
        schedule = ddim.schedule_from_alpha_bar(np.where(t == 1, last, zero))
        tables.append(METHODS[name](schedule, [1, 2, 3, 4]))
    np.testing.assert_allclose(tables[0].weights, tables[1].weights, atol=0.01)  # 1/|λ_T| = 0.003


@pytest.mark.parametrize("name", METHODS)
def test_tau_is_traced(name):
    method = METHODS[name]
    traced = jax.jit(lambda tau: method(SCHEDULE, tau))(jnp.asarray(TAU))
    plan = method(SCHEDULE, TAU)
    for a, b in zip(jax.tree.leaves(traced), jax.tree.leaves(plan), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_eta_may_be_traced_and_along_tau():
    noise = jax.jit(lambda eta: ddim.dpm_solver(2, eta=eta)(SCHEDULE, TAU).steps.sigma)
    eta = np.linspace(0, 1, 8)
    want = np.asarray(ddim.ddim(eta)(SCHEDULE, TAU).steps.sigma)
    np.testing.assert_allclose(noise(jnp.asarray(eta, jnp.float32)), want, rtol=1e-4, atol=1e-6)
    plan = find_method("dpm-solver-2", 0.5)(SCHEDULE, TAU)
    np.testing.assert_array_equal(plan.steps.sigma, ddim.ddim(0.5)(SCHEDULE, TAU).steps.sigma)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_sde_form_keeps_the_variance_better_than_ddim(eta):
    """Data N(0, 1) exactly: each step keeps the marginal up to the error of x̂_0 inside of it."""
    exact = oracle.gaussian(SCHEDULE, 0.0, 1.0)
    x_T = ddim.initial_noise(KEY, 20000, (4,))
    tau = ddim.timesteps(1000, 20, "logsnr", schedule=SCHEDULE)
    runs = [
        ddim.sample(exact, x_T, SCHEDULE, tau, key=KEY, method=m)
        for m in (ddim.ddim(eta), ddim.dpm_solver(2, eta=eta))
    ]
    plain, ours = (abs(float(x.var()) - 1) for x in runs)
    assert ours < plain / 2


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ddim.dpm_solver(4), "order must be 1, 2 or 3, got 4"),
        (lambda: ddim.dpm_solver(True), "order must be 1, 2 or 3, got True"),
        (lambda: ddim.dpm_solver(3, eta=1.0), "order 3 solves the ODE"),
        (lambda: ddim.dpm_solver(2, eta=-1.0)(SCHEDULE, TAU), "eta must be >= 0"),
        (lambda: ddim.dpm_solver(2, eta=9.0)(SCHEDULE, TAU), "too large for the step"),
        (lambda: ddim.dpm_solver(2, eta=[0.1, 0.2])(SCHEDULE, TAU), "one value per element of tau"),
        (lambda: ddim.dpm_solver(2)(SCHEDULE, [3, 2]), "strictly"),
        (lambda: ddim.unipc(0), "order must be 1, 2 or 3, got 0"),
        (lambda: ddim.unipc(2, variant="bh2"), "'bh2'"),
        (lambda: ddim.unipc(2)(SCHEDULE, [0, 2]), "1..T"),
        (lambda: drawn(lambda *a: dataclasses.replace(ddim.unipc(2)(*a), weights=None)), "memory"),
        (lambda: find_method("unipc-2", 0.5), "'unipc-2' has no eta"),
        (lambda: find_method("dpm-solver-3", 0.5), "'dpm-solver-3' has no eta"),
        (lambda: find_method("dpm-solver-4"), "unknown method 'dpm-solver-4'"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
