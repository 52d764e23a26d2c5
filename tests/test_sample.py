"""`ddim-jax sample`: files, animations and pages, and classes by name, in process."""

import base64
import dataclasses
import html.parser
import io
import json
import os
import re
import shlex
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ddim_jax as ddim
from ddim_jax import cli
from ddim_jax.cli.sample import _kept, _shown
from ddim_jax.cli.ways import Sampling
from ddim_jax.data import load
from ddim_jax.evaluation import frechet_distance, moments
from ddim_jax.generation.condition import class_numbers, condition, name_of
from ddim_jax.generation.drawing import make_drawer
from ddim_jax.generation.shards import generate, iter_shards
from ddim_jax.networks.unet import UNetConfig, build, make_apply
from ddim_jax.pictures.animation import encode_animation
from ddim_jax.pictures.images import grid, to_uint8
from ddim_jax.sampling import find_method
from ddim_jax.weights import to_facts

pytestmark = pytest.mark.usefixtures("one_trace")
NAMES = ["cat", "polar bear", "7"]
DRAWING = "m.safetensors --num-images 5 --steps 3 --batch-size 2"


@pytest.fixture(scope="module")
def model():
    """Three classes with names, 8×8, random weights; it says that it learned to draw without."""
    config = UNetConfig(
        *(8, 1, 16, (1,)),
        num_blocks=1,
        attention_resolutions=(),
        dropout=0.0,
        num_classes=3,
        norm_groups=4,
    )
    apply_fn, params = build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.05, p.shape).astype(np.float32), params)
    schedule = ddim.ScheduleConfig("cosine")
    facts = to_facts(schedule, config, "x_0")
    facts |= {"label_names": NAMES, "train": {"label_dropout": 0.1}}
    return ddim.Model(ddim.predicts(apply_fn, "x_0"), params, schedule.build(), config, facts)


