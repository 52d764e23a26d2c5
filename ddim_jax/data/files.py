"""Arrays as data sets: in memory, .npy and .npz."""

import dataclasses
import pathlib
import zipfile
from typing import Any

import numpy as np

from ddim_jax.data.dataset import Dataset, window
from ddim_jax.data.folder import dataset_of
from ddim_jax.data.reader import Transform, description, digest_of

LABELS = "labels"  # the key of .npz


@dataclasses.dataclass
class Rows:
    """Images start, start + 1, … of an array as records, as many as there are labels."""

    images: np.ndarray
    labels: np.ndarray
    start: int
    path: pathlib.Path | None = None  # the .npy that the images are mapped from

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.asarray(self.images[self.start + index]), int(self.labels[index])

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.images[self.start + indices]), self.labels[indices]

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: a mapped file goes as its name, not as its content."""
        return {**self.__dict__, "images": None if self.path else self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path:
            self.images = _images(_read(self.path), str(self.path))


def from_arrays(
    images: Any,
    labels: Any = None,
    *,
    transform: Transform | None = None,
    split: str = "train",
    name: str = "arrays",
) -> Dataset:
    """A data set of images in memory.

    Args:
      images: uint8 (N, H, W, 1 or 3) or, grey, (N, H, W). They are not copied.
      labels: N integers ≥ 0, or None; the number of classes is the greatest + 1.
      transform: as in `load`.
      split: "train" or a slice of it, as in `load`.
      name: for messages.

    Returns:
      A `Dataset`, known again by a digest of images and labels.

    Raises:
      ValueError: not such an array, none, or labels that do not fit.

    Example:
      >>> images = np.zeros((5, 4, 6), np.uint8)
      >>> dataset = from_arrays(images, [0, 1, 2, 1, 0])
      >>> dataset.image_shape, dataset.num_classes, len(dataset)
      ((4, 6, 1), 3, 5)
    """
    return _dataset(np.asarray(images), labels, transform, split, name)


def load_file(
    path: pathlib.Path, name: str, split: str, transform: Transform | None, labels: str | None
) -> Dataset:
    """See `load`: the images of a .npy, which stays on disk, or a .npz, read whole."""
    content = _read(path)
    numbers: Any = None
    if isinstance(content, dict):
        numbers = content.get(LABELS)
    if labels is not None:
        if not labels.endswith(".npy"):
            raise ValueError(
                f"labels of {name} are a file .npy with an integer for each image, or the array "
                f"{LABELS!r} in a .npz, got {labels!r}"
            )
        numbers = _read(pathlib.Path(labels).expanduser())
    if isinstance(content, dict):
        content = _only_images(content, name)
    mapped = path if isinstance(content, np.memmap) else None
    return _dataset(content, numbers, transform, split, name, mapped)


def _dataset(
    images: np.ndarray,
    labels: Any,
    transform: Transform | None,
    split: str,
    name: str,
    path: pathlib.Path | None = None,
) -> Dataset:
    pixels, num_classes = _images(images, name), None
    numbers = np.full(len(pixels), -1, np.int32)
    if labels is not None:
        numbers = _labels(np.asarray(labels), len(pixels), name)
        num_classes = int(numbers.max()) + 1
    start, stop, _ = window(split, len(pixels), name).indices(len(pixels))
    rows = Rows(pixels, numbers[start:stop], start, path)
    provenance = {
        "name": pathlib.PurePath(name).name,
        "split": split,
        "source": "arrays",
        "digest": digest_of(pixels[start:stop], rows.labels),
    }
    if transform is not None:
        provenance["transform"] = description(transform)
        return dataset_of(rows, name, split, transform, num_classes, provenance)
    shape = pixels.shape[1:]
    return Dataset(name, split, len(rows), shape, num_classes, provenance, rows.take)


def _read(path: pathlib.Path) -> Any:
    """An array mapped into memory, or the arrays of a .npz by name."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read as NumPy's {path.suffix}: {error}") from error


def _only_images(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The array "images", or the only one of uint8 in three or four dimensions."""
    found = [
        key for key, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)
    ]
    key = "images" if "images" in arrays else found[0] if len(found) == 1 else None
    if key is None:
        there = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        raise ValueError(
            f"{name} holds {there or 'nothing'}: call the images, uint8 (N, H, W, C) or (N, H, W), "
            f"'images', and the labels, if there are any, {LABELS!r}"
        )
    return arrays[key]


def _images(images: np.ndarray, name: str) -> np.ndarray:
    """As uint8 (N, H, W, C), if that is what they are."""
    if images.dtype != np.uint8:
        raise ValueError(
            f"{name} has {images.dtype} {images.shape}; images are uint8 in 0..255: of floats in "
            "0..1, np.round(255 * images).astype(np.uint8)"
        )
    pixels = images[..., None] if images.ndim == 3 else images
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
        advice = ": channels come last, images.transpose(0, 2, 3, 1)" if first else ""
        raise ValueError(
            f"{name} has an array {images.shape}; images are (N, H, W), or (N, H, W, C) with C = 1 "
            f"or 3{advice}"
        )
    if not pixels.size:
        raise ValueError(f"{name} holds no images: its array is {images.shape}")
    return pixels


def _labels(labels: np.ndarray, size: int, name: str) -> np.ndarray:
    if labels.shape != (size,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels of {name} must be {size} integers, one for each image, got {labels.dtype} "
            f"{labels.shape}"
        )
    if labels.min() < 0 or labels.max() > 2**31 - 2:
        raise ValueError(f"labels of {name} must be 0, 1, 2, …, got {labels.min()}..{labels.max()}")
    return labels.astype(np.int32)
