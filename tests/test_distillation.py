"""Progressive distillation: two steps in one, its loss, its runs, and how its models are drawn."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import ddim_jax as ddim
from ddim_jax.cli.distill import distill
from ddim_jax.cli.options import Processes, Source
from ddim_jax.cli.sample import sample
from ddim_jax.cli.ways import Drawing, Sampling
from ddim_jax.generation.settings import read_settings
from ddim_jax.generation.shards import generate
from ddim_jax.process.gamma import snr_plus_one, truncated_snr
from ddim_jax.storage.checkpoint import restore_config
from ddim_jax.training import averages, distilling, fit, parallel
from ddim_jax.training.distilling import RECIPE, halvings, taught_by
from ddim_jax.training.feeding import make_steps
from ddim_jax.training.presets import DataConfig
from ddim_jax.training.step import init_state, make_train_step
from ddim_jax.weights import load_model, save_diffusers, save_model
from tests.test_fine_tune import PLAIN, make_model
from tests.tiny import (
    SCHEDULE,
    affine,
    affine_params,
    assert_same,
    make_batch,
    make_config,
    make_dataset,
)

pytestmark = pytest.mark.usefixtures("one_device", "one_trace")
T = 1000
LINEAR = ddim.linear_schedule(T)
MEAN, STD = 0.3, 0.5  # of the Gaussian data


def gaussian_teacher(schedule, kind):
    """The exact denoiser of N(MEAN, STD²), predicting `kind`."""

    def network(x, t):
        alpha_bar = jnp.exp(schedule.log_alpha_bar)[t].reshape(-1, *(1,) * (x.ndim - 1))
        root, noise = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
        x_0 = MEAN + STD**2 * root * (x - root * MEAN) / (STD**2 * alpha_bar + 1 - alpha_bar)
        eps = (x - root * x_0) / noise
        return {"x_0": x_0, "eps": eps, "v": root * eps - noise * x_0}[kind]

    return ddim.predicts(network, kind)


def two_steps(schedule, x, t, mid, s):
    """Alg. 2 of Salimans & Ho in their own words, float64: z_t'' and x̃ for one t, and x (n,)."""
    log = np.asarray(schedule.log_alpha_bar, np.float64)
    alpha, sigma = np.exp(log / 2), np.sqrt(-np.expm1(log))

    def x_0(z, t):
        gain = STD**2 * alpha[t] / (STD**2 * alpha[t] ** 2 + sigma[t] ** 2)
        return MEAN + gain * (z - alpha[t] * MEAN)

    def ddim_step(z, t, s):
        return alpha[s] * x_0(z, t) + sigma[s] / sigma[t] * (z - alpha[t] * x_0(z, t))

    z = ddim_step(ddim_step(x, t, mid), mid, s)
    ratio = sigma[s] / sigma[t]
    return z, (z - ratio * x) / (alpha[s] - ratio * alpha[t])


TAUS = {
    "linear": ddim.timesteps(T, 8),
    "quadratic": ddim.timesteps(T, 8, "quadratic"),
    "logsnr": ddim.timesteps(T, 8, "logsnr", schedule=LINEAR),
    "all of the last": np.arange(T - 7, T + 1),
}


@pytest.mark.parametrize("kind", ["x_0", "eps", "v"])
def test_one_step_with_the_target_lands_where_two_of_the_exact_teacher_do(kind):
    teacher = gaussian_teacher(LINEAR, kind)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    target = jax.jit(partial(ddim.distillation_target, teacher, LINEAR))
    for name, tau in TAUS.items():
        t, mid, s = (
            jnp.asarray(ends)
            for ends in (ddim.halve_timesteps(tau, T), tau[::2], [0, *tau[1:-1:2]])
        )
        got = target(jnp.asarray(x), t, mid, s)
        for row in range(4):
            ends = tuple(int(end[row]) for end in (t, mid, s))
            wanted, x_0 = two_steps(LINEAR, x[row].astype(np.float64), *ends)
            one = ddim.ddim_step(LINEAR, x[row], got[row], ends[0], ends[2], prediction="x_0")
            # x_t'' is of order 1: a few ulp; an ulp of ε is one of x̂_0 times 1/√ᾱ, 160 at T
            close = 1e-6 if kind != "eps" else max(1e-6, 1e-7 / LINEAR.alpha_bar[ends[1]] ** 0.5)
            np.testing.assert_allclose(one, wanted, rtol=0, atol=close, err_msg=f"{name} {ends}")
            if kind != "eps":
                np.testing.assert_allclose(got[row], x_0, rtol=0, atol=2e-5)


def test_the_student_of_a_sampler_is_its_sampler():
    """The last step too, where SNR is infinite: x̃ along τ_S draws as the teacher does along τ."""
    tau, teacher = TAUS["quadratic"], gaussian_teacher(LINEAR, "v")
    student_tau = ddim.halve_timesteps(tau, T)
    assert student_tau.tolist() == [int(t) for i, t in enumerate(tau, 1) if i % 2 == 0]
    before = dict(zip(student_tau.tolist(), zip(tau[::2].tolist(), [0, *student_tau[:-1]])))
    table = np.zeros((T + 1, 2), np.int32)
    for t, ends in before.items():
        table[t] = ends
    student = ddim.predicts(
        lambda x, t: ddim.distillation_target(teacher, LINEAR, x, t, *jnp.asarray(table)[t].T),
        "x_0",
    )
    x_T = jax.random.normal(jax.random.key(1), (4, 6))
    drawn = jax.jit(lambda x: ddim.sample(teacher, x, LINEAR, tau))(x_T)
    halved = jax.jit(lambda x: ddim.sample(student, x, LINEAR, student_tau))(x_T)
    np.testing.assert_allclose(halved, drawn, rtol=0, atol=3e-6)


def table_student(params, x, t):
    """An affine function of x for each of four t."""
    i = t // 250 - 1
    return params["w"][i][:, None] * x + params["b"][i][:, None]


@pytest.mark.parametrize(("gamma", "student"), [("truncated-snr", "v"), ("one", "x_0")])
def test_an_affine_network_reaches_the_teachers_two_steps_within_its_loss(gamma, student):
    tau, teacher = TAUS["linear"], gaussian_teacher(LINEAR, "eps")
    table = ddim.GAMMAS[gamma](LINEAR, ddim.Prediction(student)) if gamma != "one" else None
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, 400))

    def loss(params, key):
        x_0 = MEAN + STD * jax.random.normal(jax.random.fold_in(key, 1), (64, 1))
        network = ddim.predicts(partial(table_student, params), student)
        return ddim.distillation_loss(network, teacher, LINEAR, tau, x_0, key, table)

    def update(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    params = {"w": jnp.zeros(4), "b": jnp.zeros(4)}
    keys = jax.random.split(jax.random.key(0), 400)
    with jax.numpy_dtype_promotion("standard"):  # of optax's Adam
        train = jax.jit(partial(jax.lax.scan, update))
        (params, _), losses = train((params, optimiser.init(params)), keys)
    last = float(losses[-40:].mean())
    assert last < 1e-4 < 1e-2 < losses[0]  # the exact student is one of these networks
    x_T = jax.random.normal(jax.random.key(3), (256, 1))
    network = ddim.predicts(partial(table_student, params), student)
    drawn = ddim.sample(network, x_T, LINEAR, ddim.halve_timesteps(tau, T))
    wanted = ddim.sample(teacher, x_T, LINEAR, tau)
    # A step moves x_t'' by at most the error of x̂_0, whose square is at most the loss (γ ≥ 1 on
    # x̂_0); a next step does not enlarge it for this teacher. Four steps, each a quarter of t.
    assert float(jnp.sqrt(((drawn - wanted) ** 2).mean())) <= 4 * 2 * last**0.5


@pytest.mark.parametrize("weight", [truncated_snr, snr_plus_one])
def test_the_weights_are_the_papers_whatever_is_predicted(weight):
    """Of x̂_0's squared error max(SNR, 1) and SNR + 1, said of ε, v or x_0."""
    schedule = ddim.schedule_from_alpha_bar([1.0, 0.9, 0.8, 0.2, 0.1])
    teacher, x_0 = gaussian_teacher(schedule, "x_0"), jnp.full((8, 2), 0.7)
    alpha_bar = np.array([0.8, 0.1])  # of the student's t, 2 and 4
    snr = alpha_bar / (1 - alpha_bar)
    wanted = {truncated_snr: np.maximum(snr, 1), snr_plus_one: snr + 1}[weight]

    def off_by(offset, kind):  # x̂_0 is x̃ + offset, where x̃ is learned
        def network(x, t):
            mid, s = t - 1, t - 2
            x_0 = ddim.distillation_target(teacher, schedule, x, t, mid, s) + offset
            ab = jnp.exp(schedule.log_alpha_bar)[t][:, None]
            eps = (x - jnp.sqrt(ab) * x_0) / jnp.sqrt(1 - ab)
            v = jnp.sqrt(ab) * eps - jnp.sqrt(1 - ab) * x_0
            return {"x_0": x_0, "eps": eps, "v": v}[kind]

        return ddim.predicts(network, kind)

    for kind in ("x_0", "eps", "v"):
        gamma = weight(schedule, ddim.Prediction(kind))

        def value(tau, offset, gamma=gamma, kind=kind):
            args = (teacher, schedule, tau, x_0, jax.random.key(0), gamma)
            return float(ddim.distillation_loss(off_by(offset, kind), *args))

        assert value([1, 2, 3, 4], 0.0) < 1e-12
        assert value([1, 2], 0.5) == pytest.approx(0.25 * wanted[0], rel=1e-5)
        both = value([1, 2, 3, 4], 0.5) / 0.25  # the mean over the eight t that were drawn
        share = (both - wanted[0]) / (wanted[1] - wanted[0]) * 8
        assert share == pytest.approx(round(share), abs=1e-3)
        assert 0 < round(share) < 8


