"""Every experiment, run small: numbers against independent ones, resuming, refusing, the page."""

import dataclasses
import importlib
import inspect
import itertools
import json
import pathlib
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.networks import unet
from ddim_jax.pictures.images import to_model, to_uint8
from ddim_jax.sampling.clipping import clip_x0
from ddim_jax.sampling.plan import with_memory
from ddim_jax.training.presets import PRESETS
from ddim_jax.training.step import init_state, make_train_step
from experiments import (
    arguments,
    cifar10,
    claims,
    common,
    discrete,
    distillation,
    fig3,
    fig4,
    fig5,
    fig6,
    markdown,
    objectives,
    on_device,
    paper,
    paper_numbers,
    pipeline,
    provenance,
    report,
    solvers,
    stepping,
    table1,
    table2,
    table3,
)

TINY = {
    "table1": "--steps 2 5 --eta 0 hat --num-images 16 5=24 --batch-size 4 --seed 3",
    "table2": "--steps 2 5 --num-images 6 --exact-steps 5 --exact-samples 4 --max-iterations 40 "
    "--reach-steps 5 --reach-samples 6",
    "table3": "",
    "fig3": "--steps 2 --eta 0 hat --num-images 4 --batch-size 4 --clip",
    "fig4": "--steps 2 5 8 --num-images 4 --repeats 2",
    "fig5": "--steps 2 5 --num-images 8 --shown 3 --batch-size 4",
    "fig6": "--steps 5 --paths 3 --shown 2 --points 5",
    "discrete": "--steps 2 --num-images 40 --train-steps 2 --train-batch 8 --bound-images 6",
    "solvers": "--oracle --steps 2 3 --num-images 12 --fine-samples 4 --refine 2 --sweeps 1 "
    "--method ddim unipc-2 pf-euler --tau linear optimised refined",
    "objectives": "--objectives edm v-zero-snr --seeds 0 1 --updates 2 --steps 2 --num-images 8",
}
MAINS = {
    module.__name__.split(".")[1]: module.main
    for module in (table1, table2, table3, fig3, fig4, fig5, fig6, discrete, solvers, objectives)
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder in which every experiment was run, and their results by name."""
    folder, preset = tmp_path_factory.mktemp("results"), PRESETS["digits"]()
    network = dataclasses.replace(preset.model, multipliers=(1,))  # what `discrete` trains
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "digits", lambda: dataclasses.replace(preset, model=network))
        return folder, {
            name: MAINS[name]([*words.split(), "--out", str(folder / name)])
            for name, words in TINY.items()
        }


def samples(model, eta, steps, number, seed):
    """x_0 by the authors' own formulas, in NumPy around the network; keys as documented."""
    schedule, tau = model.schedule, 1000 * np.arange(1, steps + 1) // steps
    key, noise_key = jax.random.split(jax.random.key(seed))
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    draw = jax.vmap(lambda k: jax.random.normal(k, model.image_shape))
    x = np.asarray(draw(fold(key, jnp.arange(number, dtype=jnp.uint32))), np.float64)
    alpha_bar = np.exp(np.asarray(schedule.log_alpha_bar, np.float64))
    network = jax.jit(model.apply_fn)
    for t, s in zip(tau[::-1], np.append(tau[:-1][::-1], 0)):
        a, b = alpha_bar[t], alpha_bar[s]
        v = network(model.params, jnp.asarray(x, jnp.float32), jnp.full(number, t, jnp.int32))
        x_0 = np.sqrt(a) * x - np.sqrt(1 - a) * np.asarray(v, np.float64)
        if eta == "hat":  # the posterior mean of Ho et al., Eq. 7, at clipped x̂_0
            x_0 = np.clip(x_0, -1, 1)
            beta = 1 - a / b
            mean = (np.sqrt(b) * beta * x_0 + np.sqrt(a / b) * (1 - b) * x) / (1 - a)
            sigma = np.sqrt(beta) if s else 0.0
        else:
            sigma = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
            noise = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
            mean = np.sqrt(b) * x_0 + np.sqrt(1 - b - sigma**2) * noise
        z = 0.0
        if sigma:
            keys = fold(noise_key, jnp.arange(number, dtype=jnp.uint32))
            z = np.asarray(draw(jax.vmap(lambda k, t=t: jax.random.fold_in(k, t))(keys)))
        x = mean + sigma * z
    return np.clip(np.round((x + 1) * 127.5), 0, 255)


def frechet(x, y):
    """By scipy's matrix square root."""
    x, y = (v.reshape(len(v), -1) / 127.5 - 1 for v in (x, y))
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b + 1e-12 * np.eye(len(a))).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


@pytest.mark.slow
@pytest.mark.parametrize("eta", ["0", "hat"])
def test_table1_cells_are_what_a_numpy_loop_and_scipy_give(results, eta):
    cells = {(c["eta"], c["S"]): c for c in results[1]["table1"]["cells"]}
    model, data = ddim.load_model("digits"), load("digits").arrays()["image"].astype(float)
    for steps, number in ((2, 16), (5, 24)):
        cell = cells[eta, steps]
        drawn = samples(model, eta if eta == "hat" else float(eta), steps, number, seed=3)
        folder = results[0] / "table1" / "samples" / f"eta{eta}-S{steps}-linear"
        ours = np.concatenate([np.load(p) for p in sorted(folder.glob("*.npy"))])
        assert np.abs(ours - drawn).max() <= 1
        assert cell["distance"] == pytest.approx(frechet(drawn, data), rel=2e-3)
        assert (cell["name"], cell["num_images"]) == ("FD-pixels", number)
        assert 0 < cell["se"] < cell["distance"]


