"""The explorer's page: what is in it, and what its sliders do in a real browser."""

import base64
import io
import itertools
import json
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image

import ddim_jax as ddim
from ddim_jax.cli.explore import explore
from ddim_jax.cli.options import Source
from ddim_jax.data import load
from ddim_jax.generation import exploring
from ddim_jax.generation.exploring import explore_page, latents, of_dataset
from ddim_jax.networks.unet import UNetConfig, build
from ddim_jax.pictures.explorer import Codes, Exploration, Path, explorer_html, sheet_of
from ddim_jax.pictures.images import encode_png, to_model, to_uint8
from ddim_jax.process import ScheduleConfig
from ddim_jax.weights import save_model, to_facts
from tests import browser
from tests.conftest import on_one_device

pytestmark = pytest.mark.usefixtures("one_trace")
STEPS, ETAS, PLACES, IMAGES, SEED = (2, 5), (0.0, 1.0), 3, 2, 7


@pytest.fixture(scope="module")
def model():
    return ddim.load_model("digits")


@pytest.fixture(scope="module")
def page(model):
    """A small page of the shipped digits."""
    with on_one_device():
        return explore_page(
            model,
            "<digits>",
            None,
            of_dataset(model, load("digits"), IMAGES),
            num_images=IMAGES,
            steps=STEPS,
            etas=ETAS,
            num_positions=PLACES,
            num_frames=3,
            seed=SEED,
        )


def read(page):
    """Its data, and its arrays of images as the page's script finds them."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    sheet = base64.b64decode(re.search(r'src="data:image/webp;base64,(.*?)"', page)[1])
    pixels = np.asarray(Image.open(io.BytesIO(sheet)))
    h, w, columns = data["height"], data["width"], data["columns"]
    numbers = np.frombuffer(base64.b64decode(data["numbers"]), "<u2")
    tiles = [
        pixels[n // columns * h : (n // columns + 1) * h, n % columns * w : (n % columns + 1) * w]
        for n in numbers.tolist()
    ]
    return data, np.split(np.stack(tiles), np.cumsum(data["sizes"])[:-1])


def close(pixels, x):
    """Equal to samples, to one grey level: programs of other shapes round differently."""
    wanted = np.broadcast_to(np.asarray(to_uint8(x)), pixels.shape).astype(int)
    assert np.abs(pixels - wanted).max() <= 1


def test_the_page_refers_to_nothing_and_escapes(page):
    assert not re.search(r"(?:https?:)?//[a-z]", page.replace("</", ""))
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "&lt;digits&gt;" in page
    assert "<digits>" not in page
    assert "{{" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'<label for="([^"]+)"', page)) == set(
        re.findall(r'type="range" id="([^"]+)"', page)
    )
    assert len(page) < 200_000


def test_the_cells_are_what_the_samplers_draw(model, page):
    """The page's own arithmetic finds the images of `sample` and `trajectory`."""
    data, parts = read(page)
    key, noise_key = jax.random.split(jax.random.key(SEED))
    x_T = latents(key, IMAGES, np.linspace(0, 1, PLACES), model.image_shape)
    keys = ddim.image_keys(noise_key, IMAGES)
    for s, steps in enumerate(STEPS):
        tau = ddim.timesteps(1000, steps)
        sampler = ddim.make_sampler(model, tau)
        t = data["t"][s]
        cells = parts[2 * s + 1].reshape(len(ETAS), PLACES, IMAGES, len(t), 8, 8, 3)
        states = parts[2 * s].reshape(cells.shape)
        for (e, eta), p in itertools.product(enumerate(ETAS), range(PLACES)):
            drawn = sampler(x_T[p], keys, eta=eta)
            close(cells[e, p, :, -1], drawn)
            close(states[e, p, :, -1], drawn)
            close(states[e, p, :, 0], np.clip(x_T[p], -1, 1))
    wanted = ddim.trajectory(model.denoise, x_T[1], model.schedule, tau, at=t[:-1])
    assert wanted.t.tolist() == t[:-1]
    for k in range(len(t) - 1):
        close(states[0, 1, :, k], wanted.x_t[k])
        close(cells[0, 1, :, k], wanted.x_0[k])


