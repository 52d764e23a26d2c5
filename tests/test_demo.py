import dataclasses
import json
import os
import re

import numpy as np
import pytest

from ddim_jax import demo
from ddim_jax.cli import main
from ddim_jax.data import Dataset, load
from ddim_jax.networks.unet import abstract_params, count_params
from ddim_jax.training.run_folder import read_metrics
from ddim_jax.weights import load_model
from tests.conftest import on_one_device

pytestmark = pytest.mark.usefixtures("one_trace")


def score(num_images, steps, name="digits"):
    """Pixel-space Fréchet distance of a shipped model's samples, η = 0, linear τ."""
    (images,) = demo.draw_cells(load_model(name), num_images, steps=[steps], etas=[0.0]).values()
    return demo.score(images, load("digits"))


@pytest.mark.slow
def test_the_shipped_model_is_good():
    """A perfect sampler would score 0.5 with so few samples."""
    assert score(300, steps=20) <= 0.8


@pytest.mark.slow
def test_four_calls_of_the_distilled_model_are_as_good():
    """DDIM of its teacher scores 1.5, with 2,000 samples and a quadratic τ."""
    assert load_model("digits-4").tau.tolist() == [250, 500, 750, 1000]
    assert score(300, steps=4, name="digits-4") <= 0.9


@pytest.mark.slow
def test_the_shipped_model_is_as_good_as_promised():
    assert score(2000, steps=50) <= 0.29


def test_the_floor_is_what_a_perfect_sampler_scores():
    """For n samples of N(0, I_d): d/n of it by the mean, d(d + 1)/4n by the covariance."""
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(127.5, 30, (20_000, 2, 2, 1)).round(), 0, 255).astype(np.uint8)
    data = Dataset("noise", "train", 20_000, (2, 2, 1), 1, {}, lambda i: (pixels[i], i * 0))
    variance = (pixels / 127.5).var()
    np.testing.assert_allclose(demo.floor_of(data, 400), variance * (4 + 4 * 5 / 4) / 400, rtol=0.3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a demo of few steps with a small network, and what it said."""
    preset, said = demo.digits(), []
    small = dataclasses.replace(
        preset.model, multipliers=(1,), num_blocks=1, attention_resolutions=()
    )
    out = tmp_path_factory.mktemp("demo") / "demo"
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", (2, 3))
        patch.setattr(demo, "COLOUR_STEPS", (2, 3))
        patch.setattr(demo, "COLOUR", "digits-labels")
        patch.setattr(demo, "CLASSES", ("3", "7", "8"))
        patch.setattr(demo, "digits", lambda: dataclasses.replace(preset, model=small))
        demo.run(out, num_updates=3, num_images=12, say=said.append)
    return out, small, said


def test_demo_makes_its_page(made):
    out, small, said = made
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "explorer.html",
        "samples.png",
        "trajectory.png",
        "loss.png",
        "results.json",
        "run",
    }
    text = (out / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 2 * 2 + 1 + 2 * 2 + 2  # and real digits, figures
    assert re.findall(r"(?:src|href)=\"(?!data:)(.*?)\"", text) == ["explorer.html"]
    results = (out / "results.json").read_text()
    assert str(out.parent) not in results
    results = json.loads(results)
    assert set(results["frechet_pixels"]) == {f"eta={e},S={s}" for e in (0, 1) for s in (2, 3)}
    assert all(f"{value:.3f}" in text for value in results["frechet_pixels"].values())
    assert f"{results['frechet_pixels_real']:.3f}" in text
    parameters = count_params(abstract_params(small))
    assert any(f"training {parameters:,} parameters for 3 steps" in line for line in said)
    assert load_model(out / "run").prediction.kind == demo.digits().train.prediction
    assert read_metrics(out / "run" / "metrics.jsonl")[-1]["step"] == 3
    with pytest.raises(FileExistsError, match="finished demo"):
        demo.run(out)
    assert len(commands(out)) == 4
    assert "drawn beforehand by digits-labels" in (out / "explorer.html").read_text()


def commands(out):
    return re.findall(r"<dt><code>ddim-jax (.*?)</code>", (out / "index.html").read_text())


@pytest.mark.slow
def test_the_next_commands_run(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(made[0], "demo")
    for command in commands(made[0]):  # as typed, but that some would take minutes
        dry = ["--dry-run"] if command.startswith("train") else []
        dry += ["--steps", "2"] if command.startswith("explore") else []
        monkeypatch.setattr("sys.argv", ["ddim-jax", *command.split(), *dry])
        main()
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.html"))) == 1


def test_demo_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        demo.run(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
