"""Agreement with diffusers' DPM-Solver++ and UniPC schedulers, step by step, and where they differ.

As in test_peers.py their ᾱ is float64, and so here are the σ that they make of it.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import ddim_jax as ddim
from ddim_jax.sampling.dpm_solver import dpm_solver_weights
from tests import test_peers as peers

diffusers, torch = peers.diffusers, peers.torch
pytestmark = pytest.mark.filterwarnings("default")
DPM, UniPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
STEPS = 6


def peer(kind, order, name="linear", spacing="trailing", prediction="eps", **config):
    """The scheduler with its timesteps, and our τ; it ends at σ = 0, as we do."""
    scheduler = peers.peer(
        name, spacing, prediction, kind, solver_order=order, final_sigmas_type="zero", **config
    )
    scheduler.set_timesteps(STEPS)
    tau = 1 + np.asarray(scheduler.timesteps)[::-1]
    alpha_bar = np.asarray(peers.SCHEDULES[name][0].alpha_bar)[tau[::-1]]
    scheduler.sigmas = torch.tensor(np.append(np.sqrt(1 / alpha_bar - 1), 0.0))
    return scheduler, tau


def states_of(scheduler, noisy=False):
    """(S, B, …) what it hands to the network at each step, then x_0."""
    x, states = torch.tensor(peers.X, dtype=torch.float64), []
    for i in scheduler.timesteps.tolist():
        states.append(x.numpy())
        options = {"variance_noise": torch.tensor(np.asarray(peers.noise(i + 1), np.float64))}
        output = peers.network(x, i)
        x = scheduler.step(output, i, x, **(options if noisy else {})).prev_sample
    return np.stack([*states, x.numpy()])


def ours_of(method, tau, name="linear", prediction="eps"):
    denoise = ddim.predicts(peers.ours, prediction)
    path = ddim.trajectory(
        denoise, jnp.asarray(peers.X), peers.SCHEDULES[name][0], tau, key=peers.KEY, method=method
    )
    return np.concatenate([path.x_t, path.sample[None]])


@pytest.mark.parametrize("prediction", peers.PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_2m_step_by_step(name, prediction):
    for spacing in ("trailing", "leading", "linspace"):
        scheduler, tau = peer(DPM, 2, name, spacing, prediction)
        got = ours_of(ddim.dpm_solver(2), tau, name, prediction)
        peers.assert_close(got, states_of(scheduler))


@pytest.mark.parametrize("order", [1, 2])
def test_the_sde_form_step_by_step_with_the_same_noise(order):
    scheduler, tau = peer(DPM, order, algorithm_type="sde-dpmsolver++")
    got = ours_of(ddim.dpm_solver(order, eta=1.0), tau)
    peers.assert_close(got, states_of(scheduler, noisy=True))


@pytest.mark.parametrize("variant", ["B1", "B2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [True, False])
def test_unipc_step_by_step(order, variant, corrector):
    """A difference: its B1 is infinite in the last step, to σ = 0, which it makes NaN."""
    off = [] if corrector else list(range(STEPS))
    kind = {"solver_type": variant.replace("B", "bh"), "disable_corrector": off}
    scheduler, tau = peer(UniPC, order, **kind)
    method = ddim.unipc(order, corrector=corrector, variant=variant)
    got, theirs = ours_of(method, tau), states_of(scheduler)
    peers.assert_close(got[:STEPS], theirs[:STEPS])
    assert np.isfinite(theirs[STEPS]).all() == (variant == "B2")
    if variant == "B2":
        peers.assert_close(got[STEPS], theirs[STEPS])


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_unipc_of_every_prediction(prediction):
    scheduler, tau = peer(UniPC, 3, "squaredcos_cap_v2", prediction=prediction)
    got = ours_of(ddim.unipc(3), tau, "squaredcos_cap_v2", prediction)
    peers.assert_close(got, states_of(scheduler))


def test_difference_its_third_order_takes_half_of_the_curvature():
    """Its 3M has the divided difference x̂''/2 where x̂'' belongs: a step is then of order 2. Ours is
    the e^λ-weighted mean of the parabola; theirs is ours with half of the square term."""
    scheduler, tau = peer(DPM, 3)
    assert len(tau) == STEPS
    got = ours_of(ddim.dpm_solver(3), tau)
    peers.assert_differs(got[4:], states_of(scheduler)[4:], tol=1e-4)
    lam = -np.log(np.asarray(scheduler.sigmas)[:-1])
    w = dpm_solver_weights(np.append(lam, np.inf), 3)[3]  # past the start, before the end
    h, u = lam[4] - lam[3], lam[3:0:-1] - lam[3]
    mean = lambda f: quad(lambda v: np.exp(v) * f(v), 0, h)[0] / np.expm1(h)  # noqa: E731
    for degree in range(3):
        assert w @ u**degree == pytest.approx(mean(lambda v, d=degree: v**d), rel=1e-9, abs=1e-12)
    square = np.array([1, -(u[2] / (u[2] - u[1])), u[1] / (u[2] - u[1])]) / (u[1] * u[2])
    theirs = w - square * mean(lambda v: v**2) / 2
    x, first, second, third = np.zeros((1, 1)), *np.eye(3)[:, :, None]
    sample = _third_order(scheduler, 3, [third, second, first], x)
    scale = np.sqrt(1 / (1 + np.exp(-2 * lam[4]))) * -np.expm1(-h)
    np.testing.assert_allclose(sample[:, 0] / scale, theirs, rtol=1e-6)


def _third_order(scheduler, index, outputs, x):
    """Their step from `index` for given x̂_0's, oldest first."""
    scheduler._step_index = index
    outputs = [torch.tensor(v, dtype=torch.float64) for v in outputs]
    sample = torch.zeros(3, 1, dtype=torch.float64)
    return scheduler.multistep_dpm_solver_third_order_update(outputs, sample=sample).numpy()


def test_difference_a_sigma_left_at_the_end():
    """By default the DPM scheduler ends at σ = 0, UniPC's too; `sigma_min` stops at τ₁."""
    tau = peer(DPM, 2)[1]
    config = {"solver_order": 2, "final_sigmas_type": "sigma_min"}
    other = peers.peer("linear", "trailing", kind=DPM, **config)
    other.set_timesteps(STEPS)
    assert other.sigmas[-1] > 0
    peers.assert_differs(states_of(other)[-1], ours_of(ddim.dpm_solver(2), tau)[-1])
