"""Pictures of one's own: batches of every layout, names, changes, resuming, bad input."""

import io
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from ddim_jax import data
from ddim_jax.cli import data as command
from ddim_jax.data import index, reader
from ddim_jax.pictures.images import crop_resize
from ddim_jax.storage.checkpoint import restore_config
from ddim_jax.training import DataConfig, fit
from tests.tiny import SCHEDULE, affine, affine_params, assert_same, make_config

pytestmark = pytest.mark.usefixtures("one_trace")

NUMBER, BATCH = 60, 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(index.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits():
    """60 digits in the order of their labels, as a folder of classes has them."""
    arrays = data.load("digits", f"train[:{NUMBER}]").arrays()
    order = np.argsort(arrays["label"], kind="stable")
    return arrays["image"][order], arrays["label"][order]


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits):
    """The digits in every layout: pictures/, digits.npz, digits.npy and labels.npy, and TFDS."""
    import tensorflow_datasets as tfds

    images, labels = digits
    home = tmp_path_factory.mktemp("layouts")
    for i, (image, label) in enumerate(zip(images, labels)):
        path = home / "pictures" / str(label) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    np.savez_compressed(home / "digits.npz", images=images, labels=labels)
    np.save(home / "digits.npy", images[..., 0])
    np.save(home / "labels.npy", labels.astype(np.uint8))

    class FewDigits(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, label) in enumerate(zip(images, labels)):
                yield i, {"image": Image.fromarray(image[..., 0]), "label": int(label)}

    FewDigits.__module__ = "__main__"
    FewDigits(data_dir=home / "tfds", file_format="array_record").download_and_prepare()
    return home


LAYOUTS = {
    "pictures": {"name": "pictures", "labels": "folders"},
    "npz": {"name": "digits.npz"},
    "npy": {"name": "digits.npy", "labels": "labels.npy"},
    "tfds": {"name": "few_digits", "data_dir": "tfds"},
}