def test_no_gradient_flows_into_the_teacher():
    def value(w):
        teacher = ddim.predicts(lambda x, t: w * x, "x_0")
        student = ddim.predicts(lambda x, t: 0.2 * x, "x_0")
        x_0, key = jnp.ones((2, 2)), jax.random.key(0)
        return ddim.distillation_loss(student, teacher, LINEAR, [500, 1000], x_0, key)

    assert jax.grad(value)(jnp.float32(0.5)) == 0


def bad(**changes):
    given = {"teacher": gaussian_teacher(LINEAR, "x_0"), "schedule": LINEAR, "tau": [500, 1000]}
    given |= {"student": gaussian_teacher(LINEAR, "v"), "x_0": jnp.ones((2, 2)), **changes}
    order = ("student", "teacher", "schedule", "tau", "x_0")
    return ddim.distillation_loss(*(given[name] for name in order), jax.random.key(0))


ZERO = ddim.schedule_from_alpha_bar([1.0, 0.5, 0.0])
CLIPPED = ddim.predicts(lambda x, t: x, "x_0", x0_fn=jnp.tanh, rederive_eps=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tau": [250, 500, 1000]}, "by twos, so their number must be even, got S = 3"),
        ({"tau": [1000, 500]}, "increas"),
        ({"tau": [500, 1001]}, r"1\.\.1000|1001"),
        ({"teacher": lambda x, t: x, "schedule": ZERO, "tau": [1, 2]}, "ᾱ|alpha_bar"),
        ({"teacher": CLIPPED}, "rederive_eps=True, or without x0_fn"),
        ({"x_0": jnp.ones((2, 2), jnp.int32)}, "float"),
    ],
)
def test_bad_input_of_the_loss_is_named(changes, says):
    with pytest.raises((ValueError, TypeError), match=says):
        bad(**changes)


