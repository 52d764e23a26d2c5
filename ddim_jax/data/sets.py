"""Data sets as random access to uint8 images.

Two kinds of name: ``digits``, scikit-learn's bundled 8×8 digits, needs nothing but itself; every
other name is a TFDS image data set prepared in the array_record format, read without TensorFlow.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ddim_jax.arrays import import_name
from ddim_jax.data import tfds as _tfds
from ddim_jax.data.dataset import Dataset
from ddim_jax.data.tfds import DATA_DIR_VARIABLE as DATA_DIR_VARIABLE
from ddim_jax.data.tfds import prepare as prepare

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # a version begins with a digit: "mnist:3.0.1"
Transform = Callable[[np.ndarray], np.ndarray]


def load(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    transform: Transform | None = None,
    *,
    on_corrupt: Literal["stop", "skip"] = "stop",
) -> Dataset:
    """Opens an image data set by name; its images are decoded when first asked for.

    Args:
      name: "digits"; "module:function", called with (split, transform), which returns a `Dataset`;
        or a TFDS data set ("mnist", "cifar10", "lsun/bedroom", "mnist:3.0.1"); of
        several prepared versions the newest.
      split: a split with an optional slice, as in TFDS: "train", "test", "train[:50%]",
        "train[1000:]". All 1,797 digits are "train"; they are ordered by writer, so unbiased
        halves are its even and odd indices rather than "train[:50%]" and "train[50%:]".
      data_dir: where TFDS data sets lie; default the variable DDIM_JAX_DATA, else TFDS's own.
      transform: uint8 (H, W, C) -> uint8 (H', W', C'), applied to each image (`crop_resize`), which
        is decoded by `ddim_jax.pictures.images.decode`.
      on_corrupt: what a record that cannot be read or decoded does. "stop": a ValueError with its
        index. "skip": the next readable record, index + 1 mod N and so on, takes its place; a
        warning names it once, and `Dataset.skipped` lists it.

    Returns:
      A `Dataset`. Its provenance has the parameters of a `transform` that is a dataclass, as
      `crop_resize` is, the qualified name of another, and `on_corrupt` if it is "skip".

    Raises:
      ValueError: unknown name or split, wrong or empty directory, no images in the data set,
        none that can be read, a transform that does not return uint8 (H, W, C); the message lists
        what there is and how to prepare what there is not.

    Example:
      >>> len(load("digits", "train[:50%]"))
      898
    """
    if on_corrupt not in ("stop", "skip"):
        raise ValueError(f"on_corrupt must be 'stop' or 'skip', got {on_corrupt!r}")
    if name == "digits":
        return _digits(split, transform)
    if OWN.fullmatch(name):
        return _own(name, split, transform)
    _tfds.check_name(name)
    records = _tfds.records(name, split, _tfds.resolve(data_dir))
    title = f"{records.full_name} {split}"
    if not len(records):
        raise ValueError(f"{title} holds no images")
    read = _tfds.Reader(records, title, transform, skip=on_corrupt == "skip")
    provenance = {"name": records.full_name, "split": split, "source": "tensorflow_datasets"}
    if transform is not None:
        provenance["transform"] = _description(transform)
    if read.skip:
        provenance["on_corrupt"] = on_corrupt
    return Dataset(
        name=name,
        split=split,
        size=len(records),
        image_shape=read.shape,
        num_classes=records.num_classes,
        provenance=provenance,
        read=read,
        unreadable=read.unreadable,
    )


def available(data_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Names that `load` accepts: "digits" and the data sets prepared under `data_dir`.

    Example:
      >>> "digits" in available()
      True
    """
    return ["digits", *sorted({name for name, _ in _tfds.prepared(_tfds.resolve(data_dir))})]


def _own(name: str, split: str, transform: Transform | None) -> Dataset:
    """What a function of the user's returns."""
    made = import_name(name, "data set")(split, transform)
    if not isinstance(made, Dataset):
        raise TypeError(f"{name} must return a ddim_jax.data.Dataset, got {type(made).__name__}")
    return made


def _digits(split: str, transform: Transform | None) -> Dataset:
    """The bundled digits: 1,797 of 8×8, grey values 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.round(values.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    window = _window(split, len(images))
    provenance = {"name": "digits", "split": split, "source": "sklearn.datasets.load_digits"}
    images, labels = images[window], labels[window].astype(np.int32)
    if transform:
        images = np.stack([_tfds.transformed(image, transform) for image in images])
        provenance["transform"] = _description(transform)
    return Dataset(
        name="digits",
        split=split,
        size=len(images),
        image_shape=images.shape[1:],
        num_classes=10,
        provenance=provenance,
        read=functools.partial(_rows, images, labels),
    )


def _window(split: str, size: int) -> slice:
    """The slice meant by "train", "train[a:b]" or "train[a%:b%]" of `size` images."""
    match = re.fullmatch(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise ValueError(f"digits has one split, 'train' or a slice 'train[a:b]', got {split!r}")

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        at = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
        if abs(at) > size:
            raise ValueError(f"split {split!r} reaches beyond the {size} digits")
        return at

    window = slice(bound(match[1]), bound(match[2]))
    if not range(size)[window]:
        raise ValueError(f"split {split!r} holds none of the {size} digits")
    return window


def _rows(
    images: np.ndarray, labels: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return images[indices], labels[indices]


def _description(transform: Transform) -> Any:
    """What provenance says of a transform: its parameters where it has them, else its name."""
    kind = type(transform)
    if fields := getattr(kind, "__dataclass_fields__", None):
        parameters = {field: getattr(transform, field) for field in fields}
        described = {"name": f"{kind.__module__}.{kind.__qualname__}", **parameters}
        return json.loads(json.dumps(described, default=repr))
    named: Any = transform if hasattr(transform, "__qualname__") else kind
    return f"{named.__module__}.{named.__qualname__}"
