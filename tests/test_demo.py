import dataclasses
import json
import re

import pytest

from ddim_jax import demo
from ddim_jax.data import load
from ddim_jax.pretrained import load_model
from ddim_jax.unet import abstract_params, count_params


def score(num_samples, steps):
    """Pixel-space Fréchet distance of the shipped model's samples, η = 0."""
    digits = load_model("digits"), load("digits")
    return demo.draw_cells(*digits, num_samples, steps=(steps,), etas=(0.0,))[1][0.0, steps]


def test_the_shipped_model_is_good():
    """Of three seeds with so few samples the worst has 0.77; 300 real digits 0.36."""
    assert score(300, steps=20) <= 0.8


@pytest.mark.slow
def test_the_shipped_model_is_as_good_as_promised():
    assert score(2000, steps=50) <= 0.5


def test_demo_makes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", (2, 3))
    monkeypatch.setattr(demo, "HEADLINE", (2, 0.0))
    preset = demo.digits()
    small = dataclasses.replace(preset.model, channels=32, multipliers=(1,))
    monkeypatch.setattr(demo, "digits", lambda: dataclasses.replace(preset, model=small))
    parameters = count_params(abstract_params(small))
    out = tmp_path / "demo"
    said = []
    page = demo.run(out, num_steps=3, num_samples=12, say=said.append)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "index.html",
        "samples.png",
        "trajectory.png",
        "loss.png",
        "results.json",
        "run",
    }
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    results = json.loads((out / "results.json").read_text())
    assert len(results["frechet_pixels"]) == 2 * 3
    assert 0.2 < results["frechet_pixels_real_half_against_real_half"] < 0.4
    assert any(f"training {parameters:,} parameters for 3 steps" in line for line in said)
    with pytest.raises(FileExistsError, match="finished demo"):
        demo.run(out)


def test_demo_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        demo.run(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
