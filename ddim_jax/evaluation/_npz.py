"""Arrays and a JSON header in one `.npz` file: written whole or not at all, read without pickle."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.storage.files import whole_file

FORMAT = 1
_HEADER = "header"
DAMAGE = (ValueError, OSError, EOFError, AttributeError, NotImplementedError, RuntimeError)


def save_npz(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    *,
    overwrite: bool = False,
) -> None:
    """Writes `arrays` and a JSON-able `header`.

    Args:
      path: the file; its directory must exist.
      kind: what the file holds, checked by `load_npz`.
      header: JSON-able facts.
      arrays: by name, of plain dtypes.
      overwrite: replace an existing file.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.
    """
    path = pathlib.Path(path)
    text = json.dumps({"format": FORMAT, "kind": kind, "facts": header}, allow_nan=False)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or pass overwrite=True")
    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **{_HEADER: np.array(text)}, **arrays)


def load_npz(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `save_npz` wrote: (header, arrays).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, of another kind or origin, or of a newer format.
    """
    arrays = read_arrays(path, kind)
    try:
        header = json.loads(str(arrays.pop(_HEADER)))
        found, version, facts = header["kind"], header["format"], header["facts"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no {kind} of ddim_jax: it has no such header") from error
    if found != kind:
        raise ValueError(f"{path} holds {found}, not {kind}")
    if version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads up to {FORMAT}: update ddim_jax"
        )
    return facts, arrays


def read_arrays(path: str | os.PathLike[str], kind: str) -> dict[str, np.ndarray]:
    """The arrays of any `.npz` file, all of whose bytes are checked against their CRC.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, no `.npz` file, or holds a pickle.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file {path}")
    try:
        with open(path, "rb") as handle:
            file = np.load(handle, allow_pickle=False)
            arrays = {name: file[name] for name in file.files}
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an intact .npz file: {error}") from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"{path} is not an intact .npz file: it holds more than arrays")
    return arrays
