"""TFDS without TensorFlow: images, caches, damage of every kind, what there is and preparing it."""

import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from ddim_jax import data
from ddim_jax.data import reader
from ddim_jax.data import tfds as _tfds
from ddim_jax.data.reader import Reader
from ddim_jax.pictures.images import crop_resize


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with one TFDS data set, prepared here: 20 images, two of another size."""
    import tensorflow_datasets as tfds

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        """Image i is filled with the value i and has the label i % 3."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {
                "train": self._generate_examples(0, 18, (6, 5)),
                "mixed": self._generate_examples(18, 20),
            }

        def _generate_examples(self, start, stop, shape=None):
            for i in range(start, stop):
                pixels = np.full((*(shape or (i, i)), 3), i, np.uint8)
                yield i, {"image": Image.fromarray(pixels), "label": i % 3}

    TinyImages.__module__ = "__main__"  # or TFDS looks for files beside this module
    directory = tmp_path_factory.mktemp("tfds")
    TinyImages(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_tfds_images_and_labels(prepared, monkeypatch, cache_bytes):
    modules = set(sys.modules)
    monkeypatch.setattr(reader, "CACHE_BYTES", cache_bytes)
    tiny = data.load("tiny_images", data_dir=prepared)
    assert (len(tiny), tiny.image_shape, tiny.num_classes) == (18, (6, 5, 3), 3)
    assert tiny.label_names == ("red", "green", "blue")
    for _ in range(2):  # decoded, then kept
        arrays = tiny.arrays()
        values = arrays["image"][:, 0, 0, 0]
        np.testing.assert_array_equal(np.sort(values), np.arange(18))
        np.testing.assert_array_equal(arrays["label"], values % 3)
        assert (arrays["image"] == values[:, None, None, None]).all()
    assert next(data.batches(tiny, 4, 0))["image"].shape == (4, 6, 5, 3)
    assert len(data.load("tiny_images:1.0.0", "train[:50%]", prepared)) == 9
    assert tiny.provenance["name"] == "tiny_images/1.0.0"
    assert "tensorflow" not in set(sys.modules) - modules


class Listed(list):
    """Records that count their readings; a string stands for one that cannot be read."""

    def __init__(self, items):
        super().__init__(items)
        self.reads = []

    def __getitem__(self, index):
        self.reads.append(index)
        if isinstance(value := super().__getitem__(index), str):
            raise OSError(value)
        return np.full((2, 2, 1), value, np.uint8), value


def test_the_cache_reads_each_record_once_and_workers_get_none_of_it(monkeypatch):
    records = Listed(range(10))
    read = Reader(records, "counted")
    for _ in range(3):
        np.testing.assert_array_equal(read(np.array([3, 1, 4]))[0][:, 0, 0, 0], [3, 1, 4])
    assert sorted(records.reads) == [0, 1, 3, 4]  # 0 for the shape
    copy = pickle.loads(pickle.dumps(read))
    assert copy.cache is None
    np.testing.assert_array_equal(copy(np.array([3, 1, 4]))[1], [3, 1, 4])


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_skipped_record_is_replaced_by_the_next_readable_one(monkeypatch, cache_bytes):
    monkeypatch.setattr(reader, "CACHE_BYTES", cache_bytes)
    records = Listed(["bad", 11, "bad", "bad", 14, 15, "bad"])
    read = Reader(records, "counted", skip=True)
    for _ in range(2):
        assert read(np.arange(7))[1].tolist() == [11, 11, 14, 14, 14, 15, 11]
    assert read.unreadable == dict.fromkeys([0, 2, 3, 6], "OSError: bad")
    assert sum(isinstance(list.__getitem__(records, i), str) for i in records.reads) == 4
    with pytest.raises(ValueError, match=r"counted: none of its 3 images can be read \(OSError: a"):
        Reader(Listed(["a", "b", "c"]), "counted", skip=True)
    with pytest.raises(ValueError, match=r"counted: cannot read image 0 \(OSError: a\); restore"):
        Reader(Listed(["a", 1]), "counted")


def test_running_out_of_memory_is_no_damage():
    class Huge(Listed):
        def __getitem__(self, index):
            raise MemoryError

    with pytest.raises(MemoryError):
        Reader(Huge(range(3)), "huge", skip=True)


def test_images_of_several_sizes_ask_for_a_transform(prepared):
    with pytest.raises(ValueError, match="pass a `transform` that crops or resizes"):
        data.load("tiny_images", "mixed", prepared).arrays()
    cropped = data.load("tiny_images", "mixed", prepared, transform=lambda image: image[:4, :4])
    assert cropped.arrays()["image"].shape == (2, 4, 4, 3)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """40 noisy PNGs of 64×64 (a record is 12 KB); two were never pictures; and the pixels."""
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)

    class NoisyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(64, 64, 3)),
                "label": tfds.features.ClassLabel(num_classes=40),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(pixels):
                Image.fromarray(image).save(file := io.BytesIO(), "PNG")
                png = {7: b"never a picture", 9: file.getvalue()[:300]}.get(i, file.getvalue())
                yield i, {"image": png, "label": i}

    NoisyImages.__module__ = "__main__"
    directory = tmp_path_factory.mktemp("damaged")
    NoisyImages(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory, pixels


def test_a_picture_that_does_not_decode(damaged):
    directory, pixels = damaged
    with pytest.raises(
        ValueError, match=r"noisy_images/1.0.0 train: cannot read image \d+"
    ) as error:
        data.load("noisy_images", data_dir=directory).arrays()
    assert 'on_corrupt="skip"' in str(error.value)
    dataset = data.load("noisy_images", data_dir=directory, on_corrupt="skip")
    assert dataset.skipped == []
    with pytest.warns(UserWarning, match="cannot be read and is replaced") as warned:
        labels = dataset.arrays()["label"]
    assert len(warned) == len(dataset.skipped) == 2
    for index, warning in zip(dataset.skipped, warned):
        assert f"image {index} cannot be read" in str(warning.message)
        assert labels[index] == labels[(index + 1) % 40] or index + 1 in dataset.skipped
    assert set(range(40)) - set(labels) == {7, 9}
    np.testing.assert_array_equal(dataset.arrays()["image"], pixels[labels])  # and warns no more
    assert dataset.provenance["on_corrupt"] == "skip"
    assert "on_corrupt" not in data.load("noisy_images", data_dir=directory).provenance


def labels_of(batches):
    return np.concatenate([next(batches)["label"] for _ in range(10)])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_skipping_in_batches_and_workers(damaged, workers):
    """The same batches, and in the end the same warnings, whoever reads the records."""
    results = []
    for threads, readers in ((0, 0), (1, workers)):
        dataset = data.load("noisy_images", data_dir=damaged[0], on_corrupt="skip")
        batches = data.batches(
            dataset, 8, 0, num_workers=readers, num_threads=threads, prefetch=threads
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            labels = labels_of(batches)
        results.append((labels.tolist(), dataset.skipped))
        assert len(warned) == len(dataset.skipped) == 2
    assert results[0] == results[1]
    stopping = data.load("noisy_images", data_dir=damaged[0])
    with pytest.raises(ValueError, match=r"noisy_images/1.0.0 train: cannot read image \d+"):
        labels_of(data.batches(stopping, 8, 0, num_workers=workers))


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ("one bit", 1),
        ("a gap", 1),
        ("half", 40),
        ("nothing left", 40),
        ("no file", 40),
    ],
)
def test_damage_to_the_file_is_found_and_named(damaged, tmp_path, damage, lost):
    """Whatever is lost, what is read is right."""
    directory, pixels = damaged
    shutil.copytree(directory / "noisy_images", tmp_path / "noisy_images")
    (file,) = tmp_path.glob("noisy_images/*/*train*")
    content = bytearray(file.read_bytes())
    middle = 288_189 + 6_000  # inside a record that is otherwise sound
    if damage == "one bit":
        content[middle] ^= 4
    elif damage == "a gap":
        content[middle : middle + 32] = bytes(32)
    else:
        content = content[: len(content) // 2 if damage == "half" else 0]
    file.write_bytes(content)
    if damage == "no file":
        file.unlink()
    with pytest.raises(ValueError, match=r"noisy_images/1.0.0 train: cannot read image \d+"):
        data.load("noisy_images", data_dir=tmp_path).arrays()
    if lost == 40:
        with pytest.raises(ValueError, match=r"train: none of its 40 images can be read \(\w+:"):
            data.load("noisy_images", data_dir=tmp_path, on_corrupt="skip")
        return
    dataset = data.load("noisy_images", data_dir=tmp_path, on_corrupt="skip")
    with pytest.warns(UserWarning, match="cannot be read and is replaced"):
        arrays = dataset.arrays()
    assert len(dataset.skipped) == 2 + lost
    np.testing.assert_array_equal(arrays["image"], pixels[arrays["label"]])


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_damage_to_the_description_is_named(damaged, tmp_path, file):
    shutil.copytree(damaged[0] / "noisy_images", tmp_path / "noisy_images")
    (path,) = tmp_path.glob(f"noisy_images/*/{file}")
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"cannot open 'noisy|dataset_info.json is damaged"):
        data.load("noisy_images", data_dir=tmp_path)
    assert len(data.load("digits", data_dir=tmp_path)) == 1797