def test_the_codes_are_those_of_encode(model, page):
    data, parts = read(page)
    real = load("digits").take(np.arange(IMAGES))["image"]
    originals, x_Ts, decoded = parts[-3:]
    np.testing.assert_array_equal(originals, np.broadcast_to(real, originals.shape))
    tau = ddim.timesteps(1000, STEPS[-1])
    x_0 = to_model(real)
    x_T = ddim.encode(model.denoise, x_0, model.schedule, tau)
    back = ddim.make_sampler(model, tau)(x_T)
    close(x_Ts[-IMAGES:], x_T)
    close(decoded[-IMAGES:], back)
    error = ddim.reconstruction_error(x_0, back)
    np.testing.assert_allclose(data["errors"][-1], error, rtol=6e-3)  # three digits are kept


def test_a_sheet_of_larger_images_is_close(tmp_path):
    """WebP at quality 90; smooth colours, as photographs have."""
    ramp = np.linspace(0, 255, 32)
    images = np.stack(
        [np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], v), -1) for v in (0.0, 90, 255)]
    ).astype(np.uint8)
    sheet = sheet_of([images, images[:1]])
    assert [n.tolist() for n in sheet.numbers] == [[0, 1, 2], [0]]
    pixels = np.asarray(Image.open(io.BytesIO(sheet.webp))).astype(int)
    assert np.abs(pixels[32:, :32] - images[2]).mean() < 5


