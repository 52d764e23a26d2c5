"""A folder of checkpoints: the steps saved in it, and what is said of one that cannot be read."""

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import jax

from ddim_jax.storage.files import differences

FORMAT = 2

PyTree = Any
Path = str | PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or does not fit what is wanted of it."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are missing, cut short or garbled."""


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


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a checkpoint with `FORMAT` and their own digest, for `check_facts`."""
    facts = {**facts, "format": FORMAT}
    return {**facts, "sha256": _sha256(facts)}


def check_facts(path: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Raises CheckpointError where facts are not as `sealed` made them, or of another format."""
    if not isinstance(facts.get("format"), int):
        raise DamagedError(f"{path} is damaged, or was not written by ddim_jax{_others(path)}")
    if facts["format"] != FORMAT:
        what = "update ddim_jax" if facts["format"] > FORMAT else "an older ddim_jax reads it"
        raise CheckpointError(
            f"{path} has format {facts['format']}, this version reads {FORMAT}: {what}"
        )
    if facts.get("sha256") != _sha256(facts):
        raise damaged(path, "its configuration is not that which was saved")


def check_same(path: pathlib.Path, saved: PyTree, wanted: PyTree) -> None:
    """Raises CheckpointError where two trees have other leaves, which it names."""
    if differ := differences(_leaves(saved), _leaves(wanted)):
        more = [f"  and {len(differ) - 8} more"] if len(differ) > 8 else []
        raise CheckpointError(
            "\n".join([f"{path} does not fit this model or optimiser:", *differ[:8], *more])
        )


def damaged(path: pathlib.Path, what: str) -> DamagedError:
    """The error that says so, and which other steps there are."""
    return DamagedError(f"{path} is damaged: {what}{_others(path)}")


@contextlib.contextmanager
def readable(path: pathlib.Path) -> Iterator[None]:
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
def writable(directory: pathlib.Path) -> Iterator[None]:
    """What goes wrong in writing becomes one error that says what is still there."""
    try:
        with _quiet(logging.ERROR):  # "Waiting for previous save …", across a progress bar
            yield
    except Exception as error:
        there = _listed(saved_steps(directory)) or "none"
        raise CheckpointError(
            f"could not write a checkpoint in {directory} (is the disk full?); those "
            f"written before are intact: {there} ({_reason(error)})"
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


def _sha256(facts: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _others(path: pathlib.Path) -> str:
    steps = [step for step in saved_steps(path.parent) if step != int(path.name)]
    return f"; other steps saved beside it: {_listed(steps)}" if steps else ""


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _leaves(tree: PyTree) -> dict[str, str]:
    """{"params/conv/kernel": "float32[3,3,1,8]", …}, for NamedTuples and dicts alike."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
