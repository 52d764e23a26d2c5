"""Checkpoints of a training run: state, data position and configuration together (Orbax).

A directory holds one checkpoint per saved step, named by it. A save becomes visible at once and
whole: what a killed process leaves half-written is not taken for a checkpoint.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
from orbax.checkpoint import v1 as ocp

FORMAT = 1
STATE = "state"

PyTree = Any
Path = str | PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or does not fit what is wanted of it."""


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

    def __init__(self, directory: Path, keep: int = 3) -> None:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits until the last save is on disk, and releases Orbax's threads."""
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
          CheckpointError: the step is not larger than the last.
        """
        latest = self._orbax.latest
        if latest is not None and step <= latest.step:
            raise CheckpointError(f"step {step} does not come after the saved step {latest.step}")
        facts = {"format": FORMAT, "config": dict(config), "data_state": dict(data_state)}
        self._orbax.save_checkpointables_async(
            step, {STATE: state}, force=True, custom_metadata=facts
        )


def saved_steps(directory: Path) -> list[int]:
    """The steps saved in `directory`, ascending; empty if there are none or no directory."""
    path = pathlib.Path(directory)
    return sorted(int(p.name) for p in path.glob("*") if p.name.isdigit() and p.is_dir())


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
      CheckpointError: no such checkpoint, a damaged or foreign one, or leaves that differ from
        `like`; the message names them.
    """
    path, facts, saved = _open(directory, step)
    _check_same(path, _leaves(saved), _leaves(like))
    with _readable(path):
        state = ocp.load_checkpointables(path, {STATE: jax.tree.map(_abstract, like)})[STATE]
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
    path, _, saved = _open(directory, step)
    if part not in saved:
        raise CheckpointError(f"{path} has no part {part!r}; it has {', '.join(sorted(saved))}")
    wanted = {
        name: jax.tree.map(_abstract if name == part else lambda _: ..., tree)
        for name, tree in saved.items()
    }
    with _readable(path):
        return ocp.load_checkpointables(path, {STATE: wanted})[STATE][part]


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
    with _readable(path):
        metadata = ocp.checkpointables_metadata(path)
    facts, items = metadata.custom_metadata or {}, metadata.metadata or {}
    if "format" not in facts or not jax.tree.leaves(items.get(STATE)):
        raise CheckpointError(f"{path} is damaged, or was not written by ddim_jax{_others(path)}")
    if facts["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {facts['format']}, this version reads up to {FORMAT}: "
            "update ddim_jax"
        )
    return path, facts, items[STATE]


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Orbax raises many kinds of error on damaged files; here they become one that names it."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise CheckpointError(
            f"{path} cannot be read and may be damaged{_others(path)} "
            f"({type(error).__name__}: {reason})"
        ) from error


def _others(path: pathlib.Path) -> str:
    steps = [step for step in saved_steps(path.parent) if step != int(path.name)]
    beside = f"; other steps saved beside it: {_list(steps)}"
    return f"{beside} (move {path.name} elsewhere to use them)" if steps else ""


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
    differ = [
        f"  {name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differ:
        more = [f"  and {len(differ) - 8} more"] if len(differ) > 8 else []
        raise CheckpointError(
            "\n".join([f"{path} does not fit this model or optimiser:", *differ[:8], *more])
        )
