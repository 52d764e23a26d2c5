"""Files that appear whole or not at all, and configurations compared."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import reprlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in a `with` block: it replaces `path` where the block ends without an error.

    Until then, and after an error, what was there before stays; a killed process leaves a file
    "<name>.<hex>.tmp" beside it.

    Args:
      path: the file; its folder must exist.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "note"
      >>> with whole_file(path) as file:
      ...     _ = file.write(b"all of it")
      >>> path.read_text()
      'all of it'
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}; make it first")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to a `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def stand_in(path: str | os.PathLike[str]) -> str:
    """What lies there in place of a file's content, and what to do; "" if it is nothing known.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(b"version https://git-lfs.github.com/spec/v1"), file.flush()
      ...     stand_in(file.name)
      'it is a pointer of Git LFS to the content, which git lfs pull there fetches'
    """
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS to the content, which git lfs pull there fetches"
    if head.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, as of a download that failed: download it again"
    return ""


def portable(word: str) -> str:
    """A word of a command line without the folders of this machine, to be written into results.

    Example:
      >>> portable("--out=/home/me/results"), portable("resnet56:/data/r.npz"), portable("runs/a")
      ('--out=results', 'resnet56:r.npz', 'runs/a')
    """

    def short(match: re.Match[str]) -> str:
        path, here = pathlib.Path(match[2]), pathlib.Path.cwd()
        return match[1] + (str(path.relative_to(here)) if here in path.parents else path.name)

    return re.sub(r"^((?:[^/]*[:=])?)(/.*)$", short, word)


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
    """One line for each name, of `flat`, on which two configurations differ.

    Example:
      >>> differences({"train": {"seed": 1}}, {"train": {"seed": 2}, "batch": 8})
      ['  batch: saved nothing, now 8', '  train.seed: saved 1, now 2']
    """
    saved, now = flat(saved), flat(now)

    def show(values: Mapping[str, Any], name: str) -> str:
        return reprlib.repr(values[name]) if name in values else "nothing"

    return [
        f"  {name}: saved {show(saved, name)}, now {show(now, name)}"
        for name in sorted(saved.keys() | now.keys())
        if name not in saved or name not in now or saved[name] != now[name]
    ]
