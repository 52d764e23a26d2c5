"""The notebook runs top to bottom, computes what it says, and is stored with its outputs."""

import base64
import contextlib
import io
import itertools
import json
import pathlib
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ddim_jax as ddim

PATH = pathlib.Path(__file__).parents[1] / "experiments" / "ddim_colab.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PICTURES = {"sample", "eta", "trajectory", "slerp", "grid", "reconstruct", "rebuilt", "colour"}
PICTURES |= {"guidance"}
TEXTS = {"sample", "weights", "reconstruct", "invert", "colour"}


def stand_in(**names):
    """A module for `sys.modules`."""
    module = types.ModuleType("stand_in")
    vars(module).update(names)
    return module


def execute(cell, names):
    """Runs one cell; what it printed."""
    printed = io.StringIO()
    source = compile("".join(cell["source"]), f"<cell {cell['id']}>", "exec")
    with contextlib.redirect_stdout(printed):
        exec(source, names)
    return printed.getvalue()


@pytest.fixture(scope="module")
def ran():
    """The variables of all cells run in order, what they printed, and the sliders' arguments."""
    pytest.importorskip("sklearn")
    plt = pytest.importorskip("matplotlib.pyplot")
    names, printed, sliders = {}, {}, {}
    widget = lambda *args, **options: options | {"value": (*args, options.get("value"))[0]}  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "IPython.display", stand_in(Image=bytes))
        interact = lambda f, **widgets: sliders.update(f=f, **widgets)  # noqa: E731
        widgets = stand_in(FloatSlider=widget, SelectionSlider=widget, interact=interact)
        patch.setitem(sys.modules, "ipywidgets", widgets)
        plt.switch_backend("Agg")
        for cell in CODE:
            printed[cell["id"]] = execute(cell, names)
        patch.setitem(sys.modules, "ipywidgets", None)
        (cell,) = (c for c in CODE if c["id"] == "sliders")
        printed["no sliders"] = execute(cell, names)
    plt.close("all")
    return types.SimpleNamespace(**names), printed, sliders


@pytest.mark.slow
def test_digits_are_those_of_the_model(ran):
    v, _, _ = ran
    assert v.digits.shape == (64, 8, 8, 1)
    assert np.isfinite(v.digits).all()
    model = ddim.load_model("digits")
    few = ddim.sample(model.denoise, v.x_T[:2], model.schedule, ddim.timesteps(1000, 20))
    np.testing.assert_allclose(v.digits[:2], few, atol=1e-4)
    assert np.mean(np.abs(np.abs(v.digits) - 1) < 0.2) > 0.5  # ink or paper, not noise


@pytest.mark.slow
def test_weights_from_the_file_draw_the_same(ran):
    v, printed, _ = ran
    assert v.loaded.params is not v.model.params
    np.testing.assert_array_equal(v.from_file, v.digits)
    assert "True" in printed["weights"]


@pytest.mark.slow
def test_eta_and_steps_act(ran):
    """η = 0 depends little on S; noise changes the digits; the sliders' function draws the same."""
    v, printed, sliders = ran
    rms = lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2)))  # noqa: E731
    plain, more, noisy = v.draw(0.0, 10), v.draw(0.0, 50), v.draw(1.0, 10)
    assert plain.shape == (16, 8, 8, 1)
    assert rms(plain, more) < 0.5 * rms(plain, noisy)
    assert rms(v.draw(0.1, 10), plain) > 0.01
    assert sliders["f"] is not None
    assert sliders["eta"]["min"] == 0
    assert sliders["eta"]["max"] == 1
    assert sliders["S"]["value"] in sliders["S"]["options"]
    pictures = [np.asarray(sliders["f"](eta, 10)) for eta in (0.0, 0.0, 1.0)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).mean() > 0.1
    assert printed["sliders"] == ""
    assert "ipywidgets" in printed["no sliders"]


@pytest.mark.slow
def test_trajectory_goes_from_noise_to_digits(ran):
    v, _, _ = ran
    assert v.path.x_t.shape == v.path.x_0.shape == (50, 16, 8, 8, 1)
    np.testing.assert_array_equal(v.path.x_t[0], v.x_T[:16])
    np.testing.assert_allclose(v.path.sample, v.draw(0.0, 50), atol=1e-4)
    distance = jnp.abs(v.path.x_0 - v.path.sample[None]).mean(axis=(1, 2, 3, 4))
    assert (jnp.diff(distance[::5]) < 0).all()  # x̂_0 comes nearer to the image all the way
    assert distance[0] > 10 * distance[-1]
    with Image.open(v.movie) as movie:
        assert movie.n_frames == 51


@pytest.mark.slow
def test_interpolation_ends_at_its_ends(ran):
    v, _, _ = ran
    assert np.isfinite(v.rows).all()
    rows = v.rows.reshape(8, 8, 8, 8, 1)
    np.testing.assert_allclose(rows[:, 0], v.digits[:8], atol=1e-3)
    np.testing.assert_allclose(rows[:, -1], v.digits[8:16], atol=1e-3)
    surface = v.surface.reshape(8, 8, 8, 8, 1)
    for (i, j), k in zip([(0, 0), (0, -1), (-1, 0), (-1, -1)], [2, 9, 32, 7]):
        np.testing.assert_allclose(surface[i, j], v.digits[k], atol=1e-3)
    assert jnp.abs(rows[:, 4] - rows[:, 0]).mean() > 0.05


