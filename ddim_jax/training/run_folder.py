"""What keeps a run folder whole: one writer, an orderly end on a signal, a log that can go on."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from types import FrameType, MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddim_jax.pictures.images import save_png
from ddim_jax.storage.files import write_whole
from ddim_jax.training.watching import WandB

LOCK = "lock"
LOG = "metrics.jsonl"


class Preempted(Exception):
    """Training was asked to stop by a signal, and saved.

    Attributes:
      step: the last step, saved in a checkpoint.
    """

    def __init__(self, step: int, directory: pathlib.Path):
        super().__init__(
            f"stopped by a signal at step {step}, saved in {directory}: start it again to go on "
            "from there (train: with --resume auto)"
        )
        self.step = step


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and lets one process write in it at a time.

    The lock is the operating system's on the file `lock`: a killed process leaves none behind.
    With several processes, process 0 holds it for all.

    Args:
      directory: the run folder.

    Raises:
      BlockingIOError: another process trains in this folder; the message says which.
    """
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    holder = ""
    file = None
    if jax.process_index() == 0:
        file = (directory / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
    try:
        if not _all_agree(not holder):
            raise BlockingIOError(
                f"{directory} is being written by {holder or 'another process'}: wait until it "
                "ends, or choose another folder"
            )
        yield
    finally:
        if file:
            file.close()


def writer(directory: pathlib.Path) -> str | None:
    """Who trains in the folder at present, None where nobody does.

    Args:
      directory: the run folder.

    Returns:
      "process 123 on host", or None.
    """
    import fcntl

    if not (directory / LOCK).exists():
        return None
    with (directory / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read()
    return None


class StopSignals:
    """Turns SIGTERM and SIGINT into a question that the loop asks; a second signal kills at once.

    With several processes JAX's preemption service listens for SIGTERM and finds a step at which
    all of them can stop (a second SIGTERM changes nothing); SIGINT is passed on to it.

    Example:
      >>> with StopSignals() as signals:
      ...     signals.requested(step=1)
      False
    """

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> StopSignals:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if _many() else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if _many():
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer in every process."""
        if _many():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received


class MetricsLog:
    """Lines of metrics to `metrics.jsonl` and TensorBoard, pictures to `samples/` and TensorBoard.

    Lines of steps after `start` are dropped: they are about to be run again. Only process 0 writes.

    Args:
      directory: the run folder.
      start: the step from which the run goes on.
      project: of Weights & Biases, which gets both too; None for without.
      config: what W&B is to know of the run.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        start: int,
        project: str | None = None,
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.directory = directory
        self._silent = jax.process_index() != 0
        self._wandb: WandB | None = None
        if self._silent:
            return
        path = directory / LOG
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= start]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        from tensorboardX import SummaryWriter

        # In its queue there is room for lines until `_alive` is asked again.
        self._board = SummaryWriter(str(directory), purge_step=start + 1, max_queue=1000)
        if project is not None:
            self._wandb = WandB(directory, project, config)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._silent:
            if self._wandb:
                self._wandb.close(failed=kind is not None)
            with contextlib.suppress(OSError):
                self._file.close()
            if not self._alive():  # nor may its exit hook wait for a thread that is no more
                self._board.file_writer.event_writer._closed = True
            self._board.close()

    def line(self, line: Mapping[str, float]) -> None:
        """One line: "step" and scalars.

        Raises:
          OSError: it cannot be written; the message says where.
        """
        if self._silent:
            return
        with self._writable():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in line.items():
                if name not in ("step", "seconds"):
                    self._board.add_scalar(name, value, line["step"])
        if self._wandb:
            self._wandb.line(line)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """uint8 (H, W, 3) as samples/STEP.png.

        Raises:
          OSError: it cannot be written.
        """
        if self._silent:
            return
        with self._writable():
            path = self.directory / "samples" / f"{step:08d}.png"
            save_png(path, pixels, overwrite=True)
            self._board.add_image("samples", pixels, step, dataformats="HWC")
        if self._wandb:
            self._wandb.picture(step, pixels)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            if not self._alive():
                raise OSError("TensorBoard's file cannot grow")
            yield
        except OSError as error:
            raise OSError(
                f"could not write metrics or pictures in {self.directory} (is the disk full?): "
                f"{error}"
            ) from error

    def _alive(self) -> bool:  # tensorboardX hides errors in its thread, and then waits for ever
        return bool(self._board.file_writer.event_writer._worker.is_alive())


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, oldest first; a half-written last line is left out.

    Args:
      path: the file.

    Returns:
      A list of dicts with "step", "loss", "grad_norm", "images_per_second", "seconds", ….

    Raises:
      ValueError: a line is not a line of metrics; the message gives its number.
    """
    lines = []
    content = pathlib.Path(path).read_text(errors="replace")
    for number, text in enumerate(content.splitlines(keepends=True), 1):
        if text.endswith("\n"):
            try:
                line = json.loads(text)
                lines.append({**line, "step": int(line["step"]), "loss": float(line["loss"])})
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number} is not a line of metrics: mend it, or move the file "
                    f"elsewhere ({error!r})"
                ) from error
    return lines


def _many() -> bool:
    return jax.process_count() > 1


def _all_agree(yes: bool) -> bool:
    if not _many():
        return yes
    return bool(multihost_utils.process_allgather(np.array(yes)).all())
