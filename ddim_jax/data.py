"""Data sets as random access to uint8 images, and endless shuffled batches of them.

Two kinds of name: ``digits``, scikit-learn's bundled 8×8 digits, needs nothing but itself; every
other name is a TFDS image data set prepared in the array_record format, read without TensorFlow
(``tfds.data_source``). Shuffling, repetition, batching and exact resumption are grain's.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

DATA_DIR_VARIABLE = "DDIM_JAX_DATA"
CACHE_BYTES = 2**31  # data sets up to this size are decoded once and then kept in memory

Transform = Callable[[np.ndarray], np.ndarray]
Take = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Random access to the images of one split.

    Attributes:
      name: as given to `load`.
      split: as given to `load`.
      size: the number N of images.
      image_shape: (H, W, C).
      num_classes: labels are 0..num_classes−1; None where the data set has none (labels are −1).
      provenance: JSON-able facts that tell this data set from another.
      read: int array (n,) of indices in 0..N−1 -> uint8 (n, H, W, C) and int32 (n,).

    Example:
      >>> digits = load("digits")
      >>> digits.image_shape, len(digits), digits[3]["label"]
      ((8, 8, 1), 1797, 3)
    """

    name: str
    split: str
    size: int
    image_shape: tuple[int, int, int]
    num_classes: int | None
    provenance: dict[str, Any]
    read: Take = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = self.take(np.array([index])).values()
        return {"image": images[0], "label": int(labels[0])}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images at `indices`: {"image": uint8 (n, H, W, C), "label": int32 (n,)}."""
        if indices.size and not 0 <= indices.min() <= indices.max() < self.size:
            raise IndexError(f"{self.name} has images 0..{self.size - 1}, got {indices}")
        images, labels = self.read(indices)
        return {"image": images, "label": labels}

    def arrays(self) -> dict[str, np.ndarray]:
        """All N images at once, read by several threads: "image" (N, H, W, C), "label" (N,)."""
        parts = np.array_split(np.arange(self.size), math.ceil(self.size / 256))
        with ThreadPoolExecutor() as pool:
            taken = list(pool.map(self.take, parts))
        return {key: np.concatenate([part[key] for part in taken]) for key in ("image", "label")}


def load(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    transform: Transform | None = None,
) -> Dataset:
    """Opens an image data set by name; its images are decoded when first asked for.

    Args:
      name: "digits", or a TFDS data set ("mnist", "cifar10", "lsun/bedroom", "mnist:3.0.1").
      split: a split with an optional slice, as in TFDS: "train", "test", "train[:50%]",
        "train[1000:]". All 1,797 digits are "train"; they are ordered by writer, so unbiased
        halves are its even and odd indices rather than "train[:50%]" and "train[50%:]".
      data_dir: where TFDS data sets lie; default the variable DDIM_JAX_DATA, else TFDS's own.
      transform: uint8 (H, W, C) -> uint8 (H', W', C'), applied to each image (crop, resize).

    Returns:
      A `Dataset`.

    Raises:
      ValueError: unknown name or split, wrong or empty directory, no images in the data set;
        the message lists what there is and how to prepare what there is not.

    Example:
      >>> len(load("digits", "train[:50%]"))
      898
    """
    if name == "digits":
        return _digits(split, transform)
    return _tfds(name, split, _data_dir(data_dir), transform)


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Endless batches: every epoch is a fresh permutation, and epochs join without a gap.

    Batch k is a function of (dataset, batch_size, seed, k) alone. A batch may be larger than the
    data set; it then spans several epochs. Process p of P gets the p-th P-th part of each batch.

    Args:
      dataset: from `load`.
      batch_size: images per batch over all processes, ≥ 1.
      seed: of the permutations, in 0..2³²−1.
      process_index: p in 0..P−1.
      process_count: P, a divisor of `batch_size`.
      num_threads: threads that assemble batches ahead of their use.
      prefetch: batches that they keep ready.

    Returns:
      An iterator of {"image": uint8 (B/P, H, W, C), "label": int32 (B/P,)}. Its `get_state()` is a
      small JSON-able dict; `set_state(state)` continues exactly where it was taken.

    Raises:
      ValueError: a size, seed or process outside its range.

    Example:
      >>> iterator = batches(load("digits"), batch_size=32, seed=0)
      >>> next(iterator)["image"].shape
      (32, 8, 8, 1)
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of process_count = {process_count}, "
            f"got {batch_size}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)
    indices = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()
    gathered = indices.batch(batch_size, drop_remainder=True).map(lambda i: dataset.take(i[mine]))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(gathered.to_iter_dataset(options))


def available(data_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Names that `load` accepts: "digits" and the data sets prepared under `data_dir`.

    Example:
      >>> "digits" in available()
      True
    """
    return ["digits", *sorted({name for name, _, _ in _prepared(_data_dir(data_dir))})]


def _digits(split: str, transform: Transform | None) -> Dataset:
    """The bundled digits: 1,797 of 8×8, grey values 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.round(values.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    window = _window(split, len(images))
    images, labels = images[window], labels[window].astype(np.int32)
    if transform:
        images = np.stack([transform(image) for image in images])
    return Dataset(
        name="digits",
        split=split,
        size=len(images),
        image_shape=images.shape[1:],
        num_classes=10,
        provenance={"name": "digits", "split": split, "source": "sklearn.datasets.load_digits"},
        read=lambda indices: (images[indices], labels[indices]),
    )


def _window(split: str, size: int) -> slice:
    """The slice meant by "train", "train[a:b]" or "train[a%:b%]" of `size` images."""
    match = re.fullmatch(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise ValueError(f"digits has one split, 'train' or a slice 'train[a:b]', got {split!r}")

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)

    window = slice(bound(match[1]), bound(match[2]))
    if not range(size)[window]:
        raise ValueError(f"split {split!r} holds none of the {size} digits")
    return window


def _tfds(name: str, split: str, data_dir: pathlib.Path, transform: Transform | None) -> Dataset:
    """A prepared TFDS data set with an "image" and perhaps a "label" feature."""
    import tensorflow_datasets as tfds

    wanted, _, version = name.partition(":")
    prepared = _prepared(data_dir)
    formats = {
        kind
        for found, found_version, kind in prepared
        if (found + "/").startswith(wanted + "/") and version in ("", found_version)
    }
    if not formats:
        reason = "does not hold it" if data_dir.is_dir() else "does not exist"
        there = sorted(f"{found}:{found_version}" for found, found_version, _ in prepared)
        raise ValueError(
            f"no data set {name!r}: the directory {data_dir} {reason}. Available: "
            f"{', '.join(['digits', *there])}. {_how_to_prepare(name, data_dir)}"
        )
    if "array_record" not in formats:
        raise ValueError(
            f"{name!r} in {data_dir} is stored as {', '.join(sorted(formats))}; only array_record "
            f"can be read without TensorFlow. {_how_to_prepare(name, data_dir)}"
        )
    source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    info, features = source.dataset_info, source.dataset_info.features
    if "image" not in features:
        raise ValueError(f"{name!r} has no feature 'image'; it has {', '.join(sorted(features))}")
    num_classes = getattr(dict(features).get("label"), "num_classes", None)

    def read_one(index: int) -> tuple[np.ndarray, int]:
        try:
            record = source[int(index)]
        except Exception as error:
            raise ValueError(f"{info.full_name} {split}: cannot read image {index}") from error
        image = transform(record["image"]) if transform else record["image"]
        return image, record["label"] if num_classes else -1

    shape = read_one(0)[0].shape
    return Dataset(
        name=name,
        split=split,
        size=len(source),
        image_shape=shape,
        num_classes=num_classes,
        provenance={"name": info.full_name, "split": split, "source": "tensorflow_datasets"},
        read=_cached(read_one, len(source), shape, name),
    )


def _cached(
    read_one: Callable[[int], tuple[np.ndarray, int]], size: int, shape: tuple[int, ...], name: str
) -> Take:
    """Reads by index; keeps what it has read where the whole data set fits in CACHE_BYTES."""

    def checked(index: int) -> tuple[np.ndarray, int]:
        image, label = read_one(index)
        if image.shape != shape or image.dtype != np.uint8:
            raise ValueError(
                f"{name}: image 0 is uint8 {shape} but image {index} is {image.dtype} "
                f"{image.shape}; pass a `transform` that crops or resizes to one shape"
            )
        return image, label

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*map(checked, indices))
        return np.stack(images), np.array(labels, np.int32)

    if size * math.prod(shape) > CACHE_BYTES:
        return read
    images, labels = np.empty((size, *shape), np.uint8), np.empty(size, np.int32)
    ready = np.zeros(size, bool)

    def read_cached(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for index in indices[~ready[indices]]:  # two threads may do the same one: harmless
            images[index], labels[index] = checked(index)
            ready[index] = True
        return images[indices], labels[indices]

    return read_cached


def _data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE) or os.environ.get("TFDS_DATA_DIR")
    return pathlib.Path(named or "~/tensorflow_datasets").expanduser()


@functools.cache
def _file_format(info: pathlib.Path) -> str:
    return json.loads(info.read_text()).get("fileFormat", "tfrecord")


def _prepared(data_dir: pathlib.Path) -> list[tuple[str, str, str]]:
    """(name or name/config, version, file format) of each data set: name/version/info.json."""
    infos = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    return [
        (p.parent.parent.relative_to(data_dir).as_posix(), p.parent.name, _file_format(p))
        for p in infos
    ]


def _how_to_prepare(name: str, data_dir: pathlib.Path) -> str:
    return (
        f"Point data_dir or {DATA_DIR_VARIABLE} at prepared data, or prepare it (this needs "
        "TensorFlow: pip install 'ddim_jax[prepare]'):\n"
        f"  tfds build {name} --file_format=array_record --data_dir={data_dir}"
    )
