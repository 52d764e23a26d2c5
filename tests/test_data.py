"""Data: pixels, splits, epochs, exact continuation, TFDS without TensorFlow, clear errors."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ddim_jax import data


def indexed(size, name="indexed"):
    """A data set whose image i is a single pixel pair spelling i, with label i."""

    def read(i):
        pixels = np.stack([i // 256, i % 256], -1).astype(np.uint8)
        return pixels.reshape(-1, 1, 2, 1), i.astype(np.int32)

    return data.Dataset(name, "train", size, (1, 2, 1), None, {"name": name}, read)


def draw(iterator, count):
    return np.concatenate([next(iterator)["label"] for _ in range(count)])


def test_digits_are_all_of_scikit_learns():
    digits, truth = data.load("digits"), load_digits()
    arrays = digits.arrays()
    assert arrays["image"].shape == (1797, 8, 8, 1)
    assert arrays["image"].dtype == np.uint8
    error = np.abs(arrays["image"][..., 0] - truth.images * (255 / 16))
    assert error.max() <= 0.5
    np.testing.assert_array_equal(arrays["label"], truth.target)
    assert (digits.num_classes, digits.image_shape, len(digits)) == (10, (8, 8, 1), 1797)
    np.testing.assert_array_equal(digits[1796]["image"], arrays["image"][1796])
    json.dumps(digits.provenance)


@pytest.mark.parametrize(
    ("split", "window"),
    [
        ("train", slice(None)),
        ("train[:50%]", slice(0, 898)),
        ("train[50%:]", slice(898, 1797)),
        ("train[10:20]", slice(10, 20)),
        ("train[-97:]", slice(1700, 1797)),
    ],
)
def test_digits_slices(split, window):
    labels = data.load("digits", split).arrays()["label"]
    np.testing.assert_array_equal(labels, load_digits().target[window])


@pytest.mark.parametrize("split", ["test", "train[", "train[1:2:3]", "train[5:5]", "train[2000:]"])
def test_digits_wrong_split(split):
    with pytest.raises(ValueError, match="digits"):
        data.load("digits", split)


def test_transform_applies_to_each_image():
    digits = data.load("digits", "train[:9]", transform=lambda image: image[2:6, 1:7])
    assert digits.image_shape == digits[0]["image"].shape == (4, 6, 1)


def test_every_epoch_is_a_permutation_and_no_two_are_the_same():
    size, batch = 60, 8  # 15 batches are 2 epochs: epochs join inside a batch
    labels = draw(data.batches(indexed(size), batch, seed=0), 30)
    epochs = labels.reshape(4, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (epochs != np.arange(size)).any(1).all()


def test_images_stay_with_their_labels():
    batch = next(data.batches(indexed(1000), 64, seed=3))
    pixels = batch["image"].astype(int)
    np.testing.assert_array_equal(pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 1, 0], batch["label"])
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


def test_the_seed_decides_the_order_and_threads_do_not():
    def order(seed, **options):
        return tuple(draw(data.batches(indexed(100), 32, seed, **options), 7))

    assert order(0) == order(0, num_threads=0, prefetch=0) == order(0, num_threads=8, prefetch=16)
    assert len({order(seed) for seed in range(5)}) == 5


def test_a_batch_larger_than_the_data_set_spans_epochs():
    labels = next(data.batches(indexed(5), 13, seed=0))["label"]
    np.testing.assert_array_equal(np.sort(labels[:5]), np.arange(5))
    np.testing.assert_array_equal(np.sort(labels[5:10]), np.arange(5))
    assert len(labels) == 13


@pytest.mark.parametrize("taken", [0, 1, 9, 40])
def test_state_continues_exactly_through_json(taken):
    iterator = data.batches(indexed(70), 16, seed=1)
    draw(iterator, taken) if taken else None
    state = json.loads(json.dumps(iterator.get_state()))
    expected = draw(iterator, 12)
    resumed = data.batches(indexed(70), 16, seed=1)
    resumed.set_state(state)
    np.testing.assert_array_equal(draw(resumed, 12), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_global_batch(processes):
    whole = data.batches(indexed(50), 16, seed=2)
    parts = [
        data.batches(indexed(50), 16, seed=2, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for _ in range(8):
        together = np.concatenate([next(part)["label"] for part in parts])
        np.testing.assert_array_equal(together, next(whole)["label"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 7, "process_count": 2}, "positive multiple of process_count = 2, got 7"),
        ({"process_count": 2, "process_index": 2}, "process_index must be in 0..1, got 2"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
    ],
)
def test_batches_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        data.batches(indexed(5), **{"batch_size": 4, "seed": 0, **options})


def test_an_index_outside_the_data_set_is_an_error():
    with pytest.raises(IndexError, match=r"images 0..1796, got \[1797\]"):
        data.load("digits")[1797]
    with pytest.raises(IndexError):
        data.load("digits")[-1]


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
                "label": tfds.features.ClassLabel(num_classes=3),
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
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    tiny = data.load("tiny_images", data_dir=prepared)
    assert (len(tiny), tiny.image_shape, tiny.num_classes) == (18, (6, 5, 3), 3)
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


def test_the_cache_reads_each_record_once():
    reads = []

    def read_one(index):
        reads.append(int(index))
        return np.full((2, 2, 1), index, np.uint8), 0

    take = data._cached(read_one, 10, (2, 2, 1), "counted")
    for _ in range(3):
        np.testing.assert_array_equal(take(np.array([3, 1, 4]))[0][:, 0, 0, 0], [3, 1, 4])
    assert sorted(reads) == [1, 3, 4]


def test_images_of_several_sizes_ask_for_a_transform(prepared):
    with pytest.raises(ValueError, match="pass a `transform` that crops or resizes"):
        data.load("tiny_images", "mixed", prepared).arrays()
    cropped = data.load("tiny_images", "mixed", prepared, transform=lambda image: image[:4, :4])
    assert cropped.arrays()["image"].shape == (2, 4, 4, 3)


def test_an_unreadable_record_is_named(prepared, tmp_path):
    shutil.copytree(prepared / "tiny_images", tmp_path / "tiny_images")
    (file,) = tmp_path.glob("tiny_images/*/*train*")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tiny_images/1.0.0 train: cannot read image \d+"):
        data.load("tiny_images", "train", tmp_path).arrays()


@pytest.mark.parametrize("name", ["tiny_imagse", "tiny", "tiny_images:2.0.0", "mnist"])
def test_a_missing_data_set_lists_what_there_is_and_how_to_prepare_it(prepared, name):
    with pytest.raises(ValueError, match="does not hold it") as error:
        data.load(name, data_dir=prepared)
    assert "Available: digits, tiny_images:1.0.0." in str(error.value)
    assert f"tfds build {name} --file_format=array_record --data_dir={prepared}" in str(error.value)


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


@pytest.mark.parametrize(
    ("name", "shape", "size", "mean", "std"),  # published constants of the training sets
    [
        ("mnist", (28, 28, 1), 60_000, [0.1307], [0.3081]),
        ("cifar10", (32, 32, 3), 50_000, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_data(name, shape, size, mean, std):
    if name not in data.available():
        pytest.skip(f"{name} is not prepared; set {data.DATA_DIR_VARIABLE} to a TFDS directory")
    dataset = data.load(name)
    assert (dataset.image_shape, len(dataset), dataset.num_classes) == (shape, size, 10)
    chosen = np.random.default_rng(0).choice(size, 1000, replace=False)
    images = dataset.take(chosen)["image"] / 255
    for moment, published in ((images, mean), (images**2, np.square(mean) + np.square(std))):
        per_image = moment.mean((1, 2))
        standard_error = per_image.std(0) / len(chosen) ** 0.5
        assert (np.abs(per_image.mean(0) - published) < 4 * standard_error).all()


def test_the_environment_names_the_directory(prepared, monkeypatch):
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, os.fspath(prepared))
    assert len(data.load("tiny_images")) == 18
