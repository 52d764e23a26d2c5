"""Checkpoints of a training run: state, data position and configuration together (Orbax).

A directory holds one checkpoint per saved step, named by it. A save becomes visible at once and
whole: what a killed process leaves half-written is not taken for a checkpoint. Each checkpoint
carries a digest of its arrays, made on the devices: one bit changed on disk is noticed on reading.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ddim_jax.storage.checkpoint_folder import (
    CheckpointError,
    DamagedError,
    Path,
    check_facts,
    check_same,
    damaged,
    readable,
    saved_steps,
    sealed,
    writable,
)
from ddim_jax.storage.digest import digests

STATE = "state"

PyTree = Any


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
        with writable(self.directory):
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
        with writable(self.directory):
            self._wait()
        latest = self._orbax.latest
        if latest is not None and step <= latest.step:
            raise CheckpointError(f"step {step} does not come after the saved step {latest.step}")
        facts = json.loads(json.dumps({"config": config, "data_state": data_state}))  # a copy
        copies = _room_beside(state) if self._copies is None else self._copies
        with writable(self.directory):
            if copies:
                state = _copied(state)
                self._begun = self._pool.submit(self._write, step, state, facts)
            else:
                self._write(step, state, facts)

    def _write(self, step: int, state: PyTree, facts: dict[str, Any]) -> None:
        facts = sealed({**facts, "digests": digests(_parts(state))})
        self._orbax.save_checkpointables_async(
            step, {STATE: state}, force=True, custom_metadata=facts
        )

    def _wait(self) -> None:
        """Until the save before has been handed to Orbax; raises what went wrong."""
        begun, self._begun = self._begun, None
        if begun:
            begun.result()


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _room_beside(state: PyTree) -> bool:
    """Whether a copy of the state fits on its devices, and may be written by a thread of its own.

    Threads of several processes would not keep the order of what the processes do together.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("peak_bytes_in_use", 0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return jax.process_count() == 1 and jax.default_backend() != "cpu" and size < free


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
        check_same(path, saved, like)
        with readable(path), _alone():
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
    with readable(path):
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
        raise CheckpointError(
            f"{directory} has no step {step}; it has {', '.join(map(str, steps))}"
        )
    if not path.is_dir():
        raise damaged(path, "it is not a folder")
    with readable(path):
        metadata = ocp.checkpointables_metadata(path)
    facts, items = metadata.custom_metadata or {}, metadata.metadata or {}
    check_facts(path, facts)
    if not jax.tree.leaves(items.get(STATE)):
        raise damaged(path, "it has no arrays")
    return path, facts, items[STATE]


def _alone() -> contextlib.AbstractContextManager[Any]:
    """Reading without Orbax's barriers between processes."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    return ocp.Context(multiprocessing_options=options)


def _parts(state: PyTree) -> Mapping[str, PyTree]:
    return state._asdict() if hasattr(state, "_asdict") else state


def _verify(path: pathlib.Path, facts: dict[str, Any], parts: Mapping[str, PyTree]) -> None:
    found = digests(parts)
    wrong = [name for name in found if found[name] != facts.get("digests", {}).get(name)]
    if wrong:
        raise damaged(path, f"the arrays of {', '.join(wrong)} are not those that were saved")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
