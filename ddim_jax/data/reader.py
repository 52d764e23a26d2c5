"""Records read by index: decoded, transformed, checked to be of one shape, kept where they fit."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

CACHE_BYTES = 2**31  # data sets up to this size are decoded once and then kept in memory
Transform = Callable[[np.ndarray], np.ndarray]


class Records(Protocol):
    """What a `Reader` reads; picklable, as worker processes get it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image `index`, uint8 (H, W, C), and its label, −1 where there is none."""


class Reader:
    """Decodes records by index; keeps what it has read where all of it fits in CACHE_BYTES."""

    def __init__(
        self,
        records: Records,
        title: str,
        transform: Transform | None = None,
        skip: bool = False,
    ) -> None:
        self.records, self.title, self.transform, self.skip = records, title, transform, skip
        self.unreadable: dict[int, str] = {}
        size = len(records)
        self.shape = self._decode(0)[0].shape
        self.cache = None
        if size * math.prod(self.shape) <= CACHE_BYTES:
            images, labels = np.empty((size, *self.shape), np.uint8), np.empty(size, np.int32)
            self.cache = images, labels, np.zeros(size, bool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}  # worker processes keep nothing

    def __call__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.cache is None:
            decoded, numbers = zip(*map(self._checked, indices))
            return np.stack(decoded), np.array(numbers, np.int32)
        images, labels, ready = self.cache
        for index in indices[~ready[indices]]:  # two threads may do the same one: harmless
            images[index], labels[index] = self._checked(index)
            ready[index] = True
        return images[indices], labels[indices]

    def _checked(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self._decode(int(index))
        if image.shape != self.shape:
            raise ValueError(
                f"{self.title}: image 0 is {self.shape} but image {index} is {image.shape}; pass a "
                "`transform` that crops or resizes to one shape"
            )
        return image, label

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self._readable(index)
        return transformed(image, self.transform), label

    def _readable(self, index: int) -> tuple[np.ndarray, int]:
        """Record `index` or, where records are skipped, the first after it that can be read."""
        size = len(self.records)
        for other in (k % size for k in range(index, index + size)):
            if other in self.unreadable:
                continue
            try:
                return self.records[other]
            except MemoryError:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {reason(error)}"
                if not self.skip:
                    raise ValueError(
                        f"{self.title}: cannot read image {other} ({why}); restore the file, "
                        'or load with on_corrupt="skip"'
                    ) from error
                self.unreadable[other] = why
        why = self.unreadable[index]
        raise ValueError(f"{self.title}: none of its {size} images can be read ({why})")


def reason(error: Exception) -> str:
    """What an error says, in short and without addresses of memory."""
    return re.sub(r" <.* at 0x\w+>", "", str(error)).strip()[:200] or type(error).__name__


def transformed(image: np.ndarray, transform: Transform | None) -> np.ndarray:
    """The image, uint8 (H, W, C), made another by `transform`."""
    if transform is None:
        return image
    made = np.asarray(transform(image))
    if made.dtype != np.uint8 or made.ndim != 3 or not made.size:
        raise ValueError(
            f"transform must return uint8 (H, W, C), got {made.dtype} {made.shape} for an image of "
            f"{image.shape}"
        )
    return made


def description(transform: Transform) -> Any:
    """What provenance says of a transform: its parameters where it has them, else its name."""
    kind = type(transform)
    if fields := getattr(kind, "__dataclass_fields__", None):
        parameters = {field: getattr(transform, field) for field in fields}
        described = {"name": f"{kind.__module__}.{kind.__qualname__}", **parameters}
        return json.loads(json.dumps(described, default=repr))
    named: Any = transform if hasattr(transform, "__qualname__") else kind
    return f"{named.__module__}.{named.__qualname__}"


def digest_of(images: np.ndarray, labels: np.ndarray) -> str:
    """Of an array's shape and values, and its labels."""
    whole = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, len(images), 4096):
        whole.update(images[start : start + 4096].tobytes())
    whole.update(labels.tobytes())
    return whole.hexdigest()[:32]
