"""Checkpoints of a training run: state, data position and configuration together (Orbax).

A directory holds one checkpoint per saved step, named by it. A save becomes visible at once and
whole: what a killed process leaves half-written is not taken for a checkpoint. Each checkpoint
carries a digest of its arrays, made on the devices: one bit changed on disk is noticed on reading.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ddim_jax.storage.digest import digests
from ddim_jax.storage.files import differences

FORMAT = 2
STATE = "state"

PyTree = Any
Path = str | PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or does not fit what is wanted of it."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are missing, cut short or garbled."""


class Restored(NamedTuple):
    """What one checkpoint holds."""

    step: int
    state: PyTree  # as saved, or as `like` in `restore`
    data_state: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """Writes checkpoints of one run in the background; use it in a `with` block.

    Args:
      directory: made if missing; may hold earlier checkpoints of the same run, nothing else.
      keep: how many of the latest checkpoints stay, ≥ 1.
      copies: copy a state on its devices, and do all else beside what follows; None: where one
        process alone runs, not on a CPU, and there is room.

    Raises:
      ValueError: `keep` < 1, or the directory holds something that is not a checkpoint.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> directory = tempfile.mkdtemp()
      >>> with Checkpoints(directory, keep=2) as checkpoints:
      ...     for step in (1, 2, 3):
      ...         state = {"ema": {"w": jnp.full(2, step, jnp.float32)}}
      ...         checkpoints.save(step, state, {"next_index": step}, {"channels": 32})
      >>> saved_steps(directory), restore_config(directory)
      ([2, 3], {'channels': 32})
      >>> restore_part(directory, "ema")
      {'w': Array([3., 3.], dtype=float32)}
    """

    def __init__(self, directory: Path, keep: int = 3, copies: bool | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = pathlib.Path(directory).resolve()
        if self.directory.exists():
            foreign = [p.name for p in self.directory.iterdir() if p.name[:1] not in ".0123456789"]
            if foreign:
                raise CheckpointError(
                    f"{self.directory} holds things that are not checkpoints: "
                    f"{', '.join(sorted(foreign)[:5])}; choose an empty or new directory"
                )
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._copies = copies
        self._pool = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until the last save is on disk, and releases Orbax's threads."""
        with self._writable():
            try:
                self._wait()
            finally:
                self._pool.shutdown()
                self._orbax.close()

    def save(
        self,
        step: int,
        state: PyTree,
        data_state: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        """Starts saving; waits first for a save still under way. `state` may be donated at once.

        Args:
          step: the checkpoint's name; larger than any saved before.
          state: pytree of arrays.
          data_state: JSON-able position of the data iterator.
          config: JSON-able configuration.

        Raises:
          CheckpointError: the step is not larger than the last, or the save before could not be
            written (the disk is full, say); earlier checkpoints stay.
        """
        with self._writable():
            self._wait()
        latest = self._orbax.latest
        if latest is not None and step <= latest.step:
            raise CheckpointError(f"step {step} does not come after the saved step {latest.step}")
        facts = {"format": FORMAT, "config": config, "data_state": data_state}
        facts = json.loads(json.dumps(facts))  # a copy, as it is written later
        copies = _room_beside(state) if self._copies is None else self._copies
        with self._writable():
            if copies:
                state = _copied(state)
                self._begun = self._pool.submit(self._write, step, state, facts)
            else:
                self._write(step, state, facts)

    def _write(self, step: int, state: PyTree, facts: dict[str, Any]) -> None:
        facts["digests"] = digests(_parts(state))
        facts["sha256"] = _sha256(facts)
        self._orbax.save_checkpointables_async(
            step, {STATE: state}, force=True, custom_metadata=facts
        )

    def _wait(self) -> None:
        """Until the save before has been handed to Orbax; raises what went wrong."""
        begun, self._begun = self._begun, None
        if begun:
            begun.result()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            with _quiet(logging.ERROR):  # "Waiting for previous save …", across a progress bar
                yield
        except Exception as error:
            there = _list(saved_steps(self.directory)) or "none"
            raise CheckpointError(
                f"could not write a checkpoint in {self.directory} (is the disk full?); those "
                f"written before are intact: {there} ({_reason(error)})"
            ) from error


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _room_beside(state: PyTree) -> bool:
    """Whether a copy of the state fits on its devices, and may be written by a thread of its own.

    Threads of several processes would not keep the order of what the processes do together.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("peak_bytes_in_use", 0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return jax.process_count() == 1 and jax.default_backend() != "cpu" and size < free


def saved_steps(directory: Path) -> list[int]:
    """The steps saved in `directory`, ascending; empty if there are none or no directory.

    Raises:
      CheckpointError: the directory cannot be listed.
    """
    path = pathlib.Path(directory)
    try:
        found = list(path.iterdir()) if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read the directory {path}: {error}") from error
    return sorted(int(p.name) for p in found if p.name.isdecimal())


def set_aside(directory: Path, step: int) -> pathlib.Path:
    """Moves a damaged checkpoint to `damaged/` beside `directory`; nothing is deleted.

    Args:
      directory: where `Checkpoints` wrote; no `Checkpoints` may be open on it.
      step: which checkpoint.

    Returns:
      Where it is now.
    """
    directory = pathlib.Path(directory).resolve()
    shelf = directory.parent / "damaged"
    shelf.mkdir(exist_ok=True)
    names = [str(step), *(f"{step}-{i}" for i in range(1, 1 + len(list(shelf.iterdir()))))]
    free = next(name for name in names if not (shelf / name).exists())
    return (directory / str(step)).rename(shelf / free)


def restore(directory: Path, like: PyTree, step: int | None = None) -> Restored:
    """Reads a whole checkpoint, exactly as it was saved.

    Args:
      directory: where `Checkpoints` wrote.
      like: pytree of arrays or `jax.ShapeDtypeStruct`s with the wanted structure, shapes, dtypes
        and (where given) shardings, which may differ from those at the time of saving.
      step: which checkpoint; default the latest.

    Returns:
      `Restored`.

    Raises:
      DamagedError: its files are missing, cut short or garbled.
      CheckpointError: no such checkpoint, a foreign one, or leaves that differ from `like`; the
        message names them.
    """
    error: CheckpointError | None = None
    try:
        path, facts, saved = _open(directory, step)
        _check_same(path, _leaves(saved), _leaves(like))
        with _readable(path), _alone():
            state = ocp.load_checkpointables(path, {STATE: jax.tree.map(_abstract, like)})[STATE]
    except CheckpointError as failed:
        error = failed
    if jax.process_count() > 1:  # one that fails alone would leave the others waiting
        fine = multihost_utils.process_allgather(np.array(error is None))
        if error is None and not fine.all():
            error = DamagedError(f"{path} could not be read by process {fine.argmin()}")
    if error is not None:
        raise error
    _verify(path, facts, _parts(state))
    return Restored(int(path.name), state, facts["data_state"], facts["config"])


def restore_part(directory: Path, part: str = "ema", step: int | None = None) -> PyTree:
    """Reads one field of the saved state, "ema" or "params" say, and nothing else.

    Args:
      directory: where `Checkpoints` wrote.
      part: name of a field (NamedTuple) or key (dict) at the top of the state.
      step: which checkpoint; default the latest.

    Returns:
      The field as nested dicts and lists of arrays, on the default device.

    Raises:
      CheckpointError: as `restore`, or there is no such part.
    """
    path, facts, saved = _open(directory, step)
    if part not in saved:
        raise CheckpointError(f"{path} has no part {part!r}; it has {', '.join(sorted(saved))}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not where it was saved

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    wanted = {
        name: jax.tree.map(abstract if name == part else lambda _: ..., tree)
        for name, tree in saved.items()
    }
    with _readable(path):
        found = ocp.load_checkpointables(path, {STATE: wanted})[STATE][part]
    _verify(path, facts, {part: found})
    return found


def restore_config(directory: Path, step: int | None = None) -> dict[str, Any]:
    """Reads the configuration alone; arguments and errors as `restore_part`."""
    return _open(directory, step)[1]["config"]


def _open(directory: Path, step: int | None) -> tuple[pathlib.Path, dict[str, Any], PyTree]:
    """The path, the saved facts, and the tree of saved shapes of one checkpoint."""
    directory = pathlib.Path(directory).resolve()
    steps = saved_steps(directory)
    if not steps:
        found = sorted(p.name for p in directory.glob("*"))[:5]
        state = ("holds " + ", ".join(found) if found else "is empty") + ", no checkpoint"
        raise CheckpointError(f"{directory} {state if directory.is_dir() else 'does not exist'}")
    path = directory / str(steps[-1] if step is None else step)
    if int(path.name) not in steps:
        raise CheckpointError(f"{directory} has no step {step}; it has {_list(steps)}")
    if not path.is_dir():
        raise DamagedError(f"{path} is damaged: it is not a folder{_others(path)}")
    with _readable(path):
        metadata = ocp.checkpointables_metadata(path)
    facts, items = metadata.custom_metadata or {}, metadata.metadata or {}
    if not isinstance(facts.get("format"), int):
        raise DamagedError(f"{path} is damaged, or was not written by ddim_jax{_others(path)}")
    if facts["format"] != FORMAT:
        what = "update ddim_jax" if facts["format"] > FORMAT else "an older ddim_jax reads it"
        raise CheckpointError(
            f"{path} has format {facts['format']}, this version reads {FORMAT}: {what}"
        )
    if facts.get("sha256") != _sha256(facts):
        raise DamagedError(
            f"{path} is damaged: its configuration is not that which was saved{_others(path)}"
        )
    if not jax.tree.leaves(items.get(STATE)):
        raise DamagedError(f"{path} is damaged: it has no arrays{_others(path)}")
    return path, facts, items[STATE]


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Orbax raises many kinds of error on damaged files; here they become one that names it."""
    try:
        with _quiet(logging.CRITICAL):
            yield
    except Exception as error:
        if isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error):
            raise CheckpointError(f"{path} cannot be read here: {_reason(error)}") from error
        raise DamagedError(
            f"{path} cannot be read and may be damaged{_others(path)} ({_reason(error)})"
        ) from error


@contextlib.contextmanager
def _quiet(lowest: int) -> Iterator[None]:
    """Orbax's log, which goes to stderr, from this level on alone."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(lowest)
    try:
        yield
    finally:
        log.setLevel(level)


def _alone() -> contextlib.AbstractContextManager[Any]:
    """Reading without Orbax's barriers between processes."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    return ocp.Context(multiprocessing_options=options)


def _sha256(facts: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _others(path: pathlib.Path) -> str:
    steps = [step for step in saved_steps(path.parent) if step != int(path.name)]
    return f"; other steps saved beside it: {_list(steps)}" if steps else ""


def _parts(state: PyTree) -> Mapping[str, PyTree]:
    return state._asdict() if hasattr(state, "_asdict") else state


def _verify(path: pathlib.Path, facts: dict[str, Any], parts: Mapping[str, PyTree]) -> None:
    found = digests(parts)
    wrong = [name for name in found if found[name] != facts.get("digests", {}).get(name)]
    if wrong:
        raise DamagedError(
            f"{path} is damaged: the arrays of {', '.join(wrong)} are not those that were "
            f"saved{_others(path)}"
        )


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: PyTree) -> dict[str, str]:
    """{"params/conv/kernel": "float32[3,3,1,8]", …}, for NamedTuples and dicts alike."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _check_same(path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    if differ := differences(saved, wanted):
        more = [f"  and {len(differ) - 8} more"] if len(differ) > 8 else []
        raise CheckpointError(
            "\n".join([f"{path} does not fit this model or optimiser:", *differ[:8], *more])
        )