@pytest.mark.slow
def test_table1_has_a_floor_at_each_number_of_samples(results):
    floors = results[1]["table1"]["floors"]
    assert [f["num_images"] for f in floors] == [16, 24]
    images = load("digits").arrays()["image"].astype(float)
    odd = np.arange(1, len(images), 2)
    some = np.random.default_rng(3).permutation(odd)[:24]
    assert floors[1]["distance"] == pytest.approx(frechet(images[some], images[::2]), rel=1e-3)


@pytest.mark.slow
def test_quad_takes_the_steps_that_the_authors_visit(tmp_path):
    words = "--spacing quad --steps 100 --eta 0 --num-images 4 --batch-size 4"
    result = table1.main([*words.split(), "--out", str(tmp_path / "quad")])
    assert result["cells"][0]["network_calls"] == 96


@pytest.mark.slow
def test_clip_clips_every_row(results):
    model, tau = ddim.load_model("digits"), [500, 1000]
    key = jax.random.split(jax.random.key(0))[0]
    x_T = ddim.initial_noise(key, 4, model.image_shape)
    denoise = ddim.predicts(model.denoise, x0_fn=clip_x0(1.0))
    clipped = np.asarray(to_uint8(ddim.sample(denoise, x_T, model.schedule, tau)))
    (path,) = (results[0] / "fig3" / "samples" / "eta0-S2-linear").glob("*.npy")
    np.testing.assert_allclose(np.load(path).astype(int), clipped, atol=1)


@pytest.mark.slow
def test_table2_is_eq_13_up_and_down(results):
    result = results[1]["table2"]
    model, images = ddim.load_model("digits"), load("digits").arrays()["image"]
    alpha_bar = np.exp(np.asarray(model.schedule.log_alpha_bar, np.float64))
    sigma, network = np.sqrt((1 - alpha_bar) / alpha_bar), jax.jit(model.apply_fn)
    x_0 = images[np.random.default_rng(0).permutation(1797)[:6]] / 127.5 - 1

    def step(x, t, s, label):  # x at s → x at t, by ε at `label`
        label = max(label, 1)
        v = network(model.params, jnp.asarray(x, jnp.float32), jnp.full(len(x), label, jnp.int32))
        eps = np.sqrt(1 - alpha_bar[label]) * x + np.sqrt(alpha_bar[label]) * np.asarray(v)
        return np.sqrt(alpha_bar[t]) * (x / np.sqrt(alpha_bar[s]) + (sigma[t] - sigma[s]) * eps)

    tau = [0, 200, 400, 600, 800, 1000]
    for where, name, se in ((1, "error", "se"), (0, "source_error", "source_se")):
        x = x_0
        for pair in itertools.pairwise(tau):
            x = step(x, pair[1], pair[0], pair[where])
        for s, t in list(itertools.pairwise(tau))[::-1]:
            x = step(x, s, t, t)
        error = (((x - x_0) / 2) ** 2).mean(axis=(1, 2, 3))
        cell = result["cells"][1]
        assert cell[name] == pytest.approx(error.mean(), rel=1e-3)
        assert cell[se] == pytest.approx(error.std(ddof=1) / np.sqrt(6), rel=1e-3)
        reached = result["reach"][0]
        label = ("source", "target")[where]
        assert reached["t"] == tau[1:]
        assert reached[label][-1] == pytest.approx(cell[name], rel=1e-5)
        assert sorted(reached[label]) == list(reached[label])  # each step adds to it
    exact = result["exact"][0]
    assert exact["error"] < cell["error"]
    assert 0 <= exact["converged"] <= 1


def test_fig4_fits_a_line():
    x = np.array([10.0, 20, 50, 100])
    y = 0.25 + 0.5 * x + np.array([1, -1, 1, -1]) * 0.01
    fit, (coefficients, covariance) = fig4.line(x, y), np.polyfit(x, y, 1, cov=True)
    assert fit["seconds_per_step"] == pytest.approx(coefficients[0])
    assert fit["offset"] == pytest.approx(coefficients[1])
    assert fit["seconds_per_step_se"] == pytest.approx(np.sqrt(covariance[0, 0]))
    assert fit["offset_se"] == pytest.approx(np.sqrt(covariance[1, 1]))
    assert fit["r_squared"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.slow
def test_fig5_measures_agreement(results):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 9, 4, 4, 1)).astype(np.uint8)
    found = fig5.agreement(x, y)
    each = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, y)]
    assert found["correlation"] == pytest.approx(np.mean(each))
    squares = ((x / 255 - y / 255) ** 2).reshape(9, -1).mean(axis=1)
    assert found["mse"] == pytest.approx(squares.mean())
    what = [c["what"] for c in results[1]["fig5"]["cells"]]
    assert what == ["η = 0, linear", "η = 0, quadratic", "η = 1, linear", "other x_T"]