@pytest.fixture
def command(model, monkeypatch, tmp_path, capsys):
    """Runs `ddim-jax …` in a folder that holds the model; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_stop_on_signals", lambda said: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "keep the test's own")
    ddim.save_model("m.safetensors", model)

    def run(line):
        monkeypatch.setattr("sys.argv", ["ddim-jax", *shlex.split(line)])
        cli.main()
        return capsys.readouterr().out

    return run


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture)


def frames(file):
    """All frames, RGB, with their milliseconds."""
    with Image.open(file) as picture:
        assert picture.info["loop"] == 0  # for ever
        shown = []
        for number in range(picture.n_frames):
            picture.seek(number)
            shown.append((np.asarray(picture.convert("RGB")), picture.info["duration"]))
    return shown


class Page(html.parser.HTMLParser):
    """What a reader sees of a page: images, commands, captions; and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.texts, self.links = [], [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag == "img":
            content = base64.b64decode(dict(attrs)["src"].partition("base64,")[2], validate=True)
            self.images.append(pixels(io.BytesIO(content)))
            self.alts = [*getattr(self, "alts", []), dict(attrs)["alt"]]
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_one_call_writes_every_kind_of_file(command, model, tmp_path):
    files = "--out d.png --each singles --gif d.gif --webp d.webp --html d.html"
    said = command(f"sample {DRAWING} --labels cat,2 --guidance 2 {files}")
    assert said.count("wrote ") == 5
    assert "singles: 5 files, 00000-cat.png to 00004-cat.png" in said

    # The single files are the grid's images, and those that `generate` draws.
    key = jax.random.split(jax.random.key(0))[0]
    x_T = ddim.initial_noise(key, 5, (8, 8, 1))
    labels = jnp.array([0, 2, 0, 2, 0])

    def network(x, t, y):
        return model.apply_fn(model.params, x, t, labels=y)

    guided = ddim.classifier_free_labels(ddim.predicts(network, "x_0"), labels, 3, 2.0)
    path = ddim.trajectory(guided, x_T, model.schedule, [333, 666, 1000])
    names = [f"0000{k}-{'cat' if k % 2 == 0 else '7'}.png" for k in range(5)]
    assert sorted(path.name for path in (tmp_path / "singles").iterdir()) == names
    singles = np.stack([pixels(tmp_path / "singles" / name) for name in names])
    assert singles.dtype == np.uint8
    assert np.abs(singles[..., None] - np.asarray(to_uint8(path.sample)).astype(int)).max() <= 1
    whole = grid(singles[..., None], scale=8)
    np.testing.assert_array_equal(pixels("d.png"), whole)
    with Image.open(tmp_path / "singles" / names[3]) as picture:
        facts = json.loads(picture.text["ddim_jax"])
    assert (facts["number"], facts["class"], facts["guidance"]) == (3, "7", 2.0)

    # The animations end with it, and begin with the x̂_0 of the first steps.
    for file in ("d.gif", "d.webp"):
        shown = frames(file)
        assert [time for _, time in shown] == [80, 80, 1500]
        np.testing.assert_array_equal(shown[-1][0], whole)
        for (frame, _), x_0 in zip(shown[:2], path.x_0):
            assert np.abs(frame.astype(int) - grid(x_0, scale=8)).max() <= 1

    # The page holds the images as they are, and commands that draw them again.
    text = (tmp_path / "d.html").read_text()
    page = Page(text)
    np.testing.assert_array_equal(np.stack(page.images), singles)
    assert not [link for link in page.links if not link.startswith("data:image/png;base64,")]
    assert page.alts == [f"image {k}, class {'cat' if k % 2 == 0 else '7'}" for k in range(5)]
    assert "script" not in text
    assert "guidance 2, seed 0" in page.texts["div"][3]
    again = page.texts["code"][3]
    assert again.startswith("ddim-jax sample m.safetensors --steps 3 --guidance 2 --label 7 ")
    command(again.removeprefix("ddim-jax ") + " --each again")
    np.testing.assert_array_equal(pixels("again/00003-7.png"), singles[3])

    # Nothing of it is overwritten unasked, and it is said before the model is read.
    for kind in ("out d.png", "gif d.gif", "webp d.webp", "html d.html"):
        with pytest.raises(SystemExit, match=r"exists; choose another --\w+, or pass --overwrite"):
            command(f"sample nothing --{kind}")
    (tmp_path / "singles" / names[0]).unlink()
    with pytest.raises(SystemExit, match=r"00001-7.png exists, one of 4; choose another --each"):
        command(f"sample {DRAWING} --labels cat,2 --each singles")
    assert not (tmp_path / "singles" / names[0]).exists()


@pytest.mark.slow
def test_the_number_of_devices_changes_no_bit(model):
    """Images and their way, drawn by one device and by all eight."""
    asked = condition(model, "all", 2.0, (300, 800))
    numbers, found = np.arange(16, dtype=np.uint32), []
    for devices in (jax.devices()[:1], jax.devices()):
        drawn, spread = make_drawer(
            *(model, np.array([333, 666, 1000]), find_method("ddpm"), asked, 5),
            keep=np.array([True, True, False]),
            devices=devices,
        )
        parts = [drawn(part) for part in np.split(numbers, 8 // spread)]
        found.append([np.concatenate(arrays) for arrays in zip(*parts)])
    for one, all_of_them in zip(*found):
        np.testing.assert_array_equal(one, all_of_them)
    assert found[0][2].shape == (16, 2, 8, 8, 1)


def test_an_interval_in_parts_of_T_is_one_in_t(command, model):
    """The same images as `generate` draws; and by the definition of the guided denoiser."""
    command(f"sample {DRAWING} --label cat --guidance 4 --guidance-interval 0.4,0.8 --each a")
    folder = generate(
        model, "b", 5, [333, 666, 1000], labels=0, guidance=4.0, guidance_interval=(400, 800),
        batch_size=2, shard_size=2, progress=False,
    )  # fmt: skip
    drawn = np.stack([pixels(f"a/0000{k}-cat.png") for k in range(5)])[..., None]
    np.testing.assert_array_equal(np.concatenate(list(iter_shards(folder))), drawn)

    def denoise(x, t):  # guided at t = 666 alone
        y, none = (model.apply_fn(model.params, x, t, labels=jnp.full(5, k)) for k in (0, 3))
        return none + jnp.where(t[0] == 666, 4.0, 1.0) * (y - none)

    x_T = ddim.initial_noise(jax.random.split(jax.random.key(0))[0], 5, (8, 8, 1))
    wanted = ddim.sample(ddim.predicts(denoise, "x_0"), x_T, model.schedule, [333, 666, 1000])
    assert np.abs(drawn - np.asarray(to_uint8(wanted)).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("given", "interval"),
    [("0.2,0.8", (200, 800)), ("0.29,1.0", (290, 1000)), ("200,800", (200, 800)),
     ("1,1", (1, 1)), ("0.0,0.0015", (1, 1)), (None, None)],
)  # fmt: skip
def test_what_an_interval_means(given, interval):
    assert Sampling(guidance=2.0, guidance_interval=given).interval(1000) == interval


def test_classes_by_number_name_and_list(model):
    def found(labels):
        return condition(model, labels).labels

    assert found("polar bear") == found("1") == found(1) == found(np.int64(1)) == (1,)
    assert found("7") == found("2") == (2,)  # a name goes before a number
    assert found(["cat", "none", 0]) == (0, 3, 0)
    assert found("all") == (0, 1, 2)
    assert condition(model).labels is None  # and no warning: it learned to
    assert [name_of(model, k) for k in range(4)] == [*NAMES, "none"]
    named = model._replace(facts=model.facts | {"label_names": ["cat", "none", "dog"]})
    for label in range(4):  # what a class is called draws it again
        assert condition(named, name_of(named, label)).labels == (label,)
    with pytest.raises(ValueError, match="has 3 classes, and its facts 2 names"):
        condition(model._replace(facts={"label_names": ["a", "b"]}), 0)
    with pytest.raises(ValueError, match=re.escape(f"or one of its names {list('abcdefghij')}")):
        class_numbers("k", 10, "abcdefghij")  # all of them are named
    with pytest.raises(TypeError, match=r"labels must be a class .* got 1\.5"):
        condition(model, 1.5)
    with pytest.raises(TypeError, match="got True"):
        condition(model, True)
    with pytest.raises(TypeError, match=r"two whole numbers in 1\.\.1000, got \(0\.2, 0\.8\)"):
        condition(model, 0, 2.0, (0.2, 0.8))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--label horse", "unknown class 'horse': .*or one of its names .*'cat', 'polar bear'"),
        ("--label cta", "unknown class 'cta'; did you mean 'cat'"),
        ("--label 4", r"a class in 0\.\.2, 3 or 'none' for none, .*got 4"),
        ("--label=-1", "got -1"),
        ("--label ''", "--label holds an empty name"),
        ("--labels 0,9", "got 9"),
        ("--labels 0,,1", "--labels holds an empty name, got '0,,1'"),
        ("--labels cat,dog", "unknown class 'dog'"),
        ("--label 1 --labels all", "give --label or --labels, not both"),
        ("--guidance 2", "--guidance is towards a class: give --label or --labels"),
        ("--label 1 --guidance nan", "--guidance must be finite, got nan"),
        ("--label 1 --guidance-interval 0.2,0.8", "--guidance-interval is for guidance"),
        ("--label 1 --guidance 2 --guidance-interval 0.8,0.2", "from low to high, got 0.8,0.2"),
        ("--label 1 --guidance 2 --guidance-interval 0.2", "takes two numbers, .* got '0.2'"),
        ("--label 1 --guidance 2 --guidance-interval a,b", "takes two numbers"),
        ("--label 1 --guidance 2 --guidance-interval 0.5,800", "parts of T in 0..1, or whole"),
        ("--label 1 --guidance 2 --guidance-interval 0,800", r"1 <= lo <= hi <= T = 1000, got \(0"),
        ("--label 1 --guidance 2 --guidance-interval 5,1001", "1 <= lo <= hi <= T = 1000"),
        ("--label 1 --guidance 2 --guidance-interval 0.0001,0.0002", r"got \(1, 0\)"),
        ("--gif d.webp", "--gif must end in .gif"),
        ("--webp d.gif", "--webp must end in .webp"),
        ("--html d.htm", "--html must end in .html"),
        ("--first -1", r"--first must be in 0\.\."),
        ("--first 2147483647", r"--first must be in 0\.\."),
        ("--each m.safetensors", "cannot be written: .* is a file"),
        ("--html m.safetensors/d.html", "cannot be written: .* is a file"),
    ],
)
def test_bad_options_are_named_before_anything_is_drawn(command, tmp_path, options, says):
    with pytest.raises(SystemExit, match=f"(?s)^ddim-jax: error: .*{says}"):
        command(f"sample {DRAWING} {options}")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_model_without_classes_is_asked_for_none(command, model):
    params = {k: v for k, v in model.params.items() if k != "label_embedding"}
    config = dataclasses.replace(model.config, num_classes=None)
    ddim.save_model("plain.safetensors", model._replace(params=params, config=config))
    for line in ("--label 1", "--labels all --guidance 2"):
        with pytest.raises(SystemExit, match="the model has no classes: .* got labels="):
            command(f"sample plain.safetensors {line}")
        with pytest.raises(SystemExit, match="the model has no classes"):
            command(f"generate plain.safetensors {line} --out many")


def test_info_and_files_know_the_names(command, model):
    assert "label_names: ['cat', 'polar bear', '7']" in command("info m.safetensors")
    command("export m.safetensors folder --diffusers")
    loaded = ddim.load_model("folder")
    assert (loaded.label_names, loaded.config) == (tuple(NAMES), model.config)


@pytest.mark.slow
def test_evaluate_takes_classes_by_the_same_options(command):
    """Images drawn as 'cat' and '7' in turn, of the classes 0 and 2 of ten; the data's likewise."""
    config = dataclasses.replace(ddim.load_model("m.safetensors").config, num_classes=10)
    _, params = build(config, jax.random.key(0))
    names = ["cat", *"123456", "7", *"89"]
    facts = to_facts(ddim.ScheduleConfig(), config) | {"label_names": names}
    model = ddim.Model(make_apply(config), params, ddim.linear_schedule(1000), config, facts)
    folder = generate(model, "many", 12, 1, labels=["cat", 7], batch_size=12, shard_size=12,
                      devices=jax.devices()[:1], progress=False)  # fmt: skip
    drawn, data = next(iter_shards(folder)), load("digits").arrays()
    for options, some, real in [
        ("--label cat", drawn[::2], data["label"] == 0),
        ("--labels 7,cat", drawn, np.isin(data["label"], [0, 7])),
    ]:
        found = command(f"evaluate many --data digits --blocks 0 {options}")
        wanted = frechet_distance(*(moments(v / 127.5 - 1) for v in (some, data["image"][real])))
        assert float(re.match("FD-pixels ([0-9.]+)", found)[1]) == pytest.approx(wanted, rel=1e-3)
    assert set(os.listdir()) >= {"digits-train-cat-pixels.npz", "digits-train-7,cat-pixels.npz"}
    for options, says in [
        ("--label 3", r"many holds no image of the classes \(3,\)"),
        ("--label dog", "unknown class 'dog'"),
        ("--label 0 --labels all", "not both"),
    ]:
        with pytest.raises(SystemExit, match=says):
            command(f"evaluate many --data digits --blocks 0 {options}")
    for kind in "abcdefgh":  # pictures of one's own, of which those of "h" are the class 7
        os.makedirs(f"pets/{kind}")
        for number in range(4):
            Image.new("L", (8, 8), 20 * number * (kind == "h")).save(f"pets/{kind}/{number}.png")
    line = "evaluate many --data pets --blocks 0 --label 7"
    with pytest.raises(SystemExit, match="pets has no labels: say where they are, --data-labels"):
        command(line)
    found = float(command(f"{line} --data-labels folders").split()[1].strip(","))
    real = np.broadcast_to(np.arange(0, 80, 20)[:, None, None, None], (4, 8, 8, 1))
    wanted = frechet_distance(*(moments(v / 127.5 - 1) for v in (drawn[1::2], real)))
    assert found == pytest.approx(wanted, rel=1e-3)
    command("generate digits --num-images 2 --steps 1 --out plain --batch-size 2 --shard-size 2")
    with pytest.raises(SystemExit, match="drawn without classes: leave out --label and --labels"):
        command("evaluate plain --data digits --blocks 0 --label 1")


def test_animations():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (3, 8, 9, 3), np.uint8)
    for kind, exact in (("webp", True), ("gif", False)):
        shown = frames(io.BytesIO(encode_animation(colours, kind, 40, 900)))
        assert [time for _, time in shown] == [40, 40, 900]
        if exact:
            np.testing.assert_array_equal([frame for frame, _ in shown], colours)
    one = encode_animation(colours[:1], "gif")
    with Image.open(io.BytesIO(one)) as picture:
        assert picture.size == (9, 8)
    with pytest.raises(ValueError, match="an animation is 'gif' or 'webp', got 'mp4'"):
        encode_animation(colours, "mp4")
    with pytest.raises(ValueError, match=r"frames must be uint8 \(K, H, W, 3\), got float64"):
        encode_animation(colours / 255, "gif")


def test_an_animation_is_of_sensible_size():
    for shape in ((8, 8, 1), (32, 48, 3), (256, 256, 3), (2048, 8, 3)):
        count = _shown(10_000, shape)
        scale = max(1, 64 // shape[0])
        tiled = grid(np.zeros((count, *shape), np.uint8), scale=scale)
        assert count == 1 or max(tiled.shape) <= 1024
    assert _shown(3, (8, 8, 1)) == 3
    assert _kept(1).tolist() == [False]
    assert _kept(3).tolist() == [True, True, False]
    assert (_kept(1000).sum(), _kept(1000)[0], _kept(1000)[-1]) == (29, True, False)


def test_file_names_say_what_is_drawn():
    named = {
        Sampling(): "-S50-eta0-seed0",
        Sampling(labels="0,1", guidance=2.0): "-labels0,1-w2-S50-eta0-seed0",
        Sampling(label="polar bear"): "-labelpolar_bear-S50-eta0-seed0",
    }
    for sampling, stem in named.items():
        assert sampling.stem == stem
    assert re.search("label cat, guidance 2", str(Sampling(label="cat", guidance=2.0)))
