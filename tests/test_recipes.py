"""scheduler_config.json as a recipe: numbers that diffusers computed, and settings refused by name.

What the numbers are is said in data/make_recipes.py, beside which they lie.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.weights.diffusers_methods import pndm
from ddim_jax.weights.diffusers_recipe import recipe
from ddim_jax.weights.diffusers_scheduler import (
    SCHEDULERS,
    sampling_facts,
    schedule_config,
    whole_scheduler,
)
from ddim_jax.weights.diffusers_settings import SAMPLERS
from tests import recipes

REFERENCES = np.load(pathlib.Path(__file__).parent / "data" / "recipes.npz")
CASES = [json.loads(text) for text in REFERENCES["cases"]]
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: CASES[i]["name"])
def test_the_images_of_diffusers(i):
    """In float32 there too; its ᾱ of float32 has lost 1e-4 of 1 − ᾱ near t = 1."""
    case = CASES[i]
    sampler = recipes.model_of(case["settings"], case["pipeline"]).sampler(case["steps"])
    got = np.asarray(sampler(jnp.asarray(recipes.X), recipes.KEY))
    expected = REFERENCES["images"][i]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_a_model_without_a_recipe_is_drawn_by_ddim():
    model = ddim.Model(ddim.predicts(lambda w, x, t: w * x), 0.5, ddim.linear_schedule(1000))
    x_T = jnp.ones((1, 2))
    sampler = model.sampler(5)
    tau = ddim.timesteps(1000, 5)
    np.testing.assert_array_equal(sampler(x_T), ddim.make_sampler(model, tau)(x_T))
    np.testing.assert_array_equal(sampler(x_T), model.sampler(tau=tau)(x_T))
    with pytest.raises(ValueError, match="needs key"):
        model.sampler(5, eta=1.0)(x_T)
    for wrong, says in (
        ({"steps": 5, "tau": tau}, "give steps or tau"),
        ({"eta": 0.0, "method": ddim.ddim()}, "give eta or a method"),
        ({"steps": 1001}, "need 1 <= S <= T"),
    ):
        with pytest.raises(ValueError, match=says):
            model.sampler(**wrong)


def test_what_the_model_or_the_caller_says_comes_first():
    settings = {"_class_name": "DDIMScheduler"}  # clips at 1
    model, x = recipes.model_of(settings), jnp.asarray(recipes.X)
    half = ddim.predicts(model, x0_fn=ddim.clip_x0(0.5))
    assert jnp.abs(half.sampler(4)(x)).max() == 0.5 < jnp.abs(model.sampler(4)(x)).max() <= 1
    tau = recipe(settings).tau(model.schedule, 4)
    clipped = ddim.predicts(model, x0_fn=ddim.clip_x0(1.0), rederive_eps=False)
    for given, how in (({"eta": 0.3}, {"eta": 0.3}), ({"method": ddim.pf_euler()},) * 2):
        got = model.sampler(4, **given)(x, recipes.KEY)
        np.testing.assert_array_equal(got, ddim.make_sampler(clipped, tau, **how)(x, recipes.KEY))


@pytest.mark.parametrize(
    ("pipeline", "settings", "steps", "name"),
    [
        ("DDPMPipeline", {"_class_name": DPM}, 1000, DPM),
        ("DDIMPipeline", {"_class_name": "DDPMScheduler"}, 50, "DDIMScheduler"),
        ("PNDMPipeline", {"_class_name": "DDIMScheduler"}, 50, "PNDMScheduler"),
        ("OwnPipeline", {"_class_name": "DDIMParallelScheduler"}, 50, "DDIMScheduler"),
        (None, {"clip_sample": True}, 50, "DDIMScheduler"),  # facts of 2026's first files
    ],
)
def test_pipelines_have_defaults(pipeline, settings, steps, name):
    how = recipe({**settings, "_pipeline": pipeline})
    assert (how.steps, how.name) == (steps, name)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type is 'learned'"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "is .fixed_large_log"),
        ("DDIMScheduler", {"clip_sample": 1}, r"clip_sample is 1 \(read are: true, false\)"),
        ("DDIMScheduler", {"clip_sample_range": 0}, "clip_sample_range is 0"),
        ("DDIMScheduler", {"clip_sample_range": "1"}, "clip_sample_range is '1'"),
        ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing is 'even' .*'trailing'"),
        ("DDIMScheduler", {"steps_offset": -1}, "steps_offset is -1"),
        ("DDIMScheduler", {"steps_offset": None}, "steps_offset is None"),
        ("DDIMScheduler", {"set_alpha_to_one": "yes"}, "set_alpha_to_one is 'yes'"),
        ("DDIMScheduler", {"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio is 1.5"),
        ("DDIMScheduler", {"sample_max_value": []}, r"sample_max_value is \[\]"),
        ("DDIMScheduler", {"novel": 1}, "novel is unknown"),
        ("PNDMScheduler", {"skip_prk_steps": None}, "skip_prk_steps is None"),
        (DPM, {"algorithm_type": "sde-dpmsolver"}, r"algorithm_type is 'sde-dpmsolver' \(read"),
        (DPM, {"solver_order": 4}, "solver_order is 4"),
        (DPM, {"solver_order": True}, "solver_order is True"),
        (DPM, {"solver_type": "rk4"}, "solver_type is 'rk4'"),
        (DPM, {"use_exponential_sigmas": True}, "use_exponential_sigmas is True"),
        (DPM, {"use_beta_sigmas": True}, "use_beta_sigmas is True"),
        (DPM, {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        (DPM, {"final_sigmas_type": "small"}, "final_sigmas_type is 'small'"),
        (DPM, {"lambda_min_clipped": None}, "lambda_min_clipped is None"),
        (DPM, {"lambda_min_clipped": float("nan")}, "lambda_min_clipped is nan"),
        (DPM, {"variance_type": "fixed_small"}, "variance_type is 'fixed_small'"),
        (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order is 3 with"),
        (DPM, {"algorithm_type": "dpmsolver"}, "final_sigmas_type is 'zero' with 'dpmsolver'"),
        (DPM, {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"}, "use_lu_lambdas is"),
        (UNIPC, {"predict_x0": False}, "predict_x0 is False"),
        (UNIPC, {"disable_corrector": [-1]}, r"disable_corrector is \[-1\]"),
        (UNIPC, {"lower_order_final": False}, "lower_order_final is false"),
        (UNIPC, {"solver_p": {}}, "solver_p is {}"),
        (UNIPC, {"sigma_max": 80.0}, "sigma_max is 80.0"),
        ("DEISMultistepScheduler", {"algorithm_type": "none"}, "algorithm_type is 'none'"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "type is .continuous."),
        ("LMSDiscreteScheduler", {}, "how LMSDiscreteScheduler samples is not read, its noise sch"),
        ("DDIMInverseScheduler", {}, "how DDIMInverseScheduler samples .*DEISMultistepScheduler"),
        ("NovelScheduler", {}, r"how NovelScheduler samples is not read \(read are: DDPMScheduler"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(name, change, says):
    with pytest.raises(ValueError, match=f"^scheduler_config.json: .*{says}.*make_sampler"):
        recipe({"_class_name": name, **change})


def test_all_bad_settings_stand_in_one_message():
    settings = {"_class_name": DPM, "solver_order": 9, "solver_type": 3, "b": 1, "a": 1}
    with pytest.raises(ValueError, match="order is 9 .*; solver_type is 3 .*; a is unknown; b is"):
        recipe(settings)
    bad = {"_class_name": "DDIMScheduler", "beta_start": "x", "prediction_type": "flow_prediction"}
    with pytest.raises(ValueError, match="beta_start is 'x' .*; prediction_type is 'flow_predict"):
        schedule_config(bad)
    with pytest.raises(ValueError, match="the network predicts v, .*'eps'"):
        recipe({"_class_name": "PNDMScheduler"}, prediction="v")
    with pytest.raises(ValueError, match="eta = 0.5 goes with DDIMScheduler, .* by DDPMScheduler"):
        recipe({"_class_name": "DDPMScheduler"}, eta=0.5)


@pytest.mark.parametrize(
    ("name", "change", "steps", "says"),
    [
        ("DDIMScheduler", {}, 0, "must be an int in 1..T = 1..1000, got 0"),
        ("DDIMScheduler", {"steps_offset": 1}, 1000, "tau must lie in 1..T"),
        (DPM, {"timestep_spacing": "leading"}, 1000, "tau must increase strictly"),
        ("EulerDiscreteScheduler", {}, 8, "fractions of t for S = 8: take S - 1 a divisor of 999"),
        ("PNDMScheduler", {}, 3, "three Runge-Kutta steps and needs 4"),
    ],
)  # fmt: skip
def test_too_many_or_too_few_steps(name, change, steps, says):
    model = recipes.model_of({"_class_name": name, **change})
    with pytest.raises(ValueError, match=says):
        model.sampler(steps)
    zero = ddim.rescale_zero_terminal_snr(ddim.linear_schedule(1000))
    with pytest.raises(ValueError, match="PNDM cannot start there"):
        pndm()(zero, [1, 250, 500, 1000])


@pytest.mark.parametrize("runge_kutta", [True, False])
def test_pndm_converges_with_order_two_at_least(runge_kutta):
    """To the flow of N(0, 1/4), x̄(σ) ∝ √(1/4 + σ²), from T down to t = 400."""
    schedule = ddim.linear_schedule(1000)
    exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
    with jax.enable_x64(True):
        x_T = np.array([[0.7, -1.1]])
        errors = []
        for gap in (20, 10, 5):
            tau = np.arange(1000, 399, -gap)[::-1]
            plan = pndm(runge_kutta)(schedule, tau)
            x, past = x_T, []
            for n in range(int((plan.t == 400).argmax())):  # Eq. 12 over the table's rows
                eps = np.asarray(exact(jnp.asarray(x), jnp.full(1, int(plan.t[n]))))
                past = [eps, *past]
                mean = sum(w * e for w, e in zip(plan.weights[n], past))
                c = [np.asarray(v)[n] for v in plan.steps[:4]]
                x = c[2] * (x - c[1] * mean) / c[0] + c[3] * mean
            a, a_T = schedule.alpha_bar[400], schedule.alpha_bar[1000]
            flow = np.sqrt((a / 4 + 1 - a) / (a_T / 4 + 1 - a_T))
            errors.append(np.abs(x / (x_T * flow) - 1).max())
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2], errors


def test_trained_betas_and_sigmoid_are_a_schedule_of_given_betas():
    betas = np.linspace(1e-4, 0.02, 1000).tolist()
    config, _ = schedule_config({"_class_name": "DDIMScheduler", "trained_betas": betas})
    assert (config.kind, config.num_steps) == ("betas", 1000)
    np.testing.assert_array_equal(config.build().alpha_bar, ddim.linear_schedule(1000).alpha_bar)
    again = ScheduleConfig.from_facts(json.loads(json.dumps(config.facts())))
    assert again == config
    sigmoid, _ = schedule_config({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"})
    assert sigmoid.given[500] == pytest.approx(0.5 * (1e-4 + 0.02), rel=1e-2)
    for wrong, says in (
        ({"kind": "betas"}, 'given goes with kind "betas"'),
        ({"given": (0.5,)}, 'given goes with kind "betas"'),
        ({"kind": "betas", "given": (0.5,), "num_steps": 2}, "given are 1 betas, and T is 2"),
        ({"kind": "betas", "given": (0.5,), "beta_end": 0.1}, "taken as they are"),
        ({"kind": "betas", "given": (0.5, 2.0), "num_steps": 2}, r"betas\[1\] = 2"),
    ):
        with pytest.raises(ValueError, match=says):
            ScheduleConfig(**wrong).build()


def test_a_recipe_goes_through_its_own_file():
    """Read, written and read again: the same schedule, prediction and recipe."""
    for name in SCHEDULERS:
        settings = {
            **{"_class_name": name, "num_train_timesteps": 50, "beta_end": 0.3, "novel": 3},
            **{field: setting.default for field, setting in SAMPLERS.get(name, {}).items()},
        }
        schedule, prediction = schedule_config(settings)
        facts = json.loads(json.dumps(sampling_facts(settings, "DDPMPipeline"), allow_nan=False))
        pipeline, written = whole_scheduler(facts, schedule, prediction)
        assert schedule_config(written) == (schedule, prediction)
        assert sampling_facts(json.loads(json.dumps(written)), pipeline) == facts | {
            "beta_schedule": written["beta_schedule"]
        }
    assert sampling_facts({"sample_max_value": float("nan")}) == {"sample_max_value": "nan"}
    zero = ScheduleConfig(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="PNDMScheduler of diffusers has no zero terminal SNR"):
        whole_scheduler({"_class_name": "PNDMScheduler"}, zero, "v")
