"""Data sets by name: what is bundled, what lies in a file or folder, what TFDS has prepared."""

import difflib
import os
import pathlib
import re
from typing import Literal

import numpy as np

from ddim_jax.arrays import import_name
from ddim_jax.data import hugging_face
from ddim_jax.data import tfds as _tfds
from ddim_jax.data.dataset import Dataset, window
from ddim_jax.data.files import Rows, load_file
from ddim_jax.data.folder import Choices, load_folder
from ddim_jax.data.reader import Reader, Transform, description, transformed
from ddim_jax.data.tfds import DATA_DIR_VARIABLE as DATA_DIR_VARIABLE
from ddim_jax.data.tfds import prepare as prepare
from ddim_jax.pictures.decoding import as_colour

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # a version begins with a digit: "mnist:3.0.1"
HUGGING_FACE = "hf:"
ARRAYS = (".npy", ".npz")


def load(
    name: str | os.PathLike[str],
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    transform: Transform | None = None,
    *,
    on_corrupt: Literal["stop", "skip"] = "stop",
    labels: str | None = None,
    background: str | None = None,
    channels: Literal[1, 3] | None = None,
) -> Dataset:
    """Opens an image data set; its images are decoded when first asked for.

    Args:
      name: a path, which has a separator, begins with "." or "~", or exists: a folder of pictures,
        a file .npy or .npz, a folder saved by Hugging Face's datasets; "hf:NAME" by its name there;
        "digits"; "module:function", called with (split, transform), which returns a `Dataset`; or
        a TFDS data set ("mnist", "cifar10", "lsun/bedroom", "mnist:3.0.1"), of several prepared
        versions the newest. What is registered or prepared goes before a path: write "./digits".
      split: a split with an optional slice, as in TFDS: "train", "test", "train[:50%]",
        "train[1000:]". All 1,797 digits are "train", and so are your own files; digits are ordered
        by writer, so unbiased halves are its even and odd indices.
      data_dir: where TFDS data sets lie; default the variable DDIM_JAX_DATA, else TFDS's own.
      transform: uint8 (H, W, C) -> uint8 (H', W', C'), applied to each image (`crop_resize`), which
        is decoded by `ddim_jax.pictures.decoding.decode`.
      on_corrupt: what a record that cannot be read or decoded does. "stop": a ValueError that names
        it. "skip": in a folder or of Hugging Face, it is left out, and a warning lists all; in TFDS
        the next readable record, index + 1 mod N and so on, takes its place; a warning names it
        once, and `Dataset.skipped` lists it.
      labels: of a folder, "folders": its first-level sub-folders, in order, are classes 0, 1, …;
        of .npy and .npz a .npy of integers (a .npz may have them as "labels"); of Hugging Face the
        name of a column. Others have labels of their own.
      background: the colour behind what is transparent in your own pictures, "white" or "#808080";
        None refuses them.
      channels: of your own pictures, 1 or 3; None reads grey ones as 1 if all are grey, else as 3.
        As 1, pictures with colours are refused.

    Returns:
      A `Dataset`. Its provenance has a digest of your own files' content, the parameters of a
      `transform` that is a dataclass, as `crop_resize` is, the qualified name of another, and how
      it was read.

    Raises:
      FileNotFoundError: a path where nothing is.
      ModuleNotFoundError: Hugging Face's datasets is needed and not installed.
      ValueError: unknown name or split, wrong or empty directory, no images in the data set,
        none that can be read, a transform that does not return uint8 (H, W, C); the message lists
        what there is and how to prepare what there is not, or every file that cannot be used.

    Example:
      >>> len(load("digits", "train[:50%]"))
      898
    """
    if on_corrupt not in ("stop", "skip"):
        raise ValueError(f"on_corrupt must be 'stop' or 'skip', got {on_corrupt!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    if background is not None:
        as_colour(background)
    choices = Choices(transform, labels, background, on_corrupt == "skip", channels)
    path, name = path_of(name, data_dir), os.fspath(name)
    if path is not None:
        return _own_files(path.absolute(), name, split, choices)
    if name.startswith(HUGGING_FACE):
        return hugging_face.load_named(name.removeprefix(HUGGING_FACE), split, choices)
    if name == "digits":
        known = _digits(split, transform)
    elif OWN.fullmatch(name):
        known = _own(name, split, transform)
    else:
        known = _prepared(name, split, data_dir, transform, on_corrupt)
    if (labels, background, channels) != (None, None, None):
        raise ValueError(
            f"labels, background and channels are for pictures of your own, {name} says them itself"
        )
    return known


def path_of(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None
) -> pathlib.Path | None:
    """The path that a name means, None if it is the name of a data set."""
    text = os.fspath(name)
    path = pathlib.Path(text).expanduser()
    separators = (os.sep, os.altsep or os.sep)
    if not isinstance(name, str) or text.startswith((".", "~", *separators)):
        return path
    if not text or text == "digits" or text.startswith(HUGGING_FACE) or OWN.fullmatch(text):
        return None
    if text in available(data_dir):
        return None
    if path.exists() or text.lower().endswith(ARRAYS):
        return path
    parted = any(separator in text for separator in separators)
    return path if parted and not _tfds.is_name(text) else None


def pictures_at(path: pathlib.Path) -> bool:
    """Whether a path is a folder to read as pictures."""
    return path.is_dir() and not (hugging_face.saved_at(path) or _tfds.saved_at(path))


def _own_files(path: pathlib.Path, name: str, split: str, choices: Choices) -> Dataset:
    """What lies at a path."""
    if not path.exists():
        near = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, 1)
        meant = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"there is no file or folder {path}{meant}")
    if path.is_file():
        if path.suffix.lower() not in ARRAYS:
            raise ValueError(
                f"{path} is one file, and no .npy or .npz: give the folder that holds the "
                "pictures, and unpack archives first"
            )
        if (choices.background, choices.channels) != (None, None):
            raise ValueError(f"background and channels are for picture files; {name} has pixels")
        return load_file(path, name, split, choices.transform, choices.labels)
    if hugging_face.saved_at(path):
        return hugging_face.load_saved(path, name, split, choices)
    if _tfds.saved_at(path):
        raise ValueError(
            f"{path} is a data set prepared by TFDS: give its name, and the folder that its own "
            "lies in as data_dir"
        )
    return load_folder(path, name, split, choices)


def _prepared(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None,
    transform: Transform | None,
    on_corrupt: str,
) -> Dataset:
    """What TFDS has prepared."""
    _tfds.check_name(name)
    records = _tfds.records(name, split, _tfds.resolve(data_dir))
    title = f"{records.full_name} {split}"
    if not len(records):
        raise ValueError(f"{title} holds no images")
    read = Reader(records, title, transform, skip=on_corrupt == "skip")
    provenance = {"name": records.full_name, "split": split, "source": "tensorflow_datasets"}
    if transform is not None:
        provenance["transform"] = description(transform)
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
        label_names=records.label_names,
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
    part = window(split, len(images))
    provenance = {"name": "digits", "split": split, "source": "sklearn.datasets.load_digits"}
    images, labels = images[part], labels[part].astype(np.int32)
    if transform:
        images = np.stack([transformed(image, transform) for image in images])
        provenance["transform"] = description(transform)
    return Dataset(
        name="digits",
        split=split,
        size=len(images),
        image_shape=images.shape[1:],
        num_classes=10,
        provenance=provenance,
        read=Rows(images, labels, 0).take,
        label_names=tuple("0123456789"),
    )