def test_fig6_measures_paths():
    paths = np.zeros((2, 3, 1, 1, 1))
    paths[:, :, 0, 0, 0] = [[0, 1, 4], [0, 5, 4]]  # the second goes too far and comes back
    found = fig6.measures(paths, np.array([0.0, 4.0]).reshape(2, 1, 1, 1))
    assert found["smooth_share"] == 0.5
    assert (found["rms_step"], found["rms_largest_step"]) == (2.5, 4)
    assert found["nearest"]["middle"][0] == 1.0
    assert (found["nearest"]["ends"][0], found["nearest"]["pixel mean"][0]) == (0.0, 2.0)


@pytest.mark.slow
def test_discrete_bound_and_baseline(results):
    """A trained network's bound lies near one bit per pixel at first, and its samples are two."""
    cells = results[1]["discrete"]["cells"]
    assert [c["S"] for c in cells["bounds"]] == [2]
    assert all(0 < c["bits"] < 2 for c in cells["bounds"])
    images = (load("digits").arrays()["image"] >= 128)[..., 0]
    train, held = images[np.arange(1797) % 5 != 0], images[::5][:6]
    white = (train.sum(axis=0) + 1) / (len(train) + 2)
    bits = -np.log2(np.where(held, white, 1 - white)).mean()
    assert cells["independent"]["bits"] == pytest.approx(bits)


@pytest.mark.slow
def test_solvers_choose_and_judge(results):
    result = results[1]["solvers"]
    cells = {(c["method"], c["tau"], c["S"]): c for c in result["cells"]}
    assert len(cells) == len(result["cells"]) == 3 * 3 + 3 * 2  # S = 3 is not refined
    assert cells["ddim", "refined", 2]["rms"] < cells["pf-euler", "linear", 2]["rms"]
    assert all(c["fine_samples"] == 4 and c["num_images"] == 12 for c in cells.values())
    assert [c["S"] for c in result["best"]] == [2, 3]
    for best in result["best"]:
        assert best["rms"] == min(c["rms"] for c in cells.values() if c["S"] == best["S"])


def as_eps(model):
    """The same network, which predicts v, saying ε = √ᾱ_t v + √(1 − ᾱ_t) x_t in its place."""

    def apply_fn(params, x, t):
        log = jnp.asarray(model.schedule.log_alpha_bar, jnp.float32)[t][:, None, None, None]
        return jnp.exp(log / 2) * model.apply_fn(params, x, t) + jnp.sqrt(-jnp.expm1(log)) * x

    return model._replace(apply_fn=apply_fn)


@pytest.mark.slow
def test_a_network_of_eps_gives_the_same_figures(results, tmp_path, monkeypatch):
    model = as_eps(ddim.load_model("digits"))
    monkeypatch.setattr(ddim, "load_model", lambda *args, **kwargs: model)
    monkeypatch.setattr(common, "stepper", stepping.stepper.__wrapped__)
    ours, other = ({}, {})
    for name in ("table2", "fig6"):
        by_eps = MAINS[name]([*TINY[name].split(), "--out", str(tmp_path / name)])
        for found, result in ((ours, by_eps), (other, results[1][name])):
            cells = result["cells"]
            found |= cells if name == "fig6" else cells[1]
    for key in ("error", "source_error", "rms_step", "rms_end_to_end"):
        assert ours[key] == pytest.approx(other[key], rel=1e-2)


EULERS = ("pf-euler", "adams-bashforth-2")


def test_solvers_take_every_prediction(tmp_path):
    args = arguments.parse("solvers", "", ["--batch-size", "4"], solvers.SMALL, **solvers.HELP)
    found = []
    for model in (ddim.load_model("digits"), as_eps(ddim.load_model("digits"))):
        experiment = common.Experiment("solvers", args)
        experiment.model = model
        bench = solvers._Bench(experiment)
        tau = np.array([200, 500, 1000])
        found.append([bench.solve(m, bench.latents("judge", 4), tau) for m in EULERS])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)
    assert np.std(found[0][0] - found[0][1]) > 1e-2


def test_plans_of_the_same_numbers_are_judged_once(tmp_path, monkeypatch):
    """At S = 2 the solvers of x̂_0 are DDIM, and here the optimised τ is the linear one."""
    judged = []

    def judge(bench, method, tau, steps):
        judged.append((method, tau.tolist()))
        return {"rms": 1.0, "rms_se": 0.1, "fine_samples": 4}

    monkeypatch.setattr(solvers._Bench, "judge", judge)
    monkeypatch.setattr(solvers._Bench, "optimised", lambda bench, s: {"tau": [500, 1000]})
    words = "--oracle --rms-only --steps 2 --num-images 4 --fine-samples 4 --method ddim "
    words += "dpm-solver-2 unipc-2 unipc-3 --tau linear quadratic optimised"
    result = solvers.main([*words.split(), "--out", str(tmp_path / "out")])
    taus = ([500, 1000], [250, 1000])
    assert judged == [("ddim", tau) for tau in taus]
    assert len({(c["method"], c["tau"]) for c in result["cells"]}) == 4 * 3
    schedule, x_T = ddim.linear_schedule(1000), jnp.linspace(-2.0, 2.0, 12).reshape(4, 3)
    model = ddim.Model(lambda w, x, t: jnp.tanh(w * x), 2.0, schedule)
    sampler = ddim.make_sampler(model, taus[0])
    both = [sampler(x_T, method=solvers._padded(m)) for m in ("ddim", "unipc-2")]
    assert (both[0] == both[1]).all()
    for name in ("unipc-2", EULERS[1]):  # a third call corrects; a memory of ε rounds differently
        plans = [solvers._padded(m)(schedule, [1, 500, 1000]) for m in ("ddim", name)]
        assert stepping.numbers(plans[0]) != stepping.numbers(plans[1])