def layout(home, kind, digits=None, **options):
    """One of the layouts, loaded from the folder that holds them all."""
    if kind == "arrays":
        return data.from_arrays(*digits, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return data.load(**LAYOUTS[kind], **options)


def first(dataset, count=6, **options):
    """The first batches: images, labels."""
    batches = data.batches(dataset, BATCH, seed=3, **options)
    drawn = [next(batches) for _ in range(count)]
    return [np.stack([batch[key] for batch in drawn]) for key in ("image", "label")]


@pytest.mark.parametrize("transform", [None, crop_resize((1, 0, 6, 7), 4)])
def test_every_layout_gives_the_same_batches(home, digits, transform):
    """By their numbers, so that the first loss is the same too."""
    expected = layout(home, "arrays", digits, transform=transform)
    assert expected.num_classes == 10
    order = np.concatenate([data.batch_indices(expected, BATCH, 3, k) for k in range(6)])
    pixels = [transform(image) if transform else image for image in digits[0][order]]
    images, labels = first(expected)
    np.testing.assert_array_equal(images.reshape(-1, *expected.image_shape), pixels)
    np.testing.assert_array_equal(labels.ravel(), digits[1][order])
    for kind in LAYOUTS:
        dataset = layout(home, kind, transform=transform)
        assert (dataset.num_classes, len(dataset)) == (10, NUMBER)
        named = kind in ("pictures", "tfds")  # by folders, and by TFDS's own facts
        assert dataset.label_names == (tuple("0123456789") if named else None)
        for got, wanted in zip(first(dataset, num_threads=1), (images, labels)):
            np.testing.assert_array_equal(got, wanted)
        assert json.loads(json.dumps(dataset.provenance)) == dataset.provenance
        late = first(dataset, 2, start=4, process_index=1, process_count=2)
        np.testing.assert_array_equal(late[0], images[4:, BATCH // 2 :])


@pytest.mark.parametrize("kind", ["arrays", *LAYOUTS])
def test_worker_processes_read_the_same(home, digits, monkeypatch, kind):
    """They get the reader pickled; a mapped file and a folder go as names."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(reader, "CACHE_BYTES", 0)
    dataset = layout(home, kind, digits, split="train[-50:]")
    packed = pickle.dumps(dataset.read)
    assert len(packed) < (8000 if kind in ("pictures", "npy") else 20_000)
    numbers = np.array([49, 0, 3])
    for got, wanted in zip(pickle.loads(packed)(numbers), dataset.read(numbers)):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(dataset.read(numbers)[0], digits[0][numbers + 10])


@pytest.mark.parametrize("kind", ["arrays", *LAYOUTS])
def test_a_part_of_each_layout_is_held_out(home, digits, kind):
    kept = data.hold_out(layout(home, kind, digits), 0.2)
    held = kept.held_out.arrays()["image"]
    assert (len(kept), len(held)) == (48, 12)
    together = np.concatenate([kept.arrays()["image"], held])
    rows = sorted(map(bytes, together)), sorted(map(bytes, digits[0]))
    assert rows[0] == rows[1]


def test_hugging_face_gives_the_same_batches(digits, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    images, labels = digits
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(10)}
    pictures = [Image.fromarray(image[..., 0]) for image in images]
    table = datasets.Dataset.from_dict(
        {"image": pictures, "label": labels.tolist()}, datasets.Features(features)
    )
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(9))}).save_to_disk(
        tmp_path / "two"
    )
    wanted = first(data.from_arrays(images, labels))
    for name in ("one", "two"):
        dataset = data.load(tmp_path / name)
        assert dataset.num_classes == 10
        for got, expected in zip(first(dataset), wanted):
            np.testing.assert_array_equal(got, expected)
    pickle.loads(pickle.dumps(dataset.read))(np.arange(3))
    assert len(data.load(tmp_path / "two", "test[:5]")) == 5
    assert dataset.provenance["digest"] == data.load(tmp_path / "one").provenance["digest"]
    assert "images of 8×8×1" in data.inspect(tmp_path / "one")[0]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
    named = data.load("hf:user/few:all", "train")
    assert asked == [(("user/few", "all"), {"split": "train"})]
    assert named.provenance["name"] == "hf:user/few:all"
    np.testing.assert_array_equal(first(named)[0], wanted[0])
    with pytest.raises(ValueError, match="has the splits train, test, got 'dev'"):
        data.load(tmp_path / "two", "dev")
    with pytest.raises(ValueError, match="no column 'kind'; it has image, label"):
        data.load(tmp_path / "one", labels="kind")
    table.remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has 0 columns of pictures, one is wanted: label"):
        data.load(tmp_path / "none")
    broken = table.cast_column("image", datasets.Image(decode=False)).select(range(3)).to_list()
    broken[1]["image"]["bytes"] = b"no picture"
    datasets.Dataset.from_list(broken, datasets.Features(features)).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"1 of 3 files in (.|\n)*  row 1: no picture of a kind"):
        data.load(tmp_path / "bad")
    with pytest.warns(UserWarning, match="row 1: no picture"):
        skipped = data.load(tmp_path / "bad", on_corrupt="skip")
    np.testing.assert_array_equal(skipped.arrays()["image"], images[[0, 2]])


@pytest.mark.parametrize("name", ["hf:mnist", "hf:user/set:config", "saved"])
def test_hugging_face_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    if name == "saved":
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "state.json").write_text("{}")
        name = str(tmp_path / "saved")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ddim_jax\[hf\]'"):
        data.load(name)


def test_what_is_registered_goes_before_a_path(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "few_digits", "mine"):
        shutil.copytree(home / "pictures" / "0", tmp_path / name)
    own = len(os.listdir("mine"))
    assert len(data.load("digits")) == 1797
    assert len(data.load("few_digits", data_dir=home / "tfds")) == NUMBER
    assert len(data.load("few_digits")) == own  # where it is not prepared
    for path in ("mine", "./digits", tmp_path / "digits", pathlib.Path("few_digits"), "mine/"):
        assert len(data.load(path)) == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("~/mine")) == own
    monkeypatch.chdir(tmp_path / "mine")
    assert data.load(".").provenance["name"] == "mine"


def test_of_a_folder_the_labels_are_asked_for(home, tmp_path):
    plain = data.load(home / "pictures")
    assert plain.num_classes is None
    assert set(plain.arrays()["label"]) == {-1}
    shutil.copytree(home / "pictures", tmp_path / "pictures")
    draw(tmp_path / "pictures" / "stray.png", 0)
    with pytest.raises(ValueError, match=r"1 of 61 files(.|\n)*in no class: it lies beside the"):
        data.load(tmp_path / "pictures", labels="folders")


@pytest.fixture
def pictures(tmp_path):
    """A folder of ten grey 4×4 pictures."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(10):
        draw(folder / f"{i}.png", i)
    return folder


def draw(path, value, shape=(4, 4)):
    pixels = np.random.default_rng(value).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)


def listing(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_a_second_start_reads_only_what_has_changed(pictures, cache, monkeypatch):
    looked, before = [], listing(pictures)
    examine = index.examine
    monkeypatch.setattr(index, "examine", lambda c: looked.append(c) or examine(c))
    once = data.load(pictures)
    assert len(looked) == 10
    again = data.load(pictures)
    assert len(looked) == 10
    assert again.provenance == once.provenance
    np.testing.assert_array_equal(again.arrays()["image"], once.arrays()["image"])
    draw(pictures / "3.png", 33)
    os.utime(pictures / "4.png")  # touched: read again, and the same
    changed = data.load(pictures)
    assert len(looked) == 12
    assert changed.provenance["digest"] != once.provenance["digest"]
    assert set(before) == set(listing(pictures))  # nothing is written into it
    assert list(cache.glob("*.json"))
    for kept in cache.glob("*.json"):
        kept.write_text("{")  # damaged: found anew
    assert data.load(pictures).provenance == changed.provenance
    assert len(looked) == 22


def test_a_stopped_start_goes_on(pictures, monkeypatch):
    looked, last = [], (pictures / "9.png").read_bytes()
    examine = index.examine

    def look(content):
        looked.append(content)
        if content == last and looked.count(last) == 1:
            raise KeyboardInterrupt
        return examine(content)

    monkeypatch.setattr(index, "BLOCK", 4)
    monkeypatch.setattr(index, "CHUNK", 1)
    monkeypatch.setattr(index, "examine", look)
    with pytest.raises(KeyboardInterrupt):
        data.load(pictures)
    assert len(data.load(pictures)) == 10
    assert len(looked) == 10 + 2  # eight were kept


def test_what_could_not_be_read_is_tried_again(pictures, monkeypatch):
    read = pathlib.Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", lambda p: read(p / "gone"))
        with pytest.raises(ValueError, match="10 of 10 files"):
            data.load(pictures)
    assert len(data.load(pictures)) == 10


def test_a_cache_that_cannot_be_written_is_said(pictures, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(index.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="cannot be kept in .*below"):
        assert len(data.load(pictures)) == 10
    monkeypatch.delenv(index.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/b")
    assert index.cache_folder() == pathlib.Path("/a/b/ddim_jax/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert index.cache_folder() == pathlib.Path("~/.cache/ddim_jax/data").expanduser()


def test_changes_are_named_file_by_file(pictures, cache):
    old = data.load(pictures).provenance
    (pictures / "0.png").unlink()
    draw(pictures / "1.png", 11)
    for i in range(7):
        draw(pictures / f"new {i}.png", 20 + i)
    new = data.load(pictures).provenance
    assert data.changes(old, new) == [
        "  files added: new 0.png, new 1.png, new 2.png, new 3.png, new 4.png, … (7 in all)",
        "  files removed: 0.png",
        "  files changed: 1.png",
    ]
    assert data.changes(old, old) == data.changes({"source": "arrays"}, new) == []
    shutil.rmtree(cache / "contents")
    assert "which files differ is not known" in data.changes(old, new)[0]


def run(directory, folder, updates, resume="never"):
    config = make_config(num_updates=updates, checkpoint_every=3, sample_every=0)
    dataset = DataConfig(str(folder), holdout=2).load()
    return fit(
        affine,
        affine_params(),
        SCHEDULE,
        dataset,
        config,
        directory,
        facts={"model": {"kind": "affine"}},
        resume=resume,
        progress=False,
        say=lambda text: None,
    )


@pytest.mark.slow
def test_a_run_on_a_folder_resumes_to_the_bit_and_notices_changes(pictures, tmp_path, one_device):
    whole = run(tmp_path / "whole", pictures, 6)
    run(tmp_path / "parts", pictures, 3)
    moved = pictures.parent / "elsewhere" / "mine"
    shutil.copytree(pictures, moved)
    assert_same(run(tmp_path / "parts", moved, 6, resume="must"), whole)
    assert restore_config(tmp_path / "parts" / "checkpoints")["data"]["holdout"] == 2
    renamed = moved.rename(moved.with_name("yours"))  # the content is what counts
    run(tmp_path / "parts", renamed, 7, resume="must")
    draw(pictures / "7.png", 77)
    with pytest.raises(ValueError, match=r"these differ:(.|\n)*data.digest(.|\n)*changed: 7.png"):
        run(tmp_path / "parts", pictures, 9, resume="must")


def save(path, content):
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content)
    return path


GOOD = np.zeros((5, 4, 4, 3), np.uint8)
OBJECTS = np.array([{}, []], object)


def cut_array():
    np.save(file := io.BytesIO(), GOOD)
    return file.getvalue()[:200]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.npy", GOOD.astype(np.float32), {}, r"float32 \(5, 4, 4, 3\); images are uint8"),
        ("a.npy", GOOD.transpose(0, 3, 1, 2), {}, r"channels come last.*transpose\(0, 2, 3, 1\)"),
        ("a.npy", GOOD[..., :2], {}, r"\(5, 4, 4, 2\); images are \(N, H, W\)"),
        ("a.npy", GOOD[0, 0], {}, r"\(4, 3\); images are"),
        ("a.npy", GOOD[:0], {}, "holds no images"),
        ("a.npy", OBJECTS, {}, "cannot be read as NumPy's .npy"),
        ("a.npy", b"", {}, "cannot be read as NumPy's .npy"),
        ("a.npy", cut_array(), {}, "cannot be read as NumPy's .npy"),
        ("a.npz", b"PK\x03\x04 and no more", {}, "cannot be read as NumPy's .npz"),
        ("a.npz", {"x": GOOD, "y": GOOD}, {}, r"holds x uint8 \(5, 4, 4, 3\), y uint8.*'images'"),
        ("a.npz", {}, {}, "holds nothing: call the images"),
        ("a.npz", {"images": GOOD, "labels": np.zeros(4, int)}, {}, r"must be 5 integers.*\(4,\)"),
        ("a.npz", {"x": GOOD, "labels": np.zeros(5)}, {}, "must be 5 integers.*float64"),
        ("a.npz", {"x": GOOD, "labels": np.arange(5) - 1}, {}, r"0, 1, 2, …, got -1..3"),
        ("a.npy", GOOD, {"labels": "folders"}, "are a file .npy with an integer for each image"),
        ("a.npy", GOOD, {"background": "white"}, "background and channels are for picture"),
        ("a.npy", GOOD, {"split": "test"}, "has one split, 'train'"),
        ("a.npy", GOOD, {"split": "train[7:]"}, "reaches beyond the 5 images"),
        ("a.zip", b"PK", {}, "is one file, and no .npy or .npz: give the folder"),
    ],
)
def test_bad_files(tmp_path, name, content, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(save(tmp_path / name, content), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "classes"}, "labels of a folder are its sub-folders"),
        ({"labels": "folders"}, "has no sub-folders with pictures to be classes"),
        ({"background": "whitish"}, "a background is an opaque colour .*got 'whitish'"),
        ({"background": "#ffffff80"}, "a background is an opaque colour"),
        ({"split": "validation"}, "has one split, 'train' or a slice"),
        ({"channels": 2}, "channels must be 1, 3 or None, got 2"),
        ({"on_corrupt": "ignore"}, "on_corrupt must be"),
        ({"transform": crop_resize((2, 2, 3, 2), None)}, "too small for the crop"),
    ],
)
def test_bad_options_of_a_folder(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(pictures, **options)


def test_bad_folders(pictures, tmp_path):
    draw(pictures / "other.png", 0, (5, 4))
    with pytest.raises(ValueError, match=r"2 sizes, 10 of 4×4, 1 of 5×4: .*--data.resize 32"):
        data.load(pictures)
    assert data.load(pictures, transform=crop_resize(None, 4)).image_shape == (4, 4, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        data.load(tmp_path / "empty")
    (tmp_path / "empty" / "shard.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no pictures .*; it holds shard.npy"):
        data.load(tmp_path / "empty")
    for name in ("features.json", "dataset_info.json"):
        (tmp_path / "empty" / name).write_text("{}")
    with pytest.raises(ValueError, match="is a data set prepared by TFDS"):
        data.load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["./mien", "~/none/at all", "nothing.npy", "nothing.npz", "/a/b"])
def test_a_path_to_nothing(pictures, monkeypatch, name):
    monkeypatch.chdir(pictures.parent)
    with pytest.raises(FileNotFoundError, match="there is no file or folder") as error:
        data.load(name)
    assert str(error.value).endswith("mine?") == (name == "./mien")


def zeros(split, transform):
    return data.from_arrays(np.zeros((4, 4, 4), np.uint8))


def test_a_bare_name_says_what_there_is_and_how_a_path_is_given():
    for labels in (None, "folders"):  # of what is not there it is not said that it has its own
        with pytest.raises(ValueError, match=r"Available: digits.* a path is written ./nowhere"):
            data.load("nowhere", labels=labels)
    for name in ("digits", "tests.test_own_data:zeros"):
        with pytest.raises(ValueError, match="are for pictures of your own"):
            data.load(name, labels="folders")
    with pytest.raises(ValueError, match="hf:NAME or hf:NAME:CONFIG, got 'hf:a b'"):
        data.load("hf:a b")


def test_grey_is_read_as_colour_by_choice_and_colour_as_grey_where_it_has_none(pictures):
    grey = data.load(pictures).arrays()["image"]
    np.testing.assert_array_equal(
        data.load(pictures, channels=3).arrays()["image"], np.repeat(grey, 3, -1)
    )
    Image.fromarray(np.repeat(grey[0], 3, -1)).save(pictures / "triple.png")
    assert data.load(pictures).image_shape == (4, 4, 3)
    np.testing.assert_array_equal(
        data.load(pictures, channels=1).arrays()["image"], np.concatenate([grey, grey[:1]])
    )
    assert "none has colours: --data.channels 1" in data.inspect(pictures)[0]
    draw(pictures / "z.png", 0, (4, 4, 3))
    assert "none has colours" not in data.inspect(pictures)[0]
    with pytest.raises(ValueError, match=r"1 of 12 files(.|\n)*z.png: it has colours, where grey"):
        data.load(pictures, channels=1)


def test_grey_on_grey_stays_grey_and_on_colour_becomes_colour(tmp_path):
    (tmp_path / "clear").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 2), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear" / "0.png")
    shapes = {c: data.load(tmp_path / "clear", background=c).image_shape for c in ("#777", "red")}
    assert shapes == {"#777": (4, 4, 1), "red": (4, 4, 3)}
    with pytest.raises(ValueError, match="it has colours, where grey is wanted"):
        data.load(tmp_path / "clear", background="red", channels=1)


def test_one_picture_is_a_data_set(tmp_path):
    (tmp_path / "one").mkdir()
    draw(tmp_path / "one" / "0.png", 0, (4, 6, 3))
    dataset = data.load(tmp_path / "one")
    assert (len(dataset), dataset.image_shape) == (1, (4, 6, 3))
    assert next(data.batches(dataset, 3, 0))["image"].shape == (3, 4, 6, 3)


def test_a_file_that_vanishes_is_named(pictures, monkeypatch):
    monkeypatch.setattr(reader, "CACHE_BYTES", 0)
    dataset = data.load(pictures)
    (pictures / "7.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read image 7 .*7\.png"):
        dataset.take(np.array([7]))


def test_inspect_command(home, pictures, tmp_path, capsys):
    command.data("inspect", str(home / "pictures"), out=tmp_path / "sheet.png", labels="folders")
    said = capsys.readouterr().out
    assert f"{home / 'pictures'}: 60 pictures" in said
    assert "8 of 0, 6 of 1" in said
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 65 + 1, 8 * 65 + 1)
    with pytest.raises(FileExistsError, match="choose another name"):
        command.data("inspect", str(pictures), out=tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"must end in .png, the format written, got .*sheet.jpg"):
        command.data("inspect", str(pictures), out=tmp_path / "sheet.jpg")
    with pytest.raises(NotADirectoryError, match="cannot be written"):
        command.data("inspect", "no matter", out=tmp_path / "sheet.png" / "a.png")
    (tmp_path / "empty").mkdir()
    command.data("inspect", str(tmp_path / "empty"), out=tmp_path / "none.png")
    assert "contact sheet none, as no picture" in capsys.readouterr().out
    draw(pictures / "sub.png", 1, (9, 9))
    command.data("inspect", str(pictures))
    assert "bring them to one size" in capsys.readouterr().out
    for name in (home / "digits.npz", "few_digits"):
        command.data("inspect", str(name), data_dir=home / "tfds")
        assert "60 images of 8×8×1\nclasses       10: 8 of 0," in capsys.readouterr().out
    with pytest.raises(ValueError, match="data inspect DIR"):
        command.data("inspect")
