import json
import re

import pytest

from ddim_jax import demo
from ddim_jax.data import load
from ddim_jax.pretrained import load_model


def test_the_shipped_model_is_as_good_as_promised():
    """Pixel-space Fréchet distance of 2,000 samples at S = 50, η = 0 is at most 0.5."""
    scores = demo.draw_cells(load_model("digits"), load("digits"), 2000, steps=(50,), etas=(0.0,))[
        1
    ]
    assert scores[0.0, 50] <= 0.5


def test_demo_makes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", (2, 3))
    monkeypatch.setattr(demo, "HEADLINE", (2, 0.0))
    out = tmp_path / "demo"
    said = []
    page = demo.run(out, num_steps=3, num_samples=70, say=said.append)
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
    assert any("training 1,079,873 parameters for 3 steps" in line for line in said)
    with pytest.raises(FileExistsError, match="finished demo"):
        demo.run(out)


def test_demo_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        demo.run(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