@pytest.mark.slow
def test_results_say_where_they_come_from(results):
    folder, found = results
    for name, result in found.items():
        written = json.loads((folder / name / "result.json").read_text())
        assert written == json.loads(json.dumps(result))
        if name == "table3":
            assert (result["status"], "weights" in result["reason"]) == ("not run", True)
            continue
        assert result["command"].startswith(f"python -m experiments.{name} --")
        assert str(results[0]) not in (results[0] / name / "result.json").read_text()
        assert result["versions"]["jax"] == jax.__version__
        assert result["device"]["platform"] == "cpu"
        assert "seed" in result["settings"]
        with Image.open(folder / name / "figure.png") as picture:
            assert len(np.unique(np.asarray(picture))) > 10


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    argv = ["--steps", "2", "--eta", "0", "1", "--num-images", "8", "--batch-size", "4"]
    argv += ["--out", str(tmp_path / "a")]
    score, calls = table1._score, []

    def dies(experiment, eta, steps, images):
        calls.append(eta)
        if eta == "1":
            raise KeyboardInterrupt
        return score(experiment, eta, steps, images)

    monkeypatch.setattr(table1, "_score", dies)
    with pytest.raises(KeyboardInterrupt):
        table1.main(argv)
    assert not (tmp_path / "a" / "result.json").exists()
    monkeypatch.setattr(table1, "_score", lambda *a: calls.append(a[1]) or score(*a))
    result = table1.main(argv)
    assert calls == ["0", "1", "1"]
    assert [c["eta"] for c in result["cells"]] == ["0", "1"]

    monkeypatch.setattr(table1, "_score", lambda *_: pytest.fail("a finished cell ran again"))
    assert table1.main(argv)["cells"] == result["cells"]
    with pytest.raises(ValueError, match=r"other settings(.|\n)*seed: there 0, now 5"):
        table1.main([*argv, "--seed", "5"])
    with pytest.raises(ValueError, match="experiment: there table1, now fig3"):
        fig3.main(argv)
    with pytest.raises(FileExistsError, match="holds a result"):
        table3.main(["--out", str(tmp_path / "a")])


def test_a_table_that_ends_early_says_what_it_lacks(tmp_path, monkeypatch):
    argv = ["--steps", "2", "--eta", "0", "1", "--num-images", "8", "--batch-size", "4"]
    argv += ["--out", str(tmp_path / "a"), "--seconds", "60"]
    monkeypatch.setattr(pipeline, "STARTED", time.monotonic())  # the process is older
    draw = pipeline.drawn

    def late(*args):
        images = draw(*args)
        monkeypatch.setattr(pipeline, "STARTED", -1e9)
        return images

    monkeypatch.setattr(pipeline, "drawn", late)
    first = table1.main(argv)
    assert ([c["eta"] for c in first["cells"]], first["missing"]) == (["0"], ["eta1-S2"])
    with pytest.raises(TimeoutError, match="no cell was finished"):
        table1.main([*argv[:-3], str(tmp_path / "b"), *argv[-2:]])
    monkeypatch.setattr(pipeline, "STARTED", time.monotonic())
    monkeypatch.setattr(pipeline, "drawn", draw)
    whole = table1.main(argv)
    assert (whole["cells"][0], whole["missing"]) == (first["cells"][0], [])
    words = argv[: argv.index("--out")]
    assert cifar10.is_whole(tmp_path / "a", words)
    assert not cifar10.is_whole(tmp_path / "a", ["--steps", "3", *words[2:]])


@pytest.fixture
def without(tmp_path):
    """Words of an experiment whose data are not at hand; without --or-not-run that is an error."""

    def words(main, text=""):
        words = ["--data", "mnist", "--data-dir", str(tmp_path), *text.split()]
        words += ["--out", str(tmp_path / "out")]
        with pytest.raises(ValueError, match="no data set 'mnist'"):
            main(words)
        return [*words, "--or-not-run"]

    return words


def test_without_its_data_a_table_may_be_not_run(without):
    said = table1.main(without(table1.main))["reason"]
    assert said == "mnist, its data, is not at hand"


