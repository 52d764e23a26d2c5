"""Agreement with diffusers' DDIMScheduler and DDIMInverseScheduler, and where they differ.

`pip install ddim_jax[peers]` brings them. Their float32 ᾱ is replaced by float64 except where that
is the difference under test, and they run in float64.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.sampling import encode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's imports
    why = "needs the peers extra: pip install 'ddim_jax[peers]'"
    torch = pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)
    from diffusers import DDIMInverseScheduler, DDIMScheduler

pytestmark = pytest.mark.filterwarnings("default")

SCHEDULES = {
    "linear": (ddim.linear_schedule(1000), {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        ddim.scaled_linear_schedule(1000),
        {"beta_start": 0.00085, "beta_end": 0.012},
    ),
    "squaredcos_cap_v2": (ddim.cosine_schedule(1000), {}),
}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
CLIPPING = {  # ours, the scheduler's configuration, its step's argument
    "none": ({}, {"clip_sample": False}, {}),
    "clip": (
        {"x0_fn": ddim.clip_x0(1.0), "rederive_eps": False},
        {"clip_sample": True},
        {"use_clipped_model_output": False},
    ),
    "clip and re-derive": (
        {"x0_fn": ddim.clip_x0(1.0)},
        {"clip_sample": True},
        {"use_clipped_model_output": True},
    ),
}
BATCH, DIM = 4, 6
X = np.random.default_rng(0).normal(size=(BATCH, DIM, 1, 1)).astype(np.float32)
KEY = jax.random.key(3)


def network(x, i):
    """A smooth function of x and of the 0-based index i, for JAX and for torch."""
    sin = torch.sin if isinstance(x, torch.Tensor) else jnp.sin
    return 0.7 * sin(1.5 * x + i / 300) + 0.2 * x


def ours(x, t):
    return network(x, (t - 1).astype(x.dtype).reshape(-1, 1, 1, 1))


@jax.jit
def noise(t):
    """`sample`'s noise: image i's from fold_in(fold_in(key, i), t)."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), t))(jnp.arange(BATCH))
    return jax.vmap(lambda k: jax.random.normal(k, (DIM, 1, 1)))(keys)


def peer(name="linear", spacing="leading", prediction="eps", kind=DDIMScheduler, **config):
    schedule, betas = SCHEDULES[name]
    scheduler = kind(
        beta_schedule=name,
        timestep_spacing=spacing,
        prediction_type=PREDICTIONS[prediction],
        **betas,
        **config,
    )
    scheduler.alphas_cumprod = torch.tensor(np.asarray(schedule.alpha_bar)[1:])
    if kind is DDIMScheduler and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def run_peer(scheduler, steps, eta=0.0, x=X, denoise=network, **step_options):
    scheduler.set_timesteps(steps)
    x = torch.tensor(np.asarray(x), dtype=torch.float64)
    for i in scheduler.timesteps.tolist():
        if eta:
            step_options["variance_noise"] = torch.tensor(np.asarray(noise(i + 1), np.float64))
            step_options["eta"] = eta
        x = scheduler.step(denoise(x, i), i, x, **step_options).prev_sample
    return x.numpy()


def assert_close(got, expected, tol=1e-5):
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


def assert_differs(got, expected, tol=1e-3):
    assert np.abs(np.asarray(got) - expected).max() > tol * np.abs(expected).max()