def top_left(image):
    return image[:4, :4]


def test_provenance_tells_transforms_apart(prepared):
    def provenance(transform):
        facts = [
            data.load("digits", transform=transform).provenance,
            data.load("tiny_images", data_dir=prepared, transform=transform).provenance,
        ]
        assert json.loads(json.dumps(facts)) == facts
        assert facts[0].get("transform") == facts[1].get("transform")
        return facts[0].get("transform")

    described = provenance(crop_resize((1, 1, 4, 4), 2))
    assert described == provenance(crop_resize([1, 1, 4, 4], 2))
    assert described == {
        "name": "ddim_jax.pictures.images.CropResize",
        "crop": [1, 1, 4, 4],
        "resize": 2,
    }
    assert described != provenance(crop_resize((1, 1, 4, 4), 3))
    assert provenance(top_left) == f"{__name__}.top_left"
    assert provenance(None) is None


@pytest.mark.parametrize("name", ["tiny_imagse", "tiny", "tiny_images:2.0.0", "mnist"])
def test_a_missing_data_set_lists_what_there_is_and_how_to_prepare_it(prepared, name):
    with pytest.raises(ValueError, match="does not hold it") as error:
        data.load(name, data_dir=prepared)
    assert "Available: digits, tiny_images:1.0.0." in str(error.value)
    assert f"tfds build {name} --file_format=array_record --data_dir={prepared}" in str(error.value)


