"""Data sets as random access to uint8 images, and endless shuffled batches of them.

Two kinds of name: ``digits``, scikit-learn's bundled 8×8 digits, needs nothing but itself; every
other name is a TFDS image data set prepared in the array_record format, read without TensorFlow.

One stream of images feeds a run. Its first N images, N the size of the data set, are epoch 0, the
next N are epoch 1, and so on; each epoch is a permutation of all N images, drawn anew from
(seed, epoch) by grain's index shuffle, which holds no table and needs no buffer. Batch k is images
kB..(k+1)B−1 of the stream: epochs join inside a batch, and no image is dropped or seen twice in an
epoch. Of P processes, process p reads rows pB/P..(p+1)B/P−1 of every batch, so the global batches
do not depend on P, nor on threads or worker processes. The position in the stream is k, a number.
"""

import ast
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from ddim_jax.data import tfds as _tfds
from ddim_jax.data.tfds import DATA_DIR_VARIABLE as DATA_DIR_VARIABLE
from ddim_jax.data.tfds import prepare as prepare

GUARD = (
    "worker processes import the main script, which must do its work under "
    '`if __name__ == "__main__":`; put it there, or read without num_workers'
)

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
      unreadable: index -> reason of each record that `read` had to replace; `read` fills it.

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
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict, repr=False)
    _warned: set[int] = dataclasses.field(default_factory=set, repr=False)

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
        """All N images at once, read by several threads: "image" (N, H, W, C), "label" (N,)."""
        parts = np.array_split(np.arange(self.size), math.ceil(self.size / 256))
        with ThreadPoolExecutor() as pool:
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
      name: "digits", or a TFDS data set ("mnist", "cifar10", "lsun/bedroom", "mnist:3.0.1"); of
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
    _tfds.check_name(name)
    if name == "digits":
        return _digits(split, transform)
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


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches: every epoch is a fresh permutation, and epochs join without a gap.

    Batch k is a function of (dataset, batch_size, seed, k) alone, so the position of a run is the
    number of batches it has had: `start` there to continue, on any number of threads, workers or
    processes. A batch may be larger than the data set; it then spans several epochs. Process p of
    P gets the p-th P-th part of each batch.

    Threads do for data sets that fit in memory, whose images are decoded once. Worker processes
    are for larger ones, where decoding takes more than one core; they keep no images, end with the
    iterator, and import the main script, which therefore needs `if __name__ == "__main__":`.

    Args:
      dataset: from `load`.
      batch_size: images per batch over all processes, ≥ 1.
      seed: of the permutations, in 0..2³²−1.
      start: the number of the first batch, ≥ 0; the batches before it are not read.
      process_index: p in 0..P−1.
      process_count: P, a divisor of `batch_size`.
      num_threads: threads that assemble batches ahead of their use.
      num_workers: processes that do so instead, each with `num_threads` threads; 0 for none.
      prefetch: batches that they, or each of the workers, keep ready.

    Returns:
      An iterator of {"image": uint8 (B/P, H, W, C), "label": int32 (B/P,)}.

    Raises:
      ValueError: a size, seed, start or process outside its range.
      RuntimeError: worker processes without that guard; or, from the iterator, one has ended.

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
    if start < 0:
        raise ValueError(f"start must be >= 0, got {start}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be >= 0, got {num_workers}")
    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)
    rest = _order(dataset, batch_size, seed).slice(slice(start, None))
    gathered = rest.map(functools.partial(_gather, dataset, mine))
    threads = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    ahead = gathered.to_iter_dataset(threads)
    if num_workers:
        check_main_guard()
        if not flags.FLAGS.is_parsed():  # grain's workers read its flags, which have defaults
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(prefetch, 1))
        ahead = ahead.mp_prefetch(workers, _be_worker)
    running = [iter(ahead.map(functools.partial(_deliver, dataset)))]
    stream = _stream(running)
    weakref.finalize(stream, _end, running)  # also at exit
    return stream


def batch_indices(dataset: Dataset, batch_size: int, seed: int, number: int) -> np.ndarray:
    """The images that make up batch `number` (over all processes) of `batches`.

    Args:
      dataset: from `load`.
      batch_size: B, images per batch over all processes, ≥ 1.
      seed: of the permutations, in 0..2³²−1.
      number: of the batch, ≥ 0.

    Returns:
      int64 (B,) in 0..N−1.

    Raises:
      ValueError: a size, seed or number outside its range.

    Example:
      >>> batch_indices(load("digits"), batch_size=4, seed=0, number=0)
      array([1203, 1318, 1398,  141])
    """
    if number < 0:
        raise ValueError(f"number must be >= 0, got {number}")
    return np.asarray(_order(dataset, batch_size, seed)[number])


def _order(dataset: Dataset, batch_size: int, seed: int) -> grain.MapDataset:
    """Random access to the indices of batch 0, 1, 2, …"""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not len(dataset):
        raise ValueError(f"{dataset.name} {dataset.split} holds no images")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
    indices = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()
    return indices.batch(batch_size, drop_remainder=True)


def _gather(dataset: Dataset, mine: slice, indices: np.ndarray) -> tuple[Any, ...]:
    """In a thread or worker: the images of one batch, and which records are known unreadable."""
    return (*dataset.read(indices[mine]), dataset.unreadable.copy())


def check_main_guard() -> None:
    """Raises RuntimeError where worker processes, importing the main script, would start workers.

    A parent would wait for such a worker for ever, which is why its script is read beforehand. The
    `__main__.py` of a package is never imported by workers.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(f"a worker process ends: {GUARD}")
    main = sys.modules["__main__"]
    package = getattr(getattr(main, "__spec__", None), "name", "").rpartition(".")[2] == "__main__"
    frame: types.FrameType | None = sys._getframe()
    while frame and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if package or frame is None or not os.path.exists(frame.f_code.co_filename):
        return
    for statement in ast.parse(pathlib.Path(frame.f_code.co_filename).read_bytes()).body:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        at = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
        if frame.f_lineno in at and "__name__" not in names:
            raise RuntimeError(f"{frame.f_code.co_filename}, line {frame.f_lineno}: {GUARD}")


def _stream(running: list[grain.DatasetIterator]) -> Iterator[dict[str, np.ndarray]]:
    while running:
        try:
            batch = next(running[0])
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):  # grain's words
                raise
            raise RuntimeError(
                f"a worker process has ended: it was killed (is memory short?), or else {GUARD}"
            ) from error
        yield batch


def _end(running: list[grain.DatasetIterator]) -> None:
    """Ends the threads and workers of a stream, before the interpreter takes itself apart."""
    running.pop().close()


def _be_worker(index: int, count: int) -> None:
    """In a worker: leave signals to the main process, and end when it ends, even if killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _deliver(dataset: Dataset, gathered: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """In the caller: the batch as plain arrays, and the warnings that belong to it."""
    images, labels, unreadable = gathered
    dataset._warn(unreadable)
    return {"image": np.array(images), "label": np.array(labels)}


def available(data_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Names that `load` accepts: "digits" and the data sets prepared under `data_dir`.

    Example:
      >>> "digits" in available()
      True
    """
    return ["digits", *sorted({name for name, _ in _tfds.prepared(_tfds.resolve(data_dir))})]


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