def walk(schedule, pairs, x=X, prediction="eps"):
    """Our step along any (t, s), for the conventions that are not ours."""
    x = jnp.asarray(x)
    for t, s in pairs:
        output = ours(x, jnp.full(BATCH, t))
        x = ddim.ddim_step(schedule, x, output, int(t), int(s), prediction=prediction)
    return x


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_agrees_wherever_its_previous_step_is_the_next_of_tau(name, prediction, clipping):
    """Leading for every S; trailing where S divides T; linspace only where S = T (below)."""
    options, config, step_options = CLIPPING[clipping]
    schedule = SCHEDULES[name][0]
    for spacing, steps in (("leading", 10), ("trailing", 10), ("leading", 7)):
        tau = ddim.timesteps(1000, steps, spacing)
        if steps == 10:  # one compiled function for both spacings and every eta
            if spacing == "leading":
                apply_fn = ddim.predicts(lambda _, x, t: ours(x, t), prediction, **options)
                sampler = ddim.make_sampler(ddim.Model(apply_fn, None, schedule), tau)
        elif (prediction, clipping) != ("eps", "none"):
            continue
        for eta in (0.0, 0.5, 1.0):
            got = sampler(jnp.asarray(X), KEY, eta=eta, tau=tau)
            scheduler = peer(name, spacing, prediction, **config)
            assert_close(got, run_peer(scheduler, steps, eta, **step_options))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_difference_previous_step_is_computed_not_walked(name, prediction):
    """It goes to t − T//S; the network is then called at another t than x was brought to."""
    schedule = SCHEDULES[name][0]
    for spacing, steps in (("linspace", 10), ("trailing", 7)):
        tau = ddim.timesteps(1000, steps, spacing)
        theirs = run_peer(peer(name, spacing, prediction, clip_sample=False), steps)
        pairs = [(t, max(t - 1000 // steps, 0)) for t in reversed(tau.tolist())]
        assert_close(walk(schedule, pairs, prediction=prediction), theirs)
        right = ddim.sample(ddim.predicts(ours, prediction), jnp.asarray(X), schedule, tau)
        assert_differs(right, theirs)


def test_linspace_agrees_where_every_step_is_visited():
    schedule = SCHEDULES["linear"][0]
    got = ddim.sample(ours, jnp.asarray(X), schedule, ddim.timesteps(1000, 1000, "linspace"))
    assert_close(got, run_peer(peer(spacing="linspace", clip_sample=False), 1000), 5e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_tau_is_its_timesteps_plus_one(spacing):
    scheduler = peer(spacing=spacing)
    for steps in (2, 3, 7, 10, 20, 50, 100, 250, 333, 1000):
        scheduler.set_timesteps(steps)
        expected = 1 + scheduler.timesteps.numpy()[::-1]
        np.testing.assert_array_equal(ddim.timesteps(1000, steps, spacing), expected)


def test_difference_linspace_of_one_step_starts_at_the_clean_end():
    scheduler = peer(spacing="linspace")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [0]
    assert ddim.timesteps(1000, 1, "linspace").tolist() == [1000]


def test_difference_set_alpha_to_one_false_stops_at_t_1():
    schedule, tau = SCHEDULES["linear"][0], ddim.timesteps(1000, 10, "trailing")
    scheduler = peer(spacing="trailing", clip_sample=False, set_alpha_to_one=False)
    theirs = run_peer(scheduler, 10)
    assert_close(walk(schedule, zip(tau[::-1], [*tau[-2::-1], 1])), theirs)
    assert_differs(ddim.sample(ours, jnp.asarray(X), schedule, tau), theirs)


def test_difference_clipping_does_not_rederive_eps_by_default():
    schedule, tau = SCHEDULES["linear"][0], ddim.timesteps(1000, 10, "leading")
    clipped = ddim.predicts(ours, x0_fn=ddim.clip_x0(1.0))
    got = ddim.sample(clipped, jnp.asarray(X), schedule, tau)
    assert_differs(got, run_peer(peer(), 10))


@pytest.mark.parametrize("name", SCHEDULES)
def test_difference_its_alpha_bar_is_float32(name):
    """ᾱ agrees; 1 − ᾱ, which every step uses, has lost digits near t = 0."""
    schedule, betas = SCHEDULES[name]
    theirs = DDIMScheduler(beta_schedule=name, **betas).alphas_cumprod
    assert theirs.dtype == torch.float32
    exact = np.asarray(schedule.alpha_bar)[1:]
    np.testing.assert_allclose(theirs.numpy(), exact, rtol=3e-4, atol=3e-6)
    lost = np.abs((1 - theirs).numpy() / (1 - exact) - 1)
    assert lost[0] > 1e-5
    kept = -np.expm1(np.asarray(schedule.log_alpha_bar, np.float32)[1:])
    assert np.abs(kept / (1 - exact) - 1).max() < 1e-6


def test_dynamic_thresholding():
    """Its default sample_max_value = 1 makes it a plain clip: a difference."""
    schedule, tau = SCHEDULES["linear"][0], ddim.timesteps(1000, 10, "leading")
    options = {"x0_fn": ddim.dynamic_threshold(0.9), "rederive_eps": False}
    got = ddim.sample(ddim.predicts(ours, **options), jnp.asarray(X), schedule, tau)
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9}
    theirs = run_peer(peer(**config, sample_max_value=1e9), 10)
    assert_close(got, theirs)
    np.testing.assert_array_equal(run_peer(peer(**config), 10), run_peer(peer(), 10))


def test_zero_terminal_snr_with_v_prediction():
    schedule = ddim.rescale_zero_terminal_snr(SCHEDULES["scaled_linear"][0])
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", timestep_spacing="trailing", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, clip_sample=False, **SCHEDULES["scaled_linear"][1],
    )  # fmt: skip
    np.testing.assert_allclose(scheduler.alphas_cumprod, schedule.alpha_bar[1:], atol=1e-5)
    scheduler.alphas_cumprod = torch.tensor(np.asarray(schedule.alpha_bar)[1:])
    tau = ddim.timesteps(1000, 10, "trailing")
    got = ddim.sample(ddim.predicts(ours, "v"), jnp.asarray(X), schedule, tau)
    assert_close(got, run_peer(scheduler, 10))


@pytest.mark.parametrize(
    ("config", "prediction", "total"),
    [({}, "eps", 172.0067), ({"beta_start": 0.01}, "eps", 149.8295), ({}, "v", 52.5302)],
)
def test_the_golden_sums_are_the_real_schedulers(config, prediction, total):
    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type=PREDICTIONS[prediction],
        **({"beta_start": 1e-4, "beta_end": 0.02} | config),
    )  # fmt: skip
    x = (np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4) / 768).transpose(3, 0, 1, 2)
    out = run_peer(scheduler, 10, x=x, denoise=lambda x, i: x * i / (i + 1))
    assert np.abs(out).sum() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_encoding_agrees_with_the_inverse_scheduler(name, spacing):
    tau = ddim.timesteps(1000, 10, spacing)
    scheduler = peer(name, spacing, kind=DDIMInverseScheduler, clip_sample=False)
    got = encode(ours, jnp.asarray(X), SCHEDULES[name][0], tau, eps_at="target")
    assert_close(got, run_peer(scheduler, 10))


