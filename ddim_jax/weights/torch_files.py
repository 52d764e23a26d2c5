"""PyTorch checkpoint files as NumPy arrays, without PyTorch, and without running anything in them.

Such a file holds a pickle, and a pickle may name any Python function and call it. Here its opcodes
are only read, by a small stack machine that knows dicts, lists, tuples, numbers, strings and
tensors. Whatever else the file asks for is refused by name.
"""

from __future__ import annotations

import io
import mmap
import os
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

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


class _ForeignObject(ValueError):
    """The pickle names an object that is not plain data."""


class _Storage(NamedTuple):
    """A run of bytes that tensors are views of."""

    data: np.ndarray  # (nbytes,) uint8
    dtype: np.dtype


def load_torch(path: str | os.PathLike[str]) -> Any:
    """Reads what `torch.save` wrote: both the zip format and the one before PyTorch 1.6.

    Args:
      path: a file of tensors in dicts, lists and tuples, a state dict for example. Whole modules
        (`torch.save(model, ...)`) hold code and are refused.

    Returns:
      The same structure, with a read-only NumPy array for each tensor or parameter (bfloat16 is
      `ml_dtypes.bfloat16`) and a dict for each OrderedDict. Tensors that share memory still do.

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
        raise ValueError("it begins like neither of the two formats of torch.save")
    except _ForeignObject as error:
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

        return _unpickle(io.BytesIO(archive.read(pickles[0])), read)


def _load_legacy(path: pathlib.Path) -> Any:
    # A map of the file, not a file: read(n) then allocates what there is, whatever n claims.
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as file:
        _magic, version, _system = (_unpickle(file) for _ in range(3))
        if version != 1001:
            raise ValueError("it is not version 1001 of the format")
        spare = len(file)
        storages: dict[str, _Storage] = {}

        def reserve(key: str, dtype: np.dtype, nbytes: int) -> np.ndarray:
            nonlocal spare
            if key not in storages:
                spare -= nbytes
                if spare < 0:
                    raise ValueError(f"storage {key!r} claims more bytes than the file has")
                storages[key] = _Storage(np.empty(nbytes, np.uint8), dtype)
            if storages[key].data.size != nbytes:
                raise ValueError(f"storage {key!r} has two sizes")
            return storages[key].data

        result = _unpickle(file, reserve)
        keys = _unpickle(file)
        if sorted(_a(str, key) for key in _a(list, keys)) != sorted(storages):
            raise ValueError("its list of storages is not the storages that its tensors use")
        for key in keys:
            data, dtype = storages[key]
            if int.from_bytes(file.read(8), "little") * dtype.itemsize != data.size:
                raise ValueError(f"storage {key!r} has another size than its tensors say")
            data[:] = np.frombuffer(file.read(data.size), np.uint8)
        return result


def _no_storage(key: str, dtype: np.dtype, nbytes: int) -> np.ndarray:
    raise ValueError(f"storage {key!r} is asked for where there is none")


def _unpickle(file: Any, read: Callable[[str, np.dtype, int], np.ndarray] = _no_storage) -> Any:
    """The object of one pickle; `read(key, dtype, nbytes)` gives the bytes of a storage."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(n: int) -> list[Any]:
        if n > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("its pickle takes more than it put")
        items = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return items

    def pop_mark() -> list[Any]:
        items = pop(len(stack) - marks[-1])
        marks.pop()
        return items

    op: Any
    arg: Any
    for op, arg, _ in pickletools.genops(file):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (result,) = stack
                return result
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING":
                stack.append(arg)
            case "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(op.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "APPEND" | "APPENDS":
                items = pop(1) if op.name == "APPEND" else pop_mark()
                _a(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop(2) if op.name == "SETITEM" else pop_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _a(dict, stack[-1])[_a(str | int | float | None, key)] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_global(arg))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join(_a(str, part) for part in pop(2))))
            case "REDUCE":
                function, args = pop(2)
                if not callable(function):
                    raise ValueError("its pickle calls what is not a function")
                stack.append(function(*_a(tuple, args)))
            case "BUILD":  # the attributes of an OrderedDict: a state dict's _metadata, not needed
                pop(1)
                _a(dict, stack[-1])
            case "BINPERSID":
                kind, dtype, key, _location, size, *view = pop(1)[0]
                if kind != "storage" or any(part is not None for part in view):
                    raise ValueError("it refers to something other than a plain storage")
                nbytes = _a(int, size) * _a(np.dtype, dtype).itemsize
                if nbytes < 0:
                    raise ValueError(f"storage {key!r} has a negative size")
                stack.append(_Storage(read(_a(str, key), dtype, nbytes), dtype))
            case name:
                raise ValueError(f"its pickle uses {name}, which tensors do not need")
    raise EOFError("the pickle has no end")


def _a(kind: Any, value: Any) -> Any:
    """`value`, which must be of that kind."""
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} where none belongs")
    return value


def _tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> np.ndarray:
    if metadata:
        raise ValueError("a tensor is lazily conjugated or negated: resolve it before saving")
    data, dtype = _a(_Storage, storage)
    numbers = [_a(int, n) for n in (offset, *_a(tuple, size), *_a(tuple, stride))]
    # NumPy's own check of the bounds can overflow.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(numbers) < 0 or (0 not in size and last >= data.size // dtype.itemsize):
        raise ValueError("a tensor reaches outside of its storage")
    if 0 in size:
        array = np.empty(size, dtype)
    else:
        strides = [step * dtype.itemsize for step in stride]
        array = np.ndarray(size, dtype, data, offset * dtype.itemsize, strides)
    array.flags.writeable = False
    return array


def _tensor_v3(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: np.dtype,
    metadata: Any = None,
) -> np.ndarray:
    typed = _Storage(_a(_Storage, storage).data, _a(np.dtype, dtype))
    return _tensor(typed, offset, size, stride, metadata=metadata)


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _parameter(data: np.ndarray, requires_grad: bool = False, hooks: Any = None) -> np.ndarray:
    array: np.ndarray = _a(np.ndarray, data)
    return array


def _size(sizes: tuple[int, ...]) -> tuple[int, ...]:
    numbers: tuple[int, ...] = _a(tuple, sizes)
    return numbers


def _global(name: str) -> Any:
    """What stands here for a Python object that a pickle names as "module name"."""
    if name not in GLOBALS:
        raise _ForeignObject(
            f"it asks for the Python object {name.replace(' ', '.')}, which is not plain data; "
            "refused, and nothing was run."
        )
    return GLOBALS[name]


STORAGES = {
    **{"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16},
    **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8},
    **{"Byte": np.uint8, "Bool": np.bool_},
}
DTYPES = {
    **{"float64": np.float64, "float32": np.float32, "float16": np.float16},
    **{"bfloat16": jnp.bfloat16, "int64": np.int64, "int32": np.int32, "int16": np.int16},
    **{"int8": np.int8, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32},
    **{"uint64": np.uint64, "bool": np.bool_},
}
GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "torch Size": _size,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.storage UntypedStorage": np.dtype(np.uint8),
    **{f"torch {name}Storage": np.dtype(dtype) for name, dtype in STORAGES.items()},
    **{f"torch {name}": np.dtype(dtype) for name, dtype in DTYPES.items()},
}