# Runs, with a network of two numbers.


def taught(directory, updates, weight=0.9, **options):
    teacher = ddim.Model(
        ddim.predicts(affine, "eps"), {**affine_params(), "w": jnp.float32(weight)}, SCHEDULE
    )
    facts = {"model": {"kind": "affine"}, "tau": [5, 10]}
    return fit(
        affine, affine_params(), SCHEDULE, make_dataset(), make_config(num_updates=updates),
        directory, facts=facts, loss=taught_by(teacher, [2, 5, 7, 10]), progress=False,
        say=lambda text: None, **options,
    )  # fmt: skip


def test_a_student_resumes_bit_for_bit_and_learns_from_its_teacher(tmp_path):
    unbroken = taught(tmp_path / "whole", 8)
    taught(tmp_path / "cut", 4)
    assert_same(taught(tmp_path / "cut", 8, resume="must"), unbroken)
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    other = taught(tmp_path / "other", 2, weight=0.1)
    assert json.loads((tmp_path / "other" / "metrics.jsonl").read_text())["loss"] != losses[0][0]
    assert int(other.step) == 2
    assert restore_config(tmp_path / "cut" / "checkpoints", 8)["tau"] == [5, 10]


def test_all_stages_of_a_ladder_are_one_program_and_none_depends_on_it():
    config = make_config(cosine_decay=True)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    state, batch = init_state(affine_params(), config), make_batch(8)
    rows = {k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype) for k, v in batch.items()}

    def teacher(weight):
        params = {**affine_params(), "w": jnp.float32(weight)}
        return ddim.Model(ddim.predicts(affine, "eps"), params, SCHEDULE)

    def program(loss, updates):
        step = make_train_step(affine, SCHEDULE, dataclasses.replace(config, num_updates=updates))
        steps = make_steps(step, mesh, averages.leave)
        return steps.lower(state, [], {}, rows, loss, np.float32(updates)).as_text()

    stages = halvings([1, 3, 4, 6, 7, 8, 9, 10], 10)
    losses = [taught_by(teacher(i), tau, 4) for i, tau in enumerate(stages[:-1])]
    programs = {program(loss, updates) for loss, updates in zip(losses, (12, 12, 20))}
    assert len(programs) == 1
    x_0, key = jax.random.normal(jax.random.key(1), (64, 3)), jax.random.key(0)
    student = ddim.predicts(lambda x, t: 0.5 * x, "v")
    for i, tau in enumerate(stages[:-1]):
        of = (student, SCHEDULE, x_0, key, None)
        assert losses[i](*of) == taught_by(teacher(i), tau)(*of)
        network = ddim.predicts(partial(affine, teacher(i).params), "eps")
        plain = ddim.distillation_loss(student, network, SCHEDULE, tau, x_0, key)
        assert losses[i](*of) == plain
    with pytest.raises(ValueError, match="multiple of S/2 = 4, got 6"):
        taught_by(teacher(0), stages[0], 6)