def test_difference_the_inverse_scheduler_clips_unless_told_not_to():
    theirs = run_peer(peer(kind=DDIMInverseScheduler), 10)
    tau = ddim.timesteps(1000, 10, "leading")
    assert_differs(encode(ours, jnp.asarray(X), SCHEDULES["linear"][0], tau), theirs)


def test_difference_the_inverse_scheduler_trailing_steps_do_not_meet():
    """For S that does not divide T it comes from t − T//S, where the last step did not end."""
    tau = ddim.timesteps(1000, 7, "trailing")
    scheduler = peer(spacing="trailing", kind=DDIMInverseScheduler, clip_sample=False)
    theirs = run_peer(scheduler, 7)
    assert_differs(encode(ours, jnp.asarray(X), SCHEDULES["linear"][0], tau), theirs)


def test_difference_the_inverse_scheduler_converts_predictions_at_another_t_than_the_networks():
    """It reads v and x̂_0 as made at s, though the network was called at t: the one function ε(x, t)
    then depends on what the network predicts, and x̂_0 at s = 0 divides by zero."""
    schedule = SCHEDULES["linear"][0]
    tau = ddim.timesteps(1000, 10, "trailing")
    alpha_bar = np.asarray(schedule.alpha_bar)

    def v_of(x, i):  # the v-network of the same ε
        a = alpha_bar[i + 1]
        eps = network(x, i)
        return np.sqrt(a) * eps - np.sqrt(1 - a) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a)

    config = {"spacing": "trailing", "kind": DDIMInverseScheduler, "clip_sample": False}
    as_eps = run_peer(peer(**config), 10)
    assert_differs(run_peer(peer(prediction="v", **config), 10, denoise=v_of), as_eps)
    root = jnp.asarray(alpha_bar, jnp.float32)

    def ours_v(x, t):
        a = root[t].reshape(-1, 1, 1, 1)
        eps = ours(x, t)
        return jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)

    assert_close(encode(ddim.predicts(ours_v, "v"), jnp.asarray(X), schedule, tau), as_eps, 1e-3)
    assert not np.isfinite(run_peer(peer(prediction="x_0", **config), 10)).all()
    assert np.isfinite(encode(ddim.predicts(ours, "x_0"), jnp.asarray(X), schedule, tau)).all()