@pytest.mark.slow
def test_without_data_table2_encodes_what_the_model_draws(without):
    words = "--steps 2 --num-images 4 --batch-size 4 --exact-steps 0 --reach-steps 0"
    words += " --exact-samples 2 --reach-samples 2"
    found = table2.main(without(table2.main, words))
    assert "images of the model itself, as no data are at hand (drawn; 4 each" in found["caption"]
    model, tau = ddim.load_model("digits"), ddim.timesteps(1000, 2)
    x_T = ddim.initial_noise(jax.random.split(jax.random.key(1))[0], 4, model.image_shape)
    x_0 = ddim.make_sampler(model, ddim.timesteps(1000, 50))(x_T)
    x_0 = to_model(to_uint8(x_0))
    back = ddim.reconstruct(model.denoise, x_0, model.schedule, tau)
    error = ddim.reconstruction_error(x_0, back).mean()  # a grey level errs by 1e-5 at most
    np.testing.assert_allclose(found["cells"][0]["error"], error, rtol=1e-2)


def test_without_data_figure_6_measures_the_paths_alone(without):
    words = "--steps 2 --paths 2 --points 3 --batch-size 6"
    found = fig6.main(without(fig6.main, words))["cells"]
    assert (found["nearest"], found["paths"]) == ({}, 2)
    assert [c.verdict for c in claims.fig6(found)][1] == claims.NOT_RUN
    assert report.TABLES["fig6"]({"cells": found})


