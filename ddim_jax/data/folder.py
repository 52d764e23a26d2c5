"""A folder of pictures as a data set; and picture files as records, whoever keeps them."""

import collections
import dataclasses
import os
import pathlib
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.data.dataset import Dataset, window
from ddim_jax.data.index import Entry, Index, content_digest, index_folder, shown, some
from ddim_jax.data.reader import Reader, Transform, description
from ddim_jax.pictures.decoding import Kind, as_colour, decode

MOST = 100  # refused files that an error lists


@dataclasses.dataclass(frozen=True)
class Files:
    """The bytes of file i of a folder."""

    folder: pathlib.Path
    paths: Sequence[str]

    def __call__(self, index: int) -> bytes:
        return (self.folder / self.paths[index]).read_bytes()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Picture files as records for a `Reader`."""

    content: Callable[[int], bytes]
    names: Sequence[str]  # of the files, for errors
    labels: np.ndarray  # int32 (N,)
    channels: int
    background: tuple[int, int, int] | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image = decode(self.content(index), self.channels, self.background)
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            raise ValueError(f"{shown(self.names[index])}: {error}") from error
        return image, int(self.labels[index])


class Choices(NamedTuple):
    """How picture files are to be read."""

    transform: Transform | None = None
    labels: str | None = None
    background: str | None = None
    skip: bool = False
    channels: int | None = None

    @property
    def colour(self) -> tuple[int, int, int] | None:
        return None if self.background is None else as_colour(self.background)

    def refusal(self, kind: Kind) -> str:
        """Why a sound picture cannot be used, "" if it can."""
        if not kind.opaque and self.background is None:
            return (
                "transparent in places: say what is behind it, --data.background white (background="
                '"white")'
            )
        if self.channels == 1 and (kind.coloured or (not kind.opaque and self.ground_is_coloured)):
            return "it has colours, where grey is wanted (channels = 1)"
        crop = getattr(self.transform, "crop", None)
        if crop and (crop[0] + crop[2] > kind.height or crop[1] + crop[3] > kind.width):
            return f"{kind.height}×{kind.width} is too small for the crop {tuple(crop)}"
        return ""

    @property
    def ground_is_coloured(self) -> bool:
        return self.colour is not None and len(set(self.colour)) > 1

    def channels_of(self, kinds: Iterable[Kind]) -> int:
        """1 if all is grey, else 3: grey among colours is read as colour, R = G = B."""
        coloured = self.ground_is_coloured
        each = (3 if coloured and not kind.opaque else kind.channels for kind in kinds)
        return self.channels or max(each, default=1)

    def check_sizes(self, kinds: Iterable[Kind], where: str) -> None:
        """A ValueError where pictures of several sizes would not become one."""
        sizes = sizes_of(kinds)
        if len(sizes) > 1 and self.transform is None:
            raise ValueError(
                f"{where} has pictures of {len(sizes)} sizes, {most(sizes)}: bring them to one, "
                "--data.resize 32 (transform=crop_resize(None, 32))"
            )

    def facts(self) -> dict[str, Any]:
        """For provenance."""
        given = {
            "background": self.background and list(as_colour(self.background)),
            "channels": self.channels,
            "transform": self.transform and description(self.transform),
        }
        return {name: value for name, value in given.items() if value is not None}


def load_folder(folder: pathlib.Path, name: str, split: str, choices: Choices) -> Dataset:
    """See `load`: the pictures below a folder, in the order of the bytes of their paths.

    Raises:
      ValueError: no pictures there, files that are none, each named in one message; pictures of
        several sizes and no transform; labels that are not "folders", or no folders for them.
    """
    index = index_folder(folder)
    if not index.entries:
        there = f"; it holds {some(index.others)}" if index.others else ""
        raise ValueError(f"{name} holds no pictures (jpg, png, webp, bmp, tiff, gif){there}")
    classes = classes_of(index.entries, choices.labels, name)
    refused = refusals(index, choices)
    if refused and (len(refused) == len(index.entries) or not choices.skip):
        raise ValueError(refusal_message(refused, len(index.entries), name))
    if refused:
        said = [f"  {shown(path)}: {why}" for path, why in list(refused.items())[:MOST]]
        first = f"{name}: {len(refused):,} of {len(index.entries):,} files are left out:"
        warnings.warn("\n".join([first, *said]), stacklevel=4)
    if index.others:
        warnings.warn(
            f"{name}: no pictures by their names, and left out: {some(index.others)}", stacklevel=4
        )
    used = [entry for entry in index.entries if entry.path not in refused]
    used = used[window(split, len(used), name)]
    paths, kinds = [entry.path for entry in used], [entry.kind for entry in used if entry.kind]
    choices.check_sizes(kinds, name)
    labels = np.full(len(used), -1, np.int32)
    provenance = {
        "name": folder.resolve().name,
        "split": split,
        "source": "folder",
        "digest": content_digest({entry.path: entry.digest for entry in used}),
        "num_images": len(used),
        **choices.facts(),
    }
    if classes:
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[path.split("/")[0]] for path in paths], np.int32)
        provenance |= {"labels": "folders", "classes": classes}
    channels = choices.channels_of(kinds)
    records = Pictures(Files(folder, paths), paths, labels, channels, choices.colour)
    count, names = len(classes) or None, tuple(classes) or None
    return dataset_of(records, name, split, choices.transform, count, provenance, names)


def dataset_of(
    records: Any,
    name: str,
    split: str,
    transform: Transform | None,
    num_classes: int | None,
    provenance: dict[str, Any],
    label_names: tuple[str, ...] | None = None,
) -> Dataset:
    """The data set of some records."""
    read = Reader(records, f"{name} {split}", transform)
    size, shape = len(records), read.shape
    facts = name, split, size, shape, num_classes, provenance
    return Dataset(*facts, read, read.unreadable, label_names=label_names)


def refusals(index: Index, choices: Choices) -> dict[str, str]:
    """path -> reason of each file that cannot be used."""
    refused = {}
    for path, *_, kind, error in index.entries:
        why = error if kind is None else choices.refusal(kind)
        if choices.labels == "folders" and not why and "/" not in path:
            why = "in no class: it lies beside the folders that are classes"
        if why:
            refused[path] = why
    return refused


def refusal_message(refused: Mapping[str, str], number: int, name: str) -> str:
    """All of them in one message."""
    lines = [f"  {shown(path)}: {why}" for path, why in list(refused.items())[:MOST]]
    if len(refused) > MOST:
        lines.append(
            f"  … and {len(refused) - MOST:,} more: ddim-jax data inspect {shlex.quote(name)}"
        )
    advice = (
        ""
        if len(refused) == number
        else ', or leave them out: --data.on-corrupt skip (on_corrupt="skip")'
    )
    first = f"{len(refused):,} of {number:,} files in {name} cannot be used; repair or remove them"
    return "\n".join([f"{first}{advice}", *lines])


def classes_of(entries: Sequence[Entry], labels: str | None, name: str) -> list[str]:
    """The first-level folders that hold pictures, in the order of their bytes; [] if not asked."""
    if labels is None:
        return []
    if labels != "folders":
        raise ValueError(f'labels of a folder are its sub-folders, "folders", got {labels!r}')
    classes = {path.split("/")[0] for path, *_ in entries if "/" in path}
    if not classes:
        raise ValueError(f"{name} has no sub-folders with pictures to be classes")
    return sorted(classes, key=os.fsencode)


def sizes_of(kinds: Iterable[Kind]) -> collections.Counter[str]:
    """How many pictures there are of each height×width."""
    return collections.Counter(f"{kind.height}×{kind.width}" for kind in kinds)


def most(counts: collections.Counter[str], count: int = 5) -> str:
    """The most frequent of some things, with their numbers."""
    listed = ", ".join(f"{number:,} of {thing}" for thing, number in counts.most_common(count))
    rest = len(counts) - count
    return listed + (f" and {rest:,} other{'s' if rest > 1 else ''}" if rest > 0 else "")
