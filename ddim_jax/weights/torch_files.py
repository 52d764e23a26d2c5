"""PyTorch checkpoint files as NumPy arrays, without PyTorch, and without running anything in them.

Such a file holds a pickle, and a pickle may name any Python function and call it. Here it is
only read (`torch_pickle`).
"""

from __future__ import annotations

import io
import mmap
import os
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

from ddim_jax.storage.files import stand_in
from ddim_jax.weights.torch_pickle import ForeignObject, Storage, a, unpickle

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before PyTorch 1.6
LEGACY_HEAD = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little")
ZIP_HEAD = b"PK\x03\x04"
DAMAGE = (
    *(EOFError, IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError),
    *(RecursionError, NotImplementedError, RuntimeError, struct.error, zipfile.BadZipFile),
)
CLEAN = """
Where you trust it, and have PyTorch and the program that wrote it, make a clean file:
  d = torch.load({path!r}, map_location="cpu", weights_only=False)  # this runs what is in it
  torch.save(d["state_dict"], "clean.pt")  # or d["model"], d["ema"], d.state_dict()"""


def load_torch(path: str | os.PathLike[str]) -> Any:
    """Reads what `torch.save` wrote: both the zip format and the one before PyTorch 1.6.

    Args:
      path: a file of tensors in dicts, lists and tuples, a state dict for example. Whole modules
        (`torch.save(model, ...)`) hold code and are refused.

    Returns:
      The same structure, with a read-only NumPy array for each tensor or parameter (bfloat16 is
      `ml_dtypes.bfloat16`), a dict for each OrderedDict and Counter, a list for each set, a
      string for each device, a number for each scalar of NumPy. Tensors that share memory still
      do.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a PyTorch file, it is damaged, or it asks for an object that is not
        plain data; nothing of it has been run.

    Example:
      >>> load_torch("model.ckpt")
      Traceback (most recent call last):
      FileNotFoundError: no checkpoint file model.ckpt
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        head = _head(path)
        if head == LEGACY_HEAD:
            return _load_legacy(path)
        if head.startswith(ZIP_HEAD):
            return _load_zip(path)
        raise ValueError(
            stand_in(path) or "it begins like neither of the two formats of torch.save"
        )
    except ForeignObject as error:
        hint = CLEAN.format(path=str(path))
        raise ValueError(
            f"{path} is not a PyTorch file that can be read here: {error}{hint}"
        ) from error
    except DAMAGE as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a PyTorch file that can be read here: {reason}") from error


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as `torch.save` begins its files; any zip archive does."""
    head = _head(path)
    return head.startswith(ZIP_HEAD) or head == LEGACY_HEAD


def _head(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(LEGACY_HEAD))


def _load_zip(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise ValueError("it has two records of one name")
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records data.pkl, where PyTorch writes one")
        folder = pickles[0].removesuffix("/data.pkl")
        if f"{folder}/constants.pkl" in records:
            raise ValueError("it is a TorchScript program; save its state_dict() instead")
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(
                    f"{name!r} in it is compressed or encrypted, unlike PyTorch's files"
                )
        order = records.get(f"{folder}/byteorder")
        swapped = order is not None and archive.read(order) == b"big"
        spare = path.stat().st_size
        loaded: dict[str, np.ndarray] = {}

        def read(key: str, dtype: np.dtype, nbytes: int) -> np.ndarray:
            nonlocal spare
            if key not in loaded:
                info = records.get(f"{folder}/data/{key}")
                if info is None:
                    raise ValueError(f"storage {key!r} is not in the file")
                spare -= info.file_size
                if spare < 0:
                    raise ValueError("its storages overlap")
                data = np.frombuffer(archive.read(info), np.uint8)
                if swapped:
                    data = data.view(f"u{dtype.itemsize}").byteswap().view(np.uint8)
                loaded[key] = data
            if loaded[key].size != nbytes:
                raise ValueError(f"storage {key!r} has {loaded[key].size} bytes, not {nbytes}")
            return loaded[key]

        return unpickle(io.BytesIO(archive.read(pickles[0])), read)


def _load_legacy(path: pathlib.Path) -> Any:
    # A map of the file, not a file: read(n) then allocates what there is, whatever n claims.
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as file:
        _magic, version, _system = (unpickle(file) for _ in range(3))
        if version != 1001:
            raise ValueError("it is not version 1001 of the format")
        spare = len(file)
        storages: dict[str, Storage] = {}

        def reserve(key: str, dtype: np.dtype, nbytes: int) -> np.ndarray:
            nonlocal spare
            if key not in storages:
                spare -= nbytes
                if spare < 0:
                    raise ValueError(f"storage {key!r} claims more bytes than the file has")
                storages[key] = Storage(np.empty(nbytes, np.uint8), dtype)
            if storages[key].data.size != nbytes:
                raise ValueError(f"storage {key!r} has two sizes")
            return storages[key].data

        result = unpickle(file, reserve)
        keys = unpickle(file)
        if sorted(a(str, key) for key in a(list, keys)) != sorted(storages):
            raise ValueError("its list of storages is not the storages that its tensors use")
        for key in keys:
            data, dtype = storages[key]
            if int.from_bytes(file.read(8), "little") * dtype.itemsize != data.size:
                raise ValueError(f"storage {key!r} has another size than its tensors say")
            data[:] = np.frombuffer(file.read(data.size), np.uint8)
        return result