# Models: each draws along its own τ.


def distilled(tau=(5, 10), **facts):
    model = make_model()
    return model._replace(facts={**model.facts, "tau": list(tau), **facts})


def test_a_distilled_model_draws_along_its_tau_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = distilled()
    assert (model.tau.tolist(), make_model().tau) == ([5, 10], None)
    x_T = ddim.initial_noise(jax.random.key(0), 2, model.image_shape)
    wanted = jax.jit(lambda p, x: ddim.sample(
        ddim.predicts(partial(model.apply_fn, p)), x, model.schedule, [5, 10]
    ))(model.params, x_T)  # fmt: skip
    sampler = model.sampler()
    np.testing.assert_allclose(sampler(x_T), wanted, atol=1e-6)  # of order 1, two steps
    assert not np.allclose(sampler(x_T, tau=[3, 10]), wanted, atol=1e-3)
    save_model("few.safetensors", model)
    assert load_model("few.safetensors").tau.tolist() == [5, 10]
    draw = partial(sample, "few.safetensors", source=Source(), num_images=2)
    draw(sampling=Drawing())
    drawn = tmp_path / "few-S2-eta0-seed0.png"
    with Image.open(drawn) as image:
        assert json.loads(image.text["ddim_jax"])["tau"] == "5,10"
        pixels = np.asarray(image)
    draw(sampling=Drawing(steps=2, as_stored=True), out=tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    generate(load_model("few.safetensors"), "set", 2, batch_size=2, shard_size=2, progress=False)
    assert read_settings("set")["tau"] == [5, 10]
    says = re.escape("distilled to S = 2, along tau = 5,10 by ddim with eta = 0: leave out steps")
    for way in ({"steps": 3}, {"eta": 0.5}, {"method": "ddpm"}, {"spacing": "quadratic"}):
        with pytest.raises(ValueError, match=says):
            draw(sampling=Drawing(**way), out=tmp_path / "no.png")
        with pytest.raises(ValueError, match=says):
            generate(model, "none", 2, batch_size=2, shard_size=2, **{"steps": 2, **way})
    for way in ({"steps": 3}, {"eta": 0.5}, {"method": ddim.ddpm()}):
        with pytest.raises(ValueError, match=says):
            model.sampler(**way)
    assert Sampling(tau="3,10").of(model).timesteps(model.schedule).tolist() == [3, 10]
    with pytest.raises(ValueError, match=r"distilled to the τ \[5, 10\], which a diffusers folder"):
        save_diffusers("folder", model)
    with pytest.raises(TypeError, match="only a distilled model has its own"):
        ddim.make_sampler(make_model())


# The command.


def run(model, out, source=Source(), processes=Processes(), **options):  # noqa: B008
    distill(model, source, processes, out, **options)


DIGITS = DataConfig("digits")
LEARNED = {"data": {"name": "digits", "split": "train", "transform": {"crop": [2, 0, 4, 8]}}}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Files of models that no step is made with."""
    folder = tmp_path_factory.mktemp("teachers")
    model = make_model()
    models = {
        "plain": model,
        "few": distilled((3, 5, 7, 10)),
        "odd": distilled((3, 5, 10)),
        "classes": make_model(dataclasses.replace(PLAIN, num_classes=3)),
        "nan": model._replace(params=jax.tree.map(lambda p: p * np.float32(np.nan), model.params)),
    }
    for name, each in models.items():
        save_model(folder / f"{name}.safetensors", each)
    (folder / "file").write_text("")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "begun" / "steps-2").mkdir(parents=True)
    (folder / "begun" / "steps-2" / "metrics.jsonl").write_text("{}\n")
    return folder


DATA = {"data": DataConfig("digits", crop=(2, 0, 4, 8))}


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("plain", {"steps": 0}, "--steps and --to must be at least 1, got 0 and 1"),
        ("plain", {"steps": 4, "to": 0}, "at least 1, got 4 and 0"),
        ("plain", {"steps": 6}, "S = 6 again and again does not lead to 1 .* or end at 3"),
        ("plain", {"steps": 4, "to": 4}, "S = 4 again and again does not lead to 4"),
        ("plain", {"steps": 16}, "10|16"),
        ("plain", {"steps": 4, "out": "file/x"}, "file is a file, not a folder"),
        ("plain", {"steps": 4, "out": "run", **DATA}, "is itself a run: choose a new folder"),
        ("plain", {"steps": 4, "out": "begun", **DATA}, "steps-2 already holds a run; resume it"),
        ("plain", {"steps": 4}, "does not say what it learned from: name it with --data.name"),
        ("plain", {"steps": 4, "data": DIGITS}, r"images \(4, 8, 1\), digits \(8, 8, 1\): name"),
        ("plain", {"steps": 4, "data": DataConfig("dogits")}, "dogits"),
        ("few", {"steps": 8}, r"draws in 4 steps, along \[3, 5, 7, 10\], and can be halved from"),
        ("few", {"spacing": "quadratic"}, "leave out --steps and --spacing"),
        ("odd", {}, "S = 3 again and again does not lead to 1"),
        ("nan", {"steps": 4, **DATA}, "weights are not finite"),
        ("classes", {"steps": 4, **DATA}, "for 3 classes, digits has 10"),
        ("missing", {"steps": 4}, "missing"),
    ],
)  # fmt: skip
def test_bad_input_of_the_command_is_named_before_any_work(teachers, model, options, says):
    options = {"out": "new", **options}
    out = teachers / options.pop("out")
    with pytest.raises((ValueError, OSError), match=says):
        run(str(teachers / f"{model}.safetensors"), out, **options)
    assert not (teachers / "new").exists()


def test_a_variance_is_not_distilled(tmp_path):
    config = dataclasses.replace(PLAIN, out_channels=2)
    save_model(tmp_path / "m.safetensors", make_model(config))
    with pytest.raises(ValueError, match="learned variance cannot be distilled"):
        run(str(tmp_path / "m.safetensors"), tmp_path / "out", steps=4, **DATA)


def test_there_is_one_config_or_one_for_each_stage(tmp_path):
    with pytest.raises(ValueError, match="got 3 configs for 2 stages"):
        distilling.distill(
            make_model(), [3, 5, 7, 10], make_dataset(), [RECIPE] * 3, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


SHORT = dataclasses.replace(
    RECIPE, batch_size=8, num_updates=4, log_every=2, checkpoint_every=2, sample_every=4
)


@pytest.mark.slow
def test_the_command_halves_twice_stops_and_resumes_to_the_bit(tmp_path, capsys):
    model = make_model()
    save_model(tmp_path / "m.safetensors", model._replace(facts={**model.facts, **LEARNED}))
    go = partial(run, str(tmp_path / "m.safetensors"), steps=4, train=SHORT)
    go(tmp_path / "whole")
    said = capsys.readouterr().out
    assert "4 steps to 2, 4 updates" in said
    assert "draw with: ddim-jax sample" in said
    go(tmp_path / "cut", to=2)
    go(tmp_path / "cut", resume="auto")
    for stage, tau in (("steps-2", [5, 10]), ("steps-1", [10])):
        whole, cut = (load_model(tmp_path / folder / stage) for folder in ("whole", "cut"))
        assert (whole.tau.tolist(), whole.prediction.kind) == (tau, "v")
        assert whole.config.dropout == 0.0
        assert_same(cut.params, whole.params)
        assert (tmp_path / "whole" / stage / "loss.png").stat().st_size > 1000
        assert len(list((tmp_path / "whole" / stage / "samples").iterdir())) == 1
    assert whole.facts["teacher_tau"] == [5, 10]