def test_a_sheet_has_room_for_so_many():
    many = np.arange(2**16 + 1, dtype="<u4").view(np.uint8).reshape(-1, 2, 2, 1)
    with pytest.raises(ValueError, match="do not fit into one sheet: take fewer"):
        sheet_of([many])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": (5, 2)}, "steps must increase"),
        ({"steps": (5, 1001)}, "steps must increase in 1..T = 1000"),
        ({"etas": (-1.0,)}, "etas must increase"),
        ({"positions": 1}, "at least 2 positions"),
        ({"frames": 1}, "at least 2 frames"),
        ({"num_images": 0}, "need an image"),
        ({"labels": ("3",)}, "no classes"),
        ({"model": "digits-4"}, "distilled"),
        ({"data": "digits", "images": ()}, "give one of them"),
    ],
)
def test_refusals_come_before_the_work(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        explore(Source(), **({"model": "digits"} | options))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (out := tmp_path / "mine.html").write_text("mine")
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        explore(Source(), out=out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match=r"must end in \.html"):
        explore(Source(), out=tmp_path / "page.png")


def test_own_pictures_and_own_samples(tmp_path, monkeypatch, one_device):
    """A class-conditional network whose data would be code to run; and pictures to encode."""
    config = UNetConfig(
        image_size=8,
        channels=8,
        norm_groups=4,
        multipliers=(1,),
        num_blocks=1,
        attention_resolutions=(),
        num_classes=3,
    )
    apply_fn, params = build(config, jax.random.key(0))
    schedule = ScheduleConfig(num_steps=20, beta_end=0.5)
    facts = to_facts(schedule, config) | {"label_names": ["a", "b", "c"]}
    facts |= {"data": {"name": "builtins:exec", "split": "raise SystemExit('it was run')"}}
    facts |= {"train": {"label_dropout": 0.1}}
    network = ddim.Model(apply_fn, params, schedule.build(), config, facts)
    save_model(tmp_path / "m.safetensors", network)
    monkeypatch.chdir(tmp_path)
    few = {"steps": (2,), "positions": 2, "frames": 2, "num_images": 2, "etas": (0.0,)}
    explore(Source(), "m.safetensors", **few)
    text = (tmp_path / "m.html").read_text()
    data, parts = read(text)
    assert data["names"] == data["codeNames"] == ["a", "b"]
    assert "no real images were at hand" in text
    np.testing.assert_array_equal(parts[-3], parts[1].reshape(2, 2, -1, 8, 8, 3)[0, :, -1])
    (tmp_path / "cat.png").write_bytes(encode_png(np.full((16, 20, 1), 77, np.uint8)))
    (tmp_path / "dog.png").write_bytes(encode_png(np.full((16, 20, 1), 99, np.uint8)))
    files = (tmp_path / "cat.png", tmp_path / "dog.png")
    explore(Source(), "m.safetensors", images=files, labels=("c",), overwrite=True, **few)
    data, parts = read((tmp_path / "m.html").read_text())
    assert (data["names"], data["codeNames"]) == (["c", "c"], ["cat", "dog"])
    assert parts[-3][0].min() == parts[-3][0].max() == 77


def test_a_colour_page_stays_small():
    """32×32 in colour, x_t of pure noise, in the usual numbers: 5 MB are not reached."""
    model = types.SimpleNamespace(image_shape=(32, 32, 3))
    usual = exploring.usual_number(model)
    rng, shape = np.random.default_rng(0), (32, 32, 3)
    drawn = (len(exploring.ETAS), usual.positions, usual.images, usual.frames + 1, *shape)

    def noise(*size):
        return np.clip(rng.normal(127.5, 127.5, size), 0, 255).astype(np.uint8)

    def smooth(*size):
        x = rng.normal(127.5, 60, (*size[:-3], 8, 8, 3)).repeat(4, -3).repeat(4, -2)
        return np.clip(x + rng.normal(0, 8, x.shape), 0, 255).astype(np.uint8)

    t = np.array([1000, 800, 600, 400, 200, 0])
    paths = [Path(t, noise(*drawn), smooth(*drawn)) for _ in exploring.STEPS]
    for path in paths:  # one x_T, whatever S and η are, and the end of both is one
        path.x_t[:, :, :, 0] = paths[0].x_t[:1, :, :, 0]
        path.x_t[:, :, :, -1] = path.x_0[:, :, :, -1]
    codes = (smooth(5, *shape), noise(4, 5, *shape), smooth(4, 5, *shape), np.ones((4, 5)))
    explored = Exploration(
        exploring.STEPS,
        exploring.ETAS,
        np.linspace(0, 1, usual.positions),
        ["cat"] * 5,
        paths,
        Codes(*codes, ["cat"] * 5, ""),
    )
    assert len(explorer_html("", "", explored).encode()) < 5_000_000


CONTROLS = {  # → the pictures that it moves
    "steps": ["state", "predicted"],
    "eta": ["state", "predicted"],
    "place": ["state", "predicted"],
    "time": ["state", "predicted"],
    "code-steps": ["latent", "decoded"],
}
SHOWN = "JSON.stringify([...document.querySelectorAll('#ID canvas')].map(c => c.toDataURL()))"


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="needs Chromium or Chrome")
def test_in_a_browser(page, tmp_path):
    """Arrow keys move every slider, each moves its pictures, and a phone shows the whole width."""
    file = tmp_path / "page.html"
    file.write_text(page)
    with browser.Browser(browser.find()) as tab:
        for width, dark in ((1200, False), (360, True)):
            tab.open(file, width, dark=dark)
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("innerWidth") == width
            colour = tab.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", colour))) < 200) == dark
            for control, ids in CONTROLS.items():
                tab.run(f"document.getElementById('{control}').focus()")
                tab.press("Home")
                before = [tab.run(SHOWN.replace("ID", id)) for id in ids]
                said = tab.run(f"document.getElementById('{control}-value').textContent")
                tab.press("ArrowRight")
                after = [tab.run(SHOWN.replace("ID", id)) for id in ids]
                assert all(a != b for a, b in zip(before, after)), control
                assert tab.run(f"document.getElementById('{control}-value').textContent") != said
                tab.press("ArrowLeft")
                assert [tab.run(SHOWN.replace("ID", id)) for id in ids] == before
        tab.run("document.getElementById('steps').focus()")
        for control in list(CONTROLS)[1:]:
            tab.press("Tab")
            assert tab.run("document.activeElement.id") == control
        assert tab.complaints() == []
        assert {url.split("/")[-1] for url in tab.requests()} == {"page.html"}
