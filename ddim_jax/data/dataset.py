"""A data set: random access to the uint8 images of one split."""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

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
      unreadable: index -> reason of each record that `read` had to replace; `read` fills it.
      held_out: the images kept apart from these by `hold_out`, None where none are.
      label_names: what the classes 0..num_classes−1 are called, None where it is not known.

    Example:
      >>> from ddim_jax.data import load
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
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict, repr=False)
    held_out: "Dataset | None" = dataclasses.field(default=None, repr=False)
    label_names: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)
    _warned: set[int] = dataclasses.field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        names = self.label_names
        if names is not None and (len(names) != self.num_classes or len({*names}) < len(names)):
            raise ValueError(
                f"label_names must be {self.num_classes} different names, one for each class of "
                f"{self.name}, got {names}"
            )

    @property
    def skipped(self) -> list[int]:
        """Indices of the records skipped so far, in order; a warning has named each."""
        return sorted(self._warned)

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
        self._warn(self.unreadable)
        return {"image": images, "label": labels}

    def arrays(self) -> dict[str, np.ndarray]:
        """All N images at once, read by a few threads: "image" (N, H, W, C), "label" (N,).

        More would wait for one another: of decoding a small image much is Python's own work.
        """
        parts = np.array_split(np.arange(self.size), math.ceil(self.size / 256))
        with ThreadPoolExecutor(4) as pool:
            images, labels = zip(*pool.map(self.read, parts))
        self._warn(self.unreadable)
        return {"image": np.concatenate(images), "label": np.concatenate(labels)}

    def _warn(self, unreadable: dict[int, str]) -> None:
        """Warns once of each record skipped by this process or by one of its workers."""
        for index, reason in sorted(unreadable.copy().items()):
            if index not in self._warned:
                self._warned.add(index)
                warnings.warn(
                    f"{self.name} {self.split}: image {index} cannot be read and is replaced by "
                    f"the next ({reason})",
                    stacklevel=3,
                )


def hold_out(dataset: Dataset, holdout: float) -> Dataset:
    """The images to learn from, and apart from them, as its `held_out`, those to judge by.

    Which ones is a function of N and of the number n held out: the n of 0..N−1 whose hash is least.
    No seed moves them, and a larger n holds out all that a smaller does. Provenance tells the two
    parts, and other n, apart, so that a run is not resumed on what it has not learned from.

    Args:
      dataset: of N images, from `load`.
      holdout: a fraction in (0, 1) of N, rounded, or their number n ≥ 1; 0 for none.

    Returns:
      A data set of N − n images in their order, with `held_out` of n; `dataset` itself for 0.

    Raises:
      ValueError: not such a number, nothing or everything held out, a data set that has a part held
        out, or that replaces unreadable images by others, perhaps by those of the other part.

    Example:
      >>> from ddim_jax.data import load
      >>> digits = hold_out(load("digits"), 0.1)
      >>> len(digits), len(digits.held_out)
      (1617, 180)
    """
    if not 0 <= holdout < math.inf or (holdout > 1 and holdout != int(holdout)):
        raise ValueError(
            f"holdout must be a fraction in (0, 1), a number of images >= 1, or 0, got {holdout}"
        )
    if holdout == 0:
        return dataset
    if "holdout" in dataset.provenance:
        raise ValueError(f"{dataset.name} {dataset.split} has a part held out already")
    if dataset.provenance.get("on_corrupt") == "skip":
        raise ValueError(
            'on_corrupt="skip" puts other images in the place of unreadable ones, which holdout is '
            "to keep apart: repair the data, or hold out a slice of the split"
        )
    number = round(holdout * dataset.size) if holdout < 1 else int(holdout)
    if not 0 < number < dataset.size:
        raise ValueError(
            f"holdout = {holdout:g} keeps {number} of {dataset.size} images apart: leave at least "
            "one to learn from and one to judge by"
        )
    order = np.argsort(_hash(np.arange(dataset.size, dtype=np.uint64)), kind="stable")

    def part(name: str, indices: np.ndarray, held_out: Dataset | None = None) -> Dataset:
        return dataclasses.replace(
            dataset,
            size=len(indices),
            provenance={**dataset.provenance, "holdout": number, "part": name},
            read=functools.partial(_read_part, dataset.read, indices),
            held_out=held_out,
            _warned=set(),
        )

    return part("training", np.sort(order[number:]), part("held_out", np.sort(order[:number])))


def of_classes(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """The images of some classes, in their order; all labels are read first.

    Raises:
      ValueError: there are none.

    Example:
      >>> from ddim_jax.data import load
      >>> len(of_classes(load("digits"), [0, 1]))
      360
    """
    chosen = np.flatnonzero(np.isin(dataset.arrays()["label"], classes))
    if not len(chosen):
        raise ValueError(f"{dataset.name} {dataset.split} has no image of the classes {classes}")
    return dataclasses.replace(
        dataset,
        size=len(chosen),
        provenance={**dataset.provenance, "only": sorted({*map(int, classes)})},
        read=functools.partial(_read_part, dataset.read, chosen),
    )


def _read_part(
    read: Take, numbers: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return read(numbers[indices])


def _hash(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection of uint64 (Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def window(split: str, size: int, name: str = "digits") -> slice:
    """The slice meant by "train", "train[a:b]" or "train[a%:b%]" of `size` images."""
    match = re.fullmatch(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise ValueError(f"{name} has one split, 'train' or a slice 'train[a:b]', got {split!r}")

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        at = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
        if abs(at) > size:
            raise ValueError(f"split {split!r} reaches beyond the {size} images of {name}")
        return at

    window = slice(bound(match[1]), bound(match[2]))
    if not range(size)[window]:
        raise ValueError(f"split {split!r} holds none of the {size} images of {name}")
    return window