@pytest.mark.slow
def test_reconstruction_error_falls_with_steps(ran):
    v, _, _ = ran
    assert float(v.x_0.min()) == -1
    assert float(v.x_0.max()) == 1
    errors = [v.errors[S] for S in (10, 20, 50, 100)]
    assert all(b < a / 2 for a, b in itertools.pairwise(errors))
    by_hand = np.mean((np.asarray(v.x_0, np.float64) - np.asarray(v.rebuilt[10])) ** 2) / 4
    assert errors[0] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.slow
def test_exact_inverse_decodes_to_the_data(ran):
    v, _, _ = ran
    converged = np.asarray(v.inverse.converged)
    assert 0 < converged.sum() <= 16
    tau = ddim.timesteps(1000, 10)
    back = ddim.sample(v.model.denoise, v.inverse.x_T, v.model.schedule, tau)
    error = np.abs(back - v.x_0).reshape(16, -1).max(axis=1)
    assert error[converged].max() < 2e-4
    assert np.median(error) < 0.1 * np.median(v.plain)


@pytest.mark.slow
def test_classes_and_guidance_act_on_the_same_latents(ran):
    v, printed, _ = ran
    assert printed["colour"].split() == list(v.colour.label_names)
    assert v.in_colour.shape == (20, 32, 32, 3)
    plain, *strong = (np.asarray(images) for images in v.guided)
    np.testing.assert_allclose(plain, v.in_colour[:10], atol=1e-2)  # w = 1, by another program
    off = [np.sqrt(np.mean((images - plain) ** 2)) for images in strong]
    assert 0.02 < off[0] < off[1]
    rms = np.sqrt(np.mean((np.asarray(v.in_colour[:9]) - np.asarray(v.in_colour[1:10])) ** 2))
    assert rms > 0.05  # of one latent, class after class


@pytest.mark.slow
def test_stored_outputs_are_those_of_this_code(ran):
    """Numbers printed when the notebook was stored and now, but for times and for chance."""
    _, printed, _ = ran
    for cell in CODE:
        if cell["id"] in {"weights", "reconstruct", "colour"}:
            stored = "".join(t for o in cell["outputs"] for t in o.get("text", []))
            assert re.sub(r"\d", "", stored) == re.sub(r"\d", "", printed[cell["id"]])
            then, now = (
                [float(n) for n in re.findall(r"\d+\.?\d*", text)]
                for text in (stored, printed[cell["id"]])
            )
            np.testing.assert_allclose(now, then, rtol=0.05, atol=2e-5)


def test_stored_notebook_has_its_outputs_and_no_errors():
    for number, cell in enumerate(CODE, 1):
        assert cell["execution_count"] == number
        data = [o["data"] for o in cell["outputs"] if o["output_type"] != "stream"]
        assert all(o["output_type"] != "error" for o in cell["outputs"]), cell["id"]
        assert all(o.get("name") != "stderr" for o in cell["outputs"]), cell["id"]
        assert any("image/png" in d for d in data) == (cell["id"] in PICTURES), cell["id"]
        assert any("text" in o for o in cell["outputs"]) == (cell["id"] in TEXTS), cell["id"]
        for png in (d["image/png"] for d in data if "image/png" in d):
            with Image.open(io.BytesIO(base64.b64decode("".join(png)))) as image:
                assert image.format == "PNG"
                assert min(image.size) >= 80
                assert np.ptp(np.asarray(image.convert("L"))) > 200
    assert PATH.stat().st_size < 1.5e6
    for folder in (pathlib.Path.home(), PATH.resolve().parents[1]):
        assert f"{folder}/" not in PATH.read_text()


def test_stored_notebook_is_nbformat_4():
    """The parts of the schema of nbformat 4.5 that concern it."""
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    outputs = {
        "stream": {"name", "text"},
        "display_data": {"data", "metadata"},
        "execute_result": {"data", "metadata", "execution_count"},
    }
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        common = {"cell_type", "id", "metadata", "source"}
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert cell.keys() == common | code
        assert all(isinstance(line, str) for line in cell["source"])
        for output in cell.get("outputs", []):
            assert output.keys() == {"output_type"} | outputs[output["output_type"]]
    with contextlib.suppress(ImportError):
        import nbformat

        nbformat.validate(NOTEBOOK)


def test_install_cell_names_what_pip_installs(monkeypatch):
    """Where the package is missing; nothing is run where it is not."""
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    (cell,) = (c for c in CODE if c["id"] == "install")
    execute(cell, {})
    assert commands == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(PATH.parent.parent)  # nothing is to be installed from there
    with pytest.raises(SystemExit, match="no copy of the repository"):
        execute(cell, {})
    monkeypatch.chdir(PATH.parent)  # where a notebook runs
    execute(cell, {})
    assert commands == [
        [sys.executable, "-m", "pip", "install", "-q", "..", "matplotlib", "scikit-learn"]
    ]
    assert (PATH.parent / ".." / "pyproject.toml").exists()
