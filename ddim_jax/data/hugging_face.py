"""Data sets of Hugging Face's `datasets`, saved on disk or by name."""

import dataclasses
import hashlib
import pathlib
import re
import warnings
from typing import Any

import numpy as np

from ddim_jax.data.dataset import Dataset, window
from ddim_jax.data.folder import (
    Choices,
    Pictures,
    dataset_of,
    refusal_message,
)
from ddim_jax.data.index import look


def saved_at(folder: pathlib.Path) -> bool:
    """Whether `save_to_disk` has written there."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


@dataclasses.dataclass(frozen=True)
class Column:
    """The bytes of the picture in row i."""

    table: Any
    name: str

    def __call__(self, index: int) -> bytes:
        value = self.table[int(index)][self.name]
        if value is None:
            raise OSError("the row has no picture")
        if value["bytes"] is None:
            return pathlib.Path(value["path"]).read_bytes()
        return value["bytes"]


def load_saved(folder: pathlib.Path, name: str, split: str, choices: Choices) -> Dataset:
    """See `load`: a folder that `save_to_disk` wrote, of one split or of several."""
    saved = _datasets(name).load_from_disk(str(folder))
    base = re.sub(r"\[.*", "", split)
    if isinstance(saved, dict):
        if base not in saved:
            raise ValueError(f"{name} has the splits {', '.join(saved)}, got {split!r}")
        saved = saved[base]
    elif base != "train":
        raise ValueError(f"{name} is one split, 'train' or a slice of it, got {split!r}")
    part = window(split.replace(base, "train", 1), len(saved), name)
    chosen = saved.select(range(*part.indices(len(saved))))
    return _opened(chosen, name, split, choices)


def load_named(name: str, split: str, choices: Choices) -> Dataset:
    """See `load`: "NAME" or "NAME:CONFIG" on the Hub, downloaded once by `datasets`."""
    full = f"hf:{name}"
    path, _, config = name.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ValueError(f"a data set of Hugging Face is hf:NAME or hf:NAME:CONFIG, got {full!r}")
    datasets = _datasets(full)
    try:
        table = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # of the network, the Hub, the split, the configuration
        raise ValueError(f"cannot open {full} {split!r}: {error}") from error
    return _opened(table, full, split, choices)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is a data set of Hugging Face, which needs their package: "
            "pip install 'ddim_jax[hf]' (or pip install datasets)"
        ) from error
    return datasets


def _opened(table: Any, name: str, split: str, choices: Choices) -> Dataset:
    datasets = _datasets(name)
    if not len(table):
        raise ValueError(f"{name} {split} holds no images")
    features = table.features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        there = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise ValueError(f"{name} has {len(images)} columns of pictures, one is wanted: {there}")
    table = table.cast_column(images[0], datasets.Image(decode=False))
    labels, num_classes, names = _labels(table, name, choices.labels, datasets)
    content = Column(table, images[0])
    looked = list(look(content, range(len(table)), f"looking at {name}"))
    refused = {}
    for i, (_, kind, error) in enumerate(looked):
        if why := error if kind is None else choices.refusal(kind):
            refused[f"row {i}"] = why
    if refused and not (choices.skip and len(refused) < len(table)):
        raise ValueError(refusal_message(refused, len(table), name))
    kept = np.array([i for i in range(len(table)) if f"row {i}" not in refused])
    if refused:
        warnings.warn(refusal_message(refused, len(table), name), stacklevel=4)
        content = dataclasses.replace(content, table=table.select(kept))
    kinds = [kind for i, (_, kind, _) in enumerate(looked) if kind and f"row {i}" not in refused]
    choices.check_sizes(kinds, name)
    digest = hashlib.sha256("".join(looked[i][0] for i in kept).encode() + labels[kept].tobytes())
    provenance = {
        "name": name if name.startswith("hf:") else pathlib.PurePath(name).name,
        "split": split,
        "source": "datasets",
        "digest": digest.hexdigest()[:32],
        "num_images": len(kept),
        **choices.facts(),
    }
    rows = [f"row {i}" for i in kept]
    channels = choices.channels_of(kinds)
    records = Pictures(content, rows, labels[kept], channels, choices.colour)
    return dataset_of(records, name, split, choices.transform, num_classes, provenance, names)


def _labels(
    table: Any, name: str, wanted: str | None, datasets: Any
) -> tuple[np.ndarray, int | None, tuple[str, ...] | None]:
    """Labels, the number of classes and their names: of the column asked for, or the only one."""
    classes = [
        k for k, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    column = wanted if wanted is not None else classes[0] if len(classes) == 1 else None
    if column is None:
        return np.full(len(table), -1, np.int32), None, None
    if column not in table.features:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(table.features)}")
    values = np.asarray(table[column][:])
    if values.dtype.kind not in "iu" or values.min() < 0:
        raise ValueError(f"column {column!r} of {name} is no class 0, 1, 2, … in each row")
    feature = table.features[column]
    if column in classes:
        return values.astype(np.int32), feature.num_classes, tuple(feature.names)
    return values.astype(np.int32), int(values.max()) + 1, None
