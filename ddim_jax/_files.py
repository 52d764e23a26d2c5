"""Files that appear whole or not at all, and configurations compared."""

from __future__ import annotations

import os
import pathlib
import reprlib
import tempfile
from collections.abc import Mapping
from typing import Any


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, replacing one of that name; a reader sees the old one or all of the new one.

    Args:
      path: the file; its folder must exist.
      content: its bytes.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "note"
      >>> write_whole(path, b"all of it")
      >>> path.read_text()
      'all of it'
    """
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.seed": 0, …} of nested dicts; lists are values.

    Example:
      >>> flat({"train": {"seed": 0}, "name": "a"})
      {'train.seed': 0, 'name': 'a'}
    """
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each name on which two flat dicts differ.

    Example:
      >>> differences({"seed": 1}, {"seed": 2, "batch": 8})
      ['  batch: saved nothing, now 8', '  seed: saved 1, now 2']
    """

    def show(values: Mapping[str, Any], name: str) -> str:
        return reprlib.repr(values[name]) if name in values else "nothing"

    return [
        f"  {name}: saved {show(saved, name)}, now {show(now, name)}"
        for name in sorted(saved.keys() | now.keys())
        if name not in saved or name not in now or saved[name] != now[name]
    ]
