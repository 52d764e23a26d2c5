"""TFDS image data sets stored as array_record: read without TensorFlow, prepared with it."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from ddim_jax.pictures.decoding import decode

DATA_DIR_VARIABLE = "DDIM_JAX_DATA"


@dataclasses.dataclass(frozen=True)
class Records:
    """One split of a prepared data set; picklable."""

    source: Any  # source[i] -> {"image": the bytes of a file, perhaps "label": int}
    full_name: str  # with configuration and version
    num_classes: int | None
    channels: int | None  # 1 or 3; None where each file decides
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image `index`, decoded by Pillow whatever else is installed, and its label or −1."""
        record = self.source[int(index)]
        image = decode(record["image"], self.channels)
        return image, -1 if self.num_classes is None else int(record["label"])


def records(name: str, split: str, data_dir: pathlib.Path) -> Records:
    """Opens a prepared data set; a ValueError tells what there is and how to prepare the rest."""
    import tensorflow_datasets as tfds

    homes = _homes(name, data_dir)
    if not homes:
        reason = "does not hold it" if data_dir.is_dir() else "does not exist"
        there = sorted(f"{found}:{home.name}" for found, home in prepared(data_dir))
        raise ValueError(
            f"no data set {name!r}: the directory {data_dir} {reason}. Available: "
            f"{', '.join(['digits', *there])}. A file or folder {name} is not here either: a path "
            f"is written ./{name}. {_how_to_prepare(name, data_dir)}"
        )
    readable = [home for home, kind in homes.items() if kind == "array_record"]
    if not readable:
        raise ValueError(
            f"{name!r} in {data_dir} is stored as {', '.join(set(homes.values()))}; only "
            f"array_record can be read without TensorFlow. {_how_to_prepare(name, data_dir)}"
        )
    if len({home.parent for home in readable}) > 1:
        choice = ", ".join(sorted({f"{home.parent.relative_to(data_dir)}" for home in readable}))
        raise ValueError(f"{name!r} has several configurations in {data_dir}; name one: {choice}")
    try:
        builder = tfds.builder_from_directory(readable[-1])
        features = dict(builder.info.features)
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
        source = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:
        raise ValueError(f"cannot open {name!r} {split!r} in {data_dir}: {error}") from error
    image = features.get("image")
    if not isinstance(image, tfds.features.Image):
        raise ValueError(f"{name!r} has no feature 'image'; it has {', '.join(sorted(features))}")
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3, None):
        raise ValueError(f"{name!r} has images {image}; uint8 with 1 or 3 channels can be read")
    label = features.get("label")
    num_classes, names = (getattr(label, name, None) for name in ("num_classes", "names"))
    title = builder.info.full_name
    return Records(source, title, num_classes, image.shape[-1], tuple(names) if names else None)


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Downloads a TFDS image data set and stores it as array_record; this needs TensorFlow.

    What is already prepared is left alone, and a line printed says so. TensorFlow is needed for
    this step alone: the directory can be prepared on one machine and read on another without it.

    Args:
      name: of a TFDS data set ("mnist", "cifar10", "celeb_a", "lsun/bedroom", "mnist:3.0.1").
      data_dir: where TFDS data sets lie; default the variable DDIM_JAX_DATA, else TFDS's own.

    Returns:
      The directory of the prepared version.

    Raises:
      ModuleNotFoundError: no TensorFlow here; the message says what to install and the command
        that does the same elsewhere.
      ValueError: not a name, unknown to TFDS, or already there in another format.

    Example:
      >>> prepare("digits")
      Traceback (most recent call last):
      ValueError: digits comes with scikit-learn: there is nothing to prepare
    """
    directory = resolve(data_dir)
    check_name(name)
    if name == "digits":
        raise ValueError("digits comes with scikit-learn: there is nothing to prepare")
    homes = _homes(name, directory)
    for home, kind in homes.items():
        if kind == "array_record":
            print(f"{name} is already prepared: {home}")
            return home
    if homes:
        raise ValueError(
            f"{name!r} is already in {directory}, stored as {', '.join(set(homes.values()))}, and "
            "is left alone; give another data_dir"
        )
    needs = {"tensorflow": "tensorflow"}
    if name.startswith("lsun"):
        needs["tensorflow_io"] = "tensorflow-io"
    missing = [package for module, package in needs.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ModuleNotFoundError(
            f"preparing {name!r} needs {' and '.join(missing)}, not installed here: pip install "
            f"{' '.join(missing)}. Or prepare it where they are and copy the directory:\n"
            f"  {_build_command(name, directory)}"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def prepared(data_dir: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """(name or name/config, directory of a version) for each name/version/dataset_info.json."""
    infos = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    homes = [info.parent for info in infos]
    return [(home.parent.relative_to(data_dir).as_posix(), home) for home in homes]


def resolve(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The directory meant by an argument or, without one, by the environment."""
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE) or os.environ.get("TFDS_DATA_DIR")
    return pathlib.Path(named or "~/tensorflow_datasets").expanduser()


def saved_at(folder: pathlib.Path) -> bool:
    """Whether a folder is one version of a prepared data set."""
    return (folder / "dataset_info.json").exists() and (folder / "features.json").exists()


def is_name(name: str) -> bool:
    """Whether `name` can be one of TFDS."""
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.=-]+)?(:\d+\.\d+\.\d+)?", name))


def check_name(name: str) -> None:
    """A ValueError where `name` cannot be one."""
    if not is_name(name):
        raise ValueError(
            "a data set is 'digits', a path ('./pictures', 'images.npz'), hf:NAME, or NAME, "
            "NAME/CONFIG, NAME:VERSION as in TFDS ('mnist', 'lsun/bedroom', 'mnist:3.0.1'), got "
            f"{name!r}"
        )


def _how_to_prepare(name: str, data_dir: pathlib.Path) -> str:
    return (
        f"Point data_dir or {DATA_DIR_VARIABLE} at prepared data, or prepare it (this needs "
        f"TensorFlow: pip install 'ddim_jax[prepare]'):\n  {_build_command(name, data_dir)}"
    )


def _build_command(name: str, data_dir: pathlib.Path) -> str:
    return f"tfds build {name} --file_format=array_record --data_dir={data_dir}"


def _homes(name: str, data_dir: pathlib.Path) -> dict[pathlib.Path, str]:
    """Directory -> file format of what is prepared under `name`, the newest version last."""
    wanted, _, version = name.partition(":")
    homes = [
        home
        for found, home in prepared(data_dir)
        if (found + "/").startswith(wanted + "/") and version in ("", home.name)
    ]
    homes.sort(key=lambda home: [int(number) for number in re.findall(r"\d+", home.name)])
    return {home: _file_format(home) for home in homes}


def _file_format(home: pathlib.Path) -> str:
    try:
        return json.loads((home / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError, AttributeError):
        return "something unknown (its dataset_info.json is damaged)"
