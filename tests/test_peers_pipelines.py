"""`model.sampler(steps)` beside what diffusers draws with the same scheduler_config.json."""

import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.weights import load_model, save_diffusers
from ddim_jax.weights.diffusers_scheduler import SCHEDULERS, schedule_config
from tests import recipes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's imports
    why = "needs the peers extra: pip install 'ddim_jax[peers]'"
    torch = pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)
    from diffusers.schedulers import scheduling_ddpm

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def theirs(settings, steps, pipeline=None, eta=0.0):
    """The loop of their pipelines, in float32, with our x_T and z."""
    model = recipes.model_of(settings, pipeline)
    name = settings["_class_name"]
    if pipeline in ("DDIMPipeline", "PNDMPipeline"):
        name = pipeline.replace("Pipeline", "Scheduler")
    scheduler = getattr(diffusers, name).from_config(settings)
    scheduler.set_timesteps(steps)
    x, kind = torch.tensor(recipes.X), model.prediction.kind
    alpha_bar = np.asarray(model.schedule.alpha_bar)
    if name == "EulerDiscreteScheduler":
        x = x * scheduler.init_noise_sigma
    for i in scheduler.timesteps:
        i = int(i)
        z = torch.tensor(np.asarray(recipes.noise(i + 1)))
        options = {"DDIMScheduler": {"eta": eta, "variance_noise": z if eta else None}}
        if settings.get("algorithm_type", "").startswith("sde"):
            options[name] = {"variance_noise": z}
        scheduling_ddpm.randn_tensor = lambda *_, z=z, **__: z
        a, b = (float(np.sqrt(v)) for v in (alpha_bar[i + 1], 1 - alpha_bar[i + 1]))
        seen = x
        if name == "EulerDiscreteScheduler":
            i = torch.tensor(float(i))
            seen = scheduler.scale_model_input(x, i)
        out = recipes.output(torch, kind, a, b, torch.tensor(float(i)), seen)
        if settings.get("variance_type") == "learned_range":
            out = torch.cat([out, recipes.share(torch, torch.tensor(float(i)), x)], 1)
        x = scheduler.step(out, i, x, **options.get(name, {})).prev_sample
    return x.numpy()


def ours(settings, steps, pipeline=None, eta=None):
    sampler = recipes.model_of(settings, pipeline).sampler(steps, eta=eta)
    return np.asarray(sampler(jnp.asarray(recipes.X), recipes.KEY))


def error(settings, steps, pipeline=None, eta=0.0):
    expected = theirs(settings, steps, pipeline, eta)
    assert np.isfinite(expected).all()
    got = ours(settings, steps, pipeline, eta or None)
    return np.abs(got - expected).max() / max(1, np.abs(expected).max())


V, X_0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
BETAS = np.linspace(2e-4, 0.03, 500).tolist()
TRAINED = {"trained_betas": BETAS, "num_train_timesteps": 500}
TO_FIRST = {"set_alpha_to_one": False}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2}
DDPM, DDIM, PNDM = "DDPMScheduler", "DDIMScheduler", "PNDMScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
DEIS, EULER = "DEISMultistepScheduler", "EulerDiscreteScheduler"
# float32 there, with 1 − ᾱ off by 1e-4 near t = 1; another recipe differs by 5e-3 and more.
TOLERANCE = 2e-4