def test_cifar10_is_judged_without_it(tmp_path):
    """By the statistics that ship; other data, features or a cut have none."""
    words = ["--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]

    def judge(*more):
        return common.Experiment("table1", arguments.parse("table1", "", [*words, *more], {}))

    here = judge()
    assert (here.extractor.frechet_name, here.at_hand) == ("FD-ResNet56", False)
    assert here.against == "50,000 images of cifar10/3.0.2, by the statistics that ship"
    here.args.out.mkdir()
    x, whole = here.reference.features[:500], here.reference.moments
    mean = ((x.mean(0) - whole.mean) ** 2).sum()
    a, b = np.cov(x.T), whole.covariance
    distance = mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert here.floor(500)["distance"] == pytest.approx(distance, rel=1e-4)
    assert judge("--extractor", "pixels").shipped is None
    cut = judge()
    cut.data_config = dataclasses.replace(cut.data_config, resize=32)
    assert (cut.shipped, cut.extractor.name) == (None, "pixels")


def test_the_parts_of_the_paper_are_taken(monkeypatch):
    """Their words are those of the experiment; nothing is run."""
    seen = []
    parts = {name: words for name, words in paper.PARTS.items() if name != "table3"}  # has no model
    for name, words in parts.items():
        module = importlib.import_module(f"experiments.{name}")
        monkeypatch.setattr(module, "Experiment", lambda name, args: seen.append(name) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.main([*f"{words} {paper.BATCH}".split(), "--or-not-run"])
    assert seen == list(parts)


@pytest.mark.slow
def test_one_step_serves_every_plan():
    """Image k is that of `sample`, η = 0 and 1, S = 2 and 3, by one compiled program."""
    model = ddim.load_model("digits")
    draws = stepping.Stepper(model)
    keys = jax.random.split(jax.random.key(5))
    for eta, tau in ((0.0, [500, 1000]), (1.0, [100, 500, 1000])):
        images, finite = draws.draw(ddim.ddim(eta)(model.schedule, tau), 5, 3, 8, False)
        x_T = ddim.initial_noise(keys[0], np.arange(3, 11), model.image_shape)
        key = ddim.image_keys(keys[1], np.arange(3, 11))
        x_0 = ddim.make_sampler(model, tau, eta)(x_T, key)
        assert finite.all()
        np.testing.assert_allclose(np.asarray(images, int), np.asarray(to_uint8(x_0), int), atol=1)
    assert draws._step(False)._cache_size() == 1


def test_one_step_serves_every_method_and_network():
    """η = 0 and methods that remember, S = 2 and 3, weights of the model and others."""
    model = ddim.load_model("digits")
    draws = stepping.Stepper(model)
    other = jax.tree.map(lambda p: 0.9 * p, model.params)
    numbers = np.arange(8, dtype=np.uint32)
    x_T = ddim.initial_noise(jax.random.key(5), numbers, model.image_shape)
    for method, tau, params in (
        (ddim.ddim(), [500, 1000], None),
        (ddim.unipc(2), [100, 500, 1000], other),
        (ddim.dpm_solver(2), [100, 500, 1000], None),
    ):
        plan = with_memory(method(model.schedule, tau), stepping.MEMORY)
        x_0 = draws.run(x_T, plan, numbers=numbers, params=params)
        with_params = model if params is None else model._replace(params=params)
        wanted = ddim.sample(with_params.denoise, x_T, model.schedule, tau, method=method)
        np.testing.assert_allclose(x_0, wanted, atol=1e-5)  # of order 1, rounded otherwise
    assert draws._step(False)._cache_size() == 1


@pytest.mark.parametrize("part", cifar10.PARTS, ids=lambda part: part.folder)
def test_the_parts_of_cifar10_are_taken(part, monkeypatch):
    """Their words are those of the experiment; nothing is run."""
    module = inspect.getmodule(part.main)
    seen = []
    monkeypatch.setattr(module, "Experiment", lambda name, args: seen.append(args) or 1 / 0)
    for words in (part.words, part.rehearsal):
        with pytest.raises(ZeroDivisionError):
            part.main([*words.split(), "--seconds", "9"])
    assert [args.seconds for args in seen] == [9, 9]


@pytest.mark.slow
def test_all_of_cifar10_in_one_go(tmp_path):
    words = ["--model", "digits", "--extractor", "pixels", "--rehearse", "--out", str(tmp_path)]
    folders = [part.folder for part in cifar10.PARTS]
    assert cifar10.main(words) == folders
    before = (tmp_path / folders[0] / "result.json").stat().st_mtime_ns
    assert cifar10.main(words) == folders
    assert (tmp_path / folders[0] / "result.json").stat().st_mtime_ns == before
    assert "encoded no farther than t" in (tmp_path / "report.html").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else"):
        table1.main(["--out", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_not_run_makes_way_for_a_run(tmp_path):
    table3.main(["--out", str(tmp_path)])
    argv = ["--model", "digits", "--steps", "2", "--num-images", "8", "--batch-size", "4"]
    assert table3.main([*argv, "--out", str(tmp_path)])["status"] == "run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eta", "DDPM"], r"numbers in \[0, 1\], 'hat' and methods .*, got 'DDPM'"),
        (["--eta", "2"], "got '2'"),
        (["--eta", "0", "0.0"], "--eta must not name a value twice"),
        (["--steps", "5", "5"], "--steps must not name a value twice"),
        (["--seed", "-1"], r"--seed must be in 0..2\*\*32 - 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--num-images", "20", "30"], "takes one number, and S=N .* got 20 30"),
        (["--num-images", "20", "7=25"], "takes one number, and S=N .* got 20 7=25"),
        (["--num-images", "many"], "takes a number N"),
        (["--num-images", "10=100"], "takes a number N"),
        (["--extractor", "vgg"], "must be pixels"),
        (["--extractor", "inception"], "must be pixels"),
        (["--spacing", "cubic"], "unknown spacing"),
        (["--steps", "1001"], "S <= T"),
        (["--model", "no-such-model"], "no model"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        table1.main([*words, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (fig4.main, "--steps 2 5 7 --num-images 4 2=8", "fig4 times one batch at every S"),
        (fig4.main, "--repeats 0", "--repeats must be at least 1"),
        (fig4.main, "--steps 2 5 2000", "S = 2000 and T = 1000"),
        (table2.main, "--exact-steps 3000", "S = 3000 and T = 1000"),
        (table2.main, "--exact-samples 1", "--exact-samples must be at least 2"),
        (table2.main, "--num-images 5000", "digits has 1797 images, 5000 were asked for"),
        (solvers.main, "--oracle --model digits", "--oracle stands in place of a network"),
        (solvers.main, "--fine-steps 50", "--fine-steps must be above every S, here 50, got 50"),
        (solvers.main, "--fine-samples 200", "in 2..150, the least of --num-images, got 200"),
        (solvers.main, "--method heun", "unknown method 'heun'"),
        (solvers.main, "--method dpm-solver-sde", "dpm-solver-sde adds noise"),
        (solvers.main, "--method ddim ddim", "must not name a value twice"),
        (solvers.main, "--tau cubic linear", "--tau takes linear, .* got cubic"),
        (solvers.main, "--tau refined", "needs --refine to name every S, not"),
    ],
)
def test_so_are_those_of_other_experiments(tmp_path, main, words, message):
    with pytest.raises(ValueError, match=message):
        main([*words.split(), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("main", "option"),
    [(fig5.main, "--spacing"), (solvers.main, "--spacing"), (table2.main, "--extractor")],
)
def test_options_without_a_use_are_not_taken(main, option, capsys):
    with pytest.raises(SystemExit):
        main([option, "linear"])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_a_folder_belongs_to_one_network(tmp_path):
    words = ["--steps", "2", "--eta", "0", "--num-images", "4", "--out", str(tmp_path / "new")]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "settings.json.0123.tmp").touch()  # of a run killed at once
    first = table1.main(words)
    for more in (["--prediction", "x_0"], ["--schedule", "cosine"], ["--dtype", "bfloat16"]):
        with pytest.raises(ValueError, match=r"other settings.*\n.* model: "):
            table1.main([*words, *more])
    assert table1.main(words)["cells"] == first["cells"]
    for name in ("cells/eta0-S2.json", "settings.json"):
        (tmp_path / "new" / name).write_text("[]")
        with pytest.raises(ValueError, match=rf"{name} is damaged: move it away"):
            table1.main(words)


def test_which_data_a_model_is_compared_with():
    facts = {"data": {"name": "celeb_a/2.1.0", "split": "train", "transform": {
        "crop": [57, 25, 128, 128], "resize": 64}}}  # fmt: skip
    own = provenance.data_config(None, facts)
    assert (own.name, own.crop, own.resize) == ("celeb_a:2.1.0", (57, 25, 128, 128), 64)
    assert provenance.data_config("celeb_a:2.1.0", {}).resize == 64
    assert provenance.data_config("lsun/church_outdoor", {}).resize == 256
    assert provenance.data_config("cifar10", {}).name == "cifar10"
    assert provenance.data_config("celeba64", {}).name == "celeb_a"
    with pytest.raises(ValueError, match="--data"):
        provenance.data_config(None, {})


def test_the_papers_own_numbers_keep_its_orderings():
    for table in paper_numbers.TABLE1.values():
        found = claims.table1(paper_numbers.as_cells(table, paper_numbers.TABLE1_STEPS))
        assert [c.verdict for c in found] == [claims.HOLDS] * 5
    rows = [{"S": s, "error": e, "se": 0.0} for s, e in paper_numbers.TABLE2.items()]
    (fall,) = claims.table2(rows)  # .0001 twice
    assert (fall.verdict, fall.detail.startswith("5 of 6")) == (claims.WITHIN, True)
    for table in paper_numbers.TABLE3.values():
        found = claims.table3(paper_numbers.as_cells(table, paper_numbers.TABLE3_STEPS))
        assert {c.verdict for c in found} == {claims.HOLDS}


def test_a_comparison_needs_two_standard_errors():
    value = claims.Value

    def verdict(a, b):
        return claims.compare("", [("", value(*a), value(*b))]).verdict

    assert verdict((1.0, 0.3), (2.1, 0.4)) == claims.HOLDS  # 2·0.5 < 1.1
    assert verdict((1.0, 0.3), (1.9, 0.4)) == claims.WITHIN
    assert verdict((2.1, 0.3), (1.0, 0.4)) == claims.FAILS
    assert claims.compare("", []).verdict == claims.NOT_RUN
    cells = paper_numbers.as_cells(paper_numbers.TABLE1["CIFAR-10 32×32"], (10, 20, 50, 100, 1000))
    for cell in cells:
        if (cell["eta"], cell["S"]) == ("0", 20):
            cell["distance"] = 8.0
    best, grows, *_ = claims.table1(cells)
    assert best.verdict == grows.verdict == claims.FAILS
    assert "η=0 S=20 < η=0.2 S=20" in best.detail


@pytest.mark.slow
def test_the_report_puts_all_beside_the_paper(results):
    folder, found = results
    page = report.main([str(folder)])
    text = page.read_text()
    assert page == folder / "report.html"
    assert text.count("data:image/png;base64,") == len(found) - 1
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    for title in report.SECTIONS.values():
        assert f"<h2>{title}</h2>" in text
    assert "Not run</b>: no LSUN weights" in text
    for number in ("367.43", "0.0065", "42.78"):
        assert f"<td>{number}</td>" in text
    cell = found["table1"]["cells"][0]
    assert f"<td>{cell['distance']:.3g} ± {cell['se']:.1g}</td>" in text
    ours = re.findall(r"<th>(F[^<]*)</th>", text)
    assert "FD-pixels" in ours
    assert not [name for name in ours if name.startswith("FID") and "×" not in name]
    verdicts = re.findall(r"<td>(holds|within error|does not hold|not run)</td>", text)
    assert len(verdicts) > 20
    assert report.main([str(folder)]) == page  # again, over its own page


def test_the_reports_tables_in_markdown(tmp_path):
    text = markdown.main([str(pathlib.Path(report.__file__).parent / "results")])
    assert "### table1-digits\n\n| FD-pixels | S = 10 |" in text
    assert "| σ̂ | 367.43 | 133.37 | 32.72 | 9.99 | 3.17 |" in text
    assert not re.search("</?t[dhr]>|&[a-z]+;", text)
    with pytest.raises(FileNotFoundError, match="no folder"):
        markdown.main([str(tmp_path / "missing")])


def test_the_report_of_nothing_and_of_strangers(tmp_path):
    text = report.main([str(tmp_path)]).read_text()
    assert text.count("Not run</b>") == len(report.SECTIONS)
    with pytest.raises(FileNotFoundError, match="no folder"):
        report.main([str(tmp_path / "missing")])
    mine = tmp_path / "mine.html"
    mine.write_text("<title>Mine</title>")
    with pytest.raises(FileExistsError, match="no report"):
        report.main([str(tmp_path), "--out", str(mine)])
    (tmp_path / "result.json").write_text('{"experiment": "cooking"}')
    with pytest.raises(ValueError, match="no result of these"):
        report.main([str(tmp_path)])


@pytest.mark.slow
def test_objectives_are_learned_by_the_step_of_the_package():
    """Scanned or called one by one, three updates are those of `make_train_step`."""
    preset = PRESETS["digits"]()
    network = dataclasses.replace(preset.model, multipliers=(1,))
    setting = types.SimpleNamespace(
        dataset=load("digits"), args=types.SimpleNamespace(chunk=3, seed=0)
    )
    objective = objectives.OBJECTIVES["edm"]
    config = dataclasses.replace(preset.train, num_updates=3, seed=5, batch_size=4,
                                 prediction="edm", gamma="edm", sigma_data=0.75)  # fmt: skip
    bench = on_device.Bench(setting, preset, network)
    step = make_train_step(bench.apply_fn, preset.schedule.build(), config)
    state = init_state(unet.build(network, jax.random.key(5))[1], config)
    numbers, losses = on_device.batch_numbers(1797, 4, 5), []
    for _ in range(3):
        batch = {"image": np.asarray(bench.images)[next(numbers)], "label": np.zeros(4, np.int32)}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    for bench.on_cpu in (True, False):
        bench.trainer.cache_clear()
        ema, loss = bench.trained("here", objective, config)
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        for ours, theirs in zip(jax.tree.leaves(ema), jax.tree.leaves(state.ema)):
            # Adam's first steps are 2e-5 times their number each, whatever the gradient.
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_distillation_summarises_seeds_and_takes_the_best_tau(tmp_path):
    figures = {"student": [1.0, 3.0], "ddim-linear": [4.0, 4.0], "ddim-quadratic": [2.0, 2.0]}
    cells = [
        {"S": 4, "way": way, "distance": d, "se": 0.5}
        for way, both in figures.items() for d in both
    ]  # fmt: skip
    series = distillation._series(distillation._rows(cells))
    assert series == {"student": ([4], [2.0], [1.0]), "ddim": ([4], [2.0], [0.0])}
    assert distillation._rows(cells[:1])[0]["se"] == 0.5
    with pytest.raises(ValueError, match="one for each of 5 stages, got 2"):
        distillation.main(["--updates", "3", "4", "--out", str(tmp_path / "new")])
    with pytest.raises(ValueError, match="does not lead to 3"):
        distillation.main(["--steps", "3", "--out", str(tmp_path / "new")])
    with pytest.raises(ValueError, match=r"no student of 32 steps has \[6\] steps"):
        distillation.main(["--steps", "6", "4", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_distillation_scores_students_and_solvers_and_goes_on(tmp_path):
    words = "--teacher-steps 4 --steps 2 1 --also 3 25 --seeds 4 --updates 2 4 --train-batch 8"
    words += " --num-images 8 --batch-size 4 --method unipc-2 --spacings linear logsnr"
    words = [*words.split(), "--out", str(tmp_path / "out")]
    with pytest.raises(pipeline.OutOfTimeError):
        distillation.main([*words, "--seconds", "1"])
    last = tmp_path / "out" / "ladder-4" / "steps-1" / "metrics.jsonl"
    before = last.read_text()
    result = distillation.main(words)
    assert last.read_text() == before  # with its seconds: no stage was trained anew
    cells = {(c["way"], c["S"]): c for c in result["cells"]}
    ways = {f"{name}-{tau}" for name in ("ddim", "unipc-2") for tau in ("linear", "logsnr")}
    few = {(way, s) for way in ways for s in (1, 2, 3)} | {("student", s) for s in (1, 2)}
    assert cells.keys() == few | {("ddim-linear", 25), ("ddim-logsnr", 25)}
    assert result["missing"] == []
    for way in ways:  # one call is Euler's from T
        assert cells[way, 1]["distance"] == cells["ddim-linear", 1]["distance"]
    assert not list((tmp_path / "out" / "cells").glob("unipc-2-*-S2-*"))  # two are Euler's too
    student = ddim.load_model(tmp_path / "out" / "ladder-4" / "steps-2")
    x_T = ddim.initial_noise(jax.random.key(4), 8, student.image_shape)
    images = np.asarray(to_uint8(student.sampler()(x_T)))
    assert cells["student", 2]["distance"] == pytest.approx(
        frechet(images, load("digits").arrays()["image"].astype(float)), rel=2e-3
    )


def test_batches_of_objectives_are_epochs_without_a_gap():
    numbers = on_device.batch_numbers(7, 3, 1)
    stream = np.concatenate([next(numbers) for _ in range(7)])
    for epoch in np.split(stream, 3):
        assert sorted(epoch) == list(range(7))
    assert stream.tolist() != np.tile(stream[:7], 3).tolist()


def test_objectives_summarise_seeds():
    run = {"objective": "v", "recipe": "preset", "updates": 2}
    cells = [{**run, "seed": s, "distance": {"5": d}, "se": {"5": 0.3}}
             for s, d in enumerate((1.0, 2.0, 4.0))]  # fmt: skip
    cells.append({**run, "seed": 3, "distance": {}, "se": {}})  # diverged
    (row,) = objectives.summary(cells, 5)
    assert (row["seeds"], row["distance"]) == (3, pytest.approx(7 / 3))
    assert row["se"] == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert objectives.summary(cells[:1], 5)[0]["se"] == 0.3
    assert objectives.markdown([row]).splitlines()[2] == "| v, preset, 2 updates | 2.33 ± 0.88 |"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--objectives w", "no objective 'w'; choose of eps, v"),
        ("--recipes rate=1", "name=value of learning_rate"),
        ("--recipes learning_rate=fast", "learning_rate is no float: 'fast'"),
        ("--recipes ema_decay=1", r"ema_decay must be in \[0, 1\)"),
        ("--model digits", "trains its own networks"),
        ("--data wide.npz", "no preset has images of"),
    ],
)
def test_what_objectives_refuse(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    np.savez("wide.npz", images=np.zeros((4, 5, 6), np.uint8))
    with pytest.raises(ValueError, match=says):
        objectives.main(words.split())
    assert not (tmp_path / "results").exists()


def test_errors_of_use_are_one_line(capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(".cache/jax").resolve()))
    with pytest.raises(SystemExit, match="error: no model 'nothing'"):
        arguments.run(lambda: table1.main(["--model", "nothing"]))
