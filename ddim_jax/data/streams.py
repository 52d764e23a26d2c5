"""Endless shuffled batches of a data set, each a function of its number.

One stream of images feeds a run. Its first N images, N the size of the data set, are epoch 0, the
next N are epoch 1, and so on; each epoch is a permutation of all N images, drawn anew from
(seed, epoch) by grain's index shuffle, which holds no table and needs no buffer. Batch k is images
kB..(k+1)B−1 of the stream: epochs join inside a batch, and no image is dropped or seen twice in an
epoch. Of P processes, process p reads rows pB/P..(p+1)B/P−1 of every batch, so the global batches
do not depend on P, nor on threads or worker processes. The position in the stream is k, a number.

"""

import ast
import functools
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ddim_jax.data.dataset import Dataset

if TYPE_CHECKING:  # it takes a second to import: where batches are asked for
    import grain

GUARD = (
    "worker processes import the main script, which must do its work under "
    '`if __name__ == "__main__":`; put it there, or read without num_workers'
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
    indices_only: bool = False,
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
      indices_only: give the images' numbers in place of the images, which are not read.

    Returns:
      An iterator of {"image": uint8 (B/P, H, W, C), "label": int32 (B/P,)}, or of {"index": int32
      (B/P,) in 0..N−1}.

    Raises:
      ValueError: a size, seed, start or process outside its range.
      RuntimeError: worker processes without that guard; or, from the iterator, one has ended.

    Example:
      >>> from ddim_jax.data import load
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
    import grain
    from absl import flags

    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)
    rest = _order(dataset, batch_size, seed).slice(slice(start, None))
    gather = functools.partial(_gather, dataset, mine)
    gathered = rest.map(functools.partial(_indices, mine) if indices_only else gather)
    threads = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    ahead = gathered.to_iter_dataset(threads)
    if num_workers:
        check_main_guard()
        if not flags.FLAGS.is_parsed():  # grain's workers read its flags, which have defaults
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(prefetch, 1))
        ahead = ahead.mp_prefetch(workers, _be_worker)
    deliver = functools.partial(_deliver, dataset)
    running = [iter(ahead if indices_only else ahead.map(deliver))]
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
      >>> from ddim_jax.data import load
      >>> batch_indices(load("digits"), batch_size=4, seed=0, number=0)
      array([1203, 1318, 1398,  141])
    """
    if number < 0:
        raise ValueError(f"number must be >= 0, got {number}")
    return np.asarray(_order(dataset, batch_size, seed)[number])


def _order(dataset: Dataset, batch_size: int, seed: int) -> "grain.MapDataset":
    """Random access to the indices of batch 0, 1, 2, …"""
    import grain

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


def _indices(mine: slice, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {"index": np.asarray(indices[mine], np.int32)}


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


def _stream(running: "list[grain.DatasetIterator]") -> Iterator[dict[str, np.ndarray]]:
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


def _end(running: "list[grain.DatasetIterator]") -> None:
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