def test_the_newest_version_and_the_named_configuration(prepared, tmp_path):
    version = prepared / "tiny_images" / "1.0.0"
    for home in ("one/1.9.0", "one/1.10.0", "many/a/1.0.0", "many/b/1.0.0"):
        shutil.copytree(version, tmp_path / home)
    assert [path.name for path in _tfds._homes("one", tmp_path)] == ["1.9.0", "1.10.0"]
    assert [path.name for path in _tfds._homes("one:1.9.0", tmp_path)] == ["1.9.0"]
    with pytest.raises(ValueError, match=r"several configurations in .*; name one: many/a, many/b"):
        data.load("many", data_dir=tmp_path)
    assert data.available(tmp_path) == ["digits", "many/a", "many/b", "one"]


def test_a_wrong_directory_and_a_wrong_split_are_named(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere does not exist. Available: digits"):
        data.load("tiny_images")
    assert data.available() == ["digits"]
    assert data.available(prepared) == ["digits", "tiny_images"]
    with pytest.raises(ValueError, match="Unknown split 'trian'"):
        data.load("tiny_images", "trian", prepared)


def test_a_tfrecord_data_set_is_refused_with_the_command(tmp_path):
    info = tmp_path / "old" / "1.0.0" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text('{"name": "old", "fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match=r"stored as tfrecord; only array_record(.|\n)*tfds build"):
        data.load("old", data_dir=tmp_path)


def test_the_environment_names_the_directory(prepared, monkeypatch):
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, os.fspath(prepared))
    assert len(data.load("tiny_images")) == 18


def test_prepare_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as error:
        data.prepare("mnist:3.0.1", tmp_path)
    assert "preparing 'mnist:3.0.1' needs tensorflow" in str(error.value)
    assert "pip install tensorflow." in str(error.value)
    command = f"tfds build mnist:3.0.1 --file_format=array_record --data_dir={tmp_path}"
    assert command in str(error.value)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorflow tensorflow-io"):
        data.prepare("lsun/bedroom", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prepare_prepares_once(prepared, tmp_path, monkeypatch, capsys):
    """A real builder, of images that TFDS can store without TensorFlow, which is said to be there.

    The download of a stock data set is not tested here: it needs TensorFlow and a network.
    """
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    home = data.prepare("tiny_images", tmp_path)
    assert home == tmp_path / "tiny_images" / "1.0.0"
    assert len(data.load("tiny_images", data_dir=tmp_path)) == 18
    written = {path: path.stat().st_mtime_ns for path in home.iterdir()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # nor is it needed again
    capsys.readouterr()
    assert data.prepare("tiny_images", tmp_path) == home
    assert capsys.readouterr().out == f"tiny_images is already prepared: {home}\n"
    assert {path: path.stat().st_mtime_ns for path in home.iterdir()} == written


def test_prepare_leaves_another_format_alone(tmp_path):
    info = tmp_path / "old" / "1.0.0" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text('{"name": "old", "fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match="stored as tfrecord, and is left alone; give another"):
        data.prepare("old", tmp_path)


def test_prepare_of_an_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="no_such_thing"):
        data.prepare("no_such_thing", tmp_path)


def test_16_bit_grey_keeps_its_upper_bits_and_what_has_no_meaning_is_named():
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    clear = np.zeros((16, 16, 4), np.uint8)
    source = []
    for pixels in (deep, clear):
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        source.append({"image": file.getvalue(), "label": 0})
    read = Reader(_tfds.Records(source, "deep/1.0.0", 1, 1), "deep")
    np.testing.assert_array_equal(read(np.array([0]))[0][0, ..., 0], deep >> 8)
    with pytest.raises(ValueError, match=r"deep: cannot read image 1 .*transparent in places"):
        read(np.array([1]))