@pytest.mark.parametrize(
    ("name", "settings", "steps", "pipeline"),
    [
        (DDPM, {}, 10, "DDPMPipeline"),
        (DDPM, {"timestep_spacing": "linspace", **V}, 7, None),
        (DDPM, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, 7, None),
        (DDPM, {"variance_type": "fixed_small_log", "beta_schedule": "sigmoid"}, 7, None),
        (DDPM, {**ZERO, **V}, 10, None),
        (DDPM, DYNAMIC | X_0, 10, None),
        (DDPM, {"variance_type": "fixed_large", "beta_schedule": "scaled_linear"}, 10, None),
        (DDPM, {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"}, 10, None),
        (DDPM, {}, 10, "DDIMPipeline"),
        (DDIM, {"clip_sample": False}, 7, "DDIMPipeline"),
        (DDIM, {"clip_sample_range": 0.7, "beta_schedule": "squaredcos_cap_v2"}, 10, None),
        (DDIM, DYNAMIC, 10, None),
        (DDIM, TO_FIRST, 10, None),
        (DDIM, {**TO_FIRST, "steps_offset": 1, "clip_sample": False, **V}, 10, None),
        (DDIM, {**ZERO, **X_0}, 10, None),
        (DDIM, {**TRAINED, "timestep_spacing": "trailing"}, 10, None),
        (PNDM, {}, 10, "PNDMPipeline"),
        (PNDM, {"steps_offset": 1, "set_alpha_to_one": True}, 10, None),
        (PNDM, {"skip_prk_steps": True, "timestep_spacing": "trailing"}, 10, None),
        (DPM, {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"}, 8, "DDPMPipeline"),
        (DPM, {"rescale_betas_zero_snr": True, **V}, 8, None),
        (DPM, {"euler_at_final": True, "solver_order": 3, "steps_offset": 1}, 16, None),
        (DPM, {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}, 8, None),
        (DPM, {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}, 1, None),
        (DPM, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 1, None),
        (UNIPC, {"use_karras_sigmas": True, "solver_order": 3, **TRAINED}, 8, None),
        (UNIPC, {**ZERO, **V}, 8, None),
        (EULER, {}, 10, None),
        (EULER, {"timestep_spacing": "leading", "steps_offset": 1, **V}, 7, None),
    ],
)  # fmt: skip
def test_named_recipes(name, settings, steps, pipeline):
    assert error({"_class_name": name, **settings}, steps, pipeline) < TOLERANCE


def test_ddim_with_noise():
    settings = {"_class_name": DDIM, "timestep_spacing": "trailing", **TO_FIRST}
    assert error(settings, 10, "DDIMPipeline", eta=0.7) < TOLERANCE


CHOICES = {
    DDPM: {"variance_type": ["fixed_small", "fixed_large", "fixed_small_log", "learned_range"]},
    DDIM: {"set_alpha_to_one": [True, False]},
    PNDM: {"skip_prk_steps": [True, False], "set_alpha_to_one": [True, False]},
    DPM: {
        "solver_order": [1, 2, 3],
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
        "solver_type": ["midpoint", "heun"],
        "lower_order_final": [True, False],
        "euler_at_final": [True, False],
        "final_sigmas_type": ["zero", "sigma_min"],
        "use_karras_sigmas": [False, False, True],
        "use_lu_lambdas": [False, False, True],
        "use_exponential_sigmas": [*[False] * 9, True],
    },
    UNIPC: {
        "solver_order": [1, 2, 3],
        "solver_type": ["bh1", "bh2"],
        "predict_x0": [*[True] * 5, False],
        "disable_corrector": [[], [0, 2]],
        "final_sigmas_type": ["zero", "sigma_min"],
        "lower_order_final": [*[True] * 4, False],
        "use_karras_sigmas": [False, True],
    },
    DEIS: {
        "solver_order": [1, 2, 3],
        "lower_order_final": [True, False],
        "use_karras_sigmas": [False, True],
        "use_beta_sigmas": [*[False] * 9, True],
    },
    EULER: {"final_sigmas_type": ["zero", "sigma_min"], "use_karras_sigmas": [False, False, True]},
}


def drawn(rng):
    """(settings, S) over all classes and switches that are read, and some that are not."""

    def pick(values):
        return values[rng.integers(len(values))]

    name = pick(list(CHOICES))
    settings = {
        "_class_name": name,
        "beta_schedule": pick(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_end": pick([0.02, 0.03]),
        "prediction_type": pick(["epsilon", "sample", "v_prediction"]),
        "timestep_spacing": pick(["leading", "trailing", "linspace"]),
        "steps_offset": pick([0, 1]),
        "thresholding": pick([False, False, True]),
        "sample_max_value": pick([1.0, 1.2]),
        "rescale_betas_zero_snr": pick([False, False, True]),
        "clip_sample": pick([False, True]),
        **{field: pick(values) for field, values in CHOICES[name].items()},
    }
    return settings, pick([4, 5, 10])


def known_difference(settings, steps):
    """Where diffusers' own result is not what its settings say; each has a test below."""
    name, spacing = settings["_class_name"], settings["timestep_spacing"]
    if name in (DDIM, PNDM) and spacing == "linspace":
        return "its previous step is not the next of τ"
    zero = settings["rescale_betas_zero_snr"]
    if zero and settings["prediction_type"] == "epsilon":
        return "ε says nothing at ᾱ = 0"
    ends = settings.get("final_sigmas_type") == "zero"
    if name == UNIPC and settings["solver_type"] == "bh1" and ends:
        return "B(h) is infinite in the last step"
    cosine = settings["beta_schedule"] == "squaredcos_cap_v2"
    if name == DEIS and cosine and settings["use_karras_sigmas"]:
        return "σ from 20 000 in float32, and t that repeat"
    late = spacing != "leading" or settings["steps_offset"]
    if settings.get("variance_type") == "learned_range" and late:
        return "noise in the last step"
    return None


def test_drawn_settings_agree_or_are_refused_by_name():
    rng, counts = np.random.default_rng(7), {"equal": 0, "refused": 0, "different": 0}
    wrong = []
    while sum(counts.values()) < 150:
        settings, steps = drawn(rng)
        if known_difference(settings, steps):
            counts["different"] += 1
            continue
        if refusal := refused(settings, steps):
            named = any(f in refusal for f in settings) or "the network predicts" in refusal
            counts["refused"] += named
            wrong += [] if named else [refusal]
        elif (off := error(settings, steps)) < 1e-3:
            counts["equal"] += 1
        else:
            wrong.append((off, settings, steps))
    print(counts)  # {'equal': 61, 'refused': 44, 'different': 45}
    assert not wrong, wrong
    assert counts["equal"] >= 50
    assert counts["refused"] >= 30


def refused(settings, steps):
    try:
        recipes.model_of(settings).sampler(steps)
    except ValueError as error:
        return str(error)
    return ""


def differs(name, settings, steps, at_least=1e-3):
    assert error({"_class_name": name, **settings}, steps) > at_least


@pytest.mark.parametrize("name", [DDIM, PNDM])
def test_difference_previous_step_is_computed_not_walked(name):
    """They step to t − T//S, but call the network at the next of τ."""
    differs(name, {"timestep_spacing": "linspace"}, 10)
    differs(name, {"timestep_spacing": "trailing"}, 7)


def test_difference_a_learned_variance_adds_noise_in_the_last_step():
    settings = {"variance_type": "learned_range", "timestep_spacing": "trailing"}
    differs(DDPM, settings, 10)


def test_difference_of_runge_kutta_where_half_a_step_is_no_step():
    """At odd T//S the state is brought to one t and the network is called at the next: little."""
    settings = {"_class_name": PNDM}
    assert error(settings, 10) < TOLERANCE < error(settings, 8)


@pytest.mark.parametrize(
    ("name", "settings", "drawn_here"),
    [
        (DDPM, {"variance_type": "fixed_large_log"}, False),  # the root of a logarithm
        (UNIPC, {"solver_type": "bh1"}, True),  # B(h) = −∞ in the last step, times 0
        (UNIPC, {"lower_order_final": False}, False),  # a line to λ = ∞
        (DDIM, ZERO, False),  # ε at ᾱ = 0
    ],
)
def test_difference_theirs_is_not_finite(name, settings, drawn_here):
    settings = {"_class_name": name, **settings}
    assert not np.isfinite(theirs(settings, 5)).all()
    assert bool(refused(settings, 5)) != drawn_here


def test_difference_a_solver_begins_at_the_second_of_two_equal_t():
    settings = {
        "_class_name": DEIS,
        "use_karras_sigmas": True,
        "beta_schedule": "squaredcos_cap_v2",
    }
    scheduler = diffusers.DEISMultistepScheduler.from_config(settings)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    with pytest.raises(IndexError):
        theirs(settings, 10)
    assert np.isfinite(ours(settings, 10)).all()


def test_schedules_of_every_class():
    """Their ᾱ is float32, and of the solvers 2⁻²⁴ at T where ours is 0."""
    for name in SCHEDULERS:
        for settings in ({}, TRAINED, {"rescale_betas_zero_snr": True, **V}):
            settings = {"_class_name": name, **settings}
            got = schedule_config(settings)[0].build().alpha_bar[1:]
            expected = getattr(diffusers, name).from_config(settings).alphas_cumprod.numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=5e-6, err_msg=name)


def unet_folder(path, pipeline, scheduler, out_channels=3):
    """A pipeline of their own, with weights that are nowhere 0, saved as they save it."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, out_channels=out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    made = getattr(diffusers, pipeline)(network.eval(), scheduler)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(path)
    return made


@pytest.mark.parametrize(
    ("pipeline", "name", "settings", "steps"),
    [
        ("DDPMPipeline", DDPM, {}, 8),
        ("DDPMPipeline", DDPM, {"variance_type": "learned_range", **V}, 8),
        ("DDIMPipeline", DDPM, {"beta_schedule": "squaredcos_cap_v2"}, 8),
        ("DDIMPipeline", DDIM, {"clip_sample": False, **ZERO, **V}, 8),
        ("PNDMPipeline", PNDM, {}, 5),
        ("DDPMPipeline", DPM, {"solver_order": 3, "thresholding": True}, 8),
        ("DDPMPipeline", DPM, {"algorithm_type": "sde-dpmsolver++", "thresholding": True}, 8),
        ("DDPMPipeline", DDPM, {**TRAINED, **X_0, "steps_offset": 1}, 8),
    ],
)
def test_whole_pipelines_of_a_network(tmp_path, monkeypatch, pipeline, name, settings, steps):
    """Folder, network and sampler of theirs beside ours, and the folder that we write of it."""
    scheduler = getattr(diffusers, name)(**settings)
    learned = settings.get("variance_type") == "learned_range"
    theirs = unet_folder(tmp_path / "theirs", pipeline, scheduler, 6 if learned else 3)
    model = load_model(tmp_path / "theirs")
    save_diffusers(tmp_path / "ours", model)
    written = getattr(diffusers, pipeline).from_pretrained(tmp_path / "ours")
    written.set_progress_bar_config(disable=True)
    assert type(written.scheduler) is type(theirs.scheduler)
    x_T = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    sampler = model.sampler(steps)
    got = np.asarray(sampler(jnp.asarray(x_T), recipes.KEY))
    for pipe in (theirs, written):
        images = drawn_by(pipe, x_T, steps, monkeypatch)
        np.testing.assert_allclose(np.clip(got / 2 + 0.5, 0, 1), images, rtol=0, atol=1e-3)
    assert (
        load_model(tmp_path / "ours").facts["sampling"].items()
        >= {**{"_class_name": type(theirs.scheduler).__name__, "_pipeline": pipeline}}.items()
    )
    assert images.std() > 0.05


def drawn_by(pipe, x_T, steps, monkeypatch):
    """The images of a pipeline whose random numbers are our x_T and z."""
    pipe.scheduler.set_timesteps(steps)
    times = pipe.scheduler.timesteps.tolist()
    numbers = iter([x_T, *(np.asarray(recipes.noise(i + 1, x_T.shape)) for i in times)])
    randn = lambda *_, **__: torch.tensor(next(numbers).transpose(0, 3, 1, 2))  # noqa: E731
    for part in (pipe, pipe.scheduler):
        module = sys.modules[type(part).__module__]
        monkeypatch.setattr(module, "randn_tensor", randn, raising=False)
    return pipe(batch_size=len(x_T), num_inference_steps=steps, output_type="np").images
