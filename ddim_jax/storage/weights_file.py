"""One network's weights in one file: safetensors, with JSON metadata in its header.

The format runs no code when read. Tensors are named by their path, "down_0/conv/kernel".
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from ddim_jax.storage.files import stand_in, write_whole

HEADER_KEY = "ddim_jax"
FORMAT = 1
T = TypeVar("T")


def save_weights(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    float16: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a nested dict of arrays and a JSON-able dict; the file appears whole or not at all.

    Args:
      path: file to write; its directory must exist.
      params: nested dict of arrays, keys without "/", no empty dicts.
      metadata: JSON-able facts: the model's configuration, how it was trained.
      float16: store float32 arrays in half the space; `load_weights` returns float32 again.
      overwrite: replace an existing file.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.
      ValueError: a key that cannot be stored, an empty dict, a value float16 cannot hold.
      TypeError: a leaf that is not an array, metadata that is not JSON-able.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/tiny.safetensors"
      >>> save_weights(path, {"dense": {"bias": np.ones(2, np.float32)}}, {"channels": 2})
      >>> load_weights(path)
      ({'dense': {'bias': array([1., 1.], dtype=float32)}}, {'channels': 2})
    """
    path = pathlib.Path(path)
    arrays = dict(_flatten(params))
    narrowed = sorted(name for name, a in arrays.items() if float16 and a.dtype == np.float32)
    for name in narrowed:
        arrays[name] = _to_float16(name, arrays[name])
    header = {"format": FORMAT, "float16": narrowed, "metadata": metadata}
    text = json.dumps(header, allow_nan=False)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    write_safetensors(path, arrays, {HEADER_KEY: text})


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_weights` wrote.

    Args:
      path: file to read.

    Returns:
      (params, metadata): a nested dict of NumPy arrays, float32 where float32 was saved, and the
      metadata. Put the arrays on the device once (`jax.device_put`) before calling a jitted
      function many times.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file, or not one of ours, or of a newer format.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    arrays, metadata = read_safetensors(path)
    if HEADER_KEY not in metadata:
        raise ValueError(f"{path} was not written by ddim_jax: its header has no {HEADER_KEY!r}")
    try:
        header = json.loads(metadata[HEADER_KEY])
        if header["format"] <= FORMAT:
            for name in header["float16"]:
                arrays[name] = arrays[name].astype(np.float32)
            return _nest(arrays), dict(header["metadata"])
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error!r}") from error
    raise ValueError(
        f"{path} has format {header['format']}, this version reads up to {FORMAT}: update ddim_jax"
    )


def write_safetensors(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes named arrays and a header of strings; replaces the file, whole or not at all."""
    write_whole(path, safetensors.numpy.save(dict(arrays), dict(metadata)))


def is_ours(path: pathlib.Path) -> bool:
    """Whether `save_weights` wrote it, by its header; ValueError where it is not intact."""
    return HEADER_KEY in _opened(path, lambda file: file.metadata() or {})


def tensor_names(path: pathlib.Path) -> list[str]:
    """The names in a safetensors file, of which the header alone is read."""
    return _opened(path, lambda file: list(file.keys()))


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, header) of any safetensors file; ValueError where it is not intact."""

    def read(file: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118

    return _opened(path, read)


def _opened(path: pathlib.Path, read: Callable[[Any], T]) -> T:
    try:
        with safetensors.safe_open(path, "np") as file:
            return read(file)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not an intact safetensors file: {stand_in(path) or error}"
        ) from error


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if not tree:
        raise ValueError(f"params{'/' + prefix[:-1] if prefix else ''} is an empty dict")
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f"keys must be non-empty strings without '/', got {key!r}")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif hasattr(value, "dtype"):
            yield prefix + key, np.asarray(value, order="C")
        else:
            raise TypeError(f"params/{prefix}{key} must be an array, got {type(value).__name__}")


def _nest(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def _to_float16(name: str, array: np.ndarray) -> np.ndarray:
    largest = np.abs(array).max(initial=0.0)
    if not largest <= np.finfo(np.float16).max:
        raise ValueError(f"params/{name} holds {largest}, which float16 cannot; use float16=False")
    return array.astype(np.float16)
