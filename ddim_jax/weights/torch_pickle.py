"""The opcodes of a pickle as plain data, without running anything that it names.

A small stack machine knows dicts, lists, sets, tuples, numbers, strings and tensors. Whatever else
a pickle asks for is refused by name.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class ForeignObject(ValueError):
    """The pickle names an object that is not plain data."""


class _NumPyType(NamedTuple):
    """The type of a NumPy scalar."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A run of bytes that tensors are views of."""

    data: np.ndarray  # (nbytes,) uint8
    dtype: np.dtype


def no_storage(key: str, dtype: np.dtype, nbytes: int) -> np.ndarray:
    raise ValueError(f"storage {key!r} is asked for where there is none")


def unpickle(file: Any, read: Callable[[str, np.dtype, int], np.ndarray] = no_storage) -> Any:
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
                a(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop(2) if op.name == "SETITEM" else pop_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    a(dict, stack[-1])[a(str | int | float | None, key)] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_global(arg))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join(a(str, part) for part in pop(2))))
            case "REDUCE":
                function, args = pop(2)
                if not callable(function):
                    raise ValueError("its pickle calls what is not a function")
                stack.append(function(*a(tuple, args)))
            case "BUILD":  # the attributes of an OrderedDict: a state dict's _metadata, not needed
                (state,) = pop(1)
                if type(stack[-1]) is not _NumPyType:
                    a(dict, stack[-1])
                elif a(tuple, state)[1] not in ("<", "=", "|"):
                    raise ValueError("it has a NumPy scalar of the other byte order")
            case "BINPERSID":
                kind, dtype, key, _location, size, *view = pop(1)[0]
                if kind != "storage" or any(part is not None for part in view):
                    raise ValueError("it refers to something other than a plain storage")
                nbytes = a(int, size) * a(np.dtype, dtype).itemsize
                if nbytes < 0:
                    raise ValueError(f"storage {key!r} has a negative size")
                stack.append(Storage(read(a(str, key), dtype, nbytes), dtype))
            case name:
                raise ValueError(f"its pickle uses {name}, which tensors do not need")
    raise EOFError("the pickle has no end")


def a(kind: Any, value: Any) -> Any:
    """`value`, which must be of that kind."""
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} where none belongs")
    return value


def _tensor(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> np.ndarray:
    if metadata:
        raise ValueError("a tensor is lazily conjugated or negated: resolve it before saving")
    data, dtype = a(Storage, storage)
    numbers = [a(int, n) for n in (offset, *a(tuple, size), *a(tuple, stride))]
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
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: np.dtype,
    metadata: Any = None,
) -> np.ndarray:
    typed = Storage(a(Storage, storage).data, a(np.dtype, dtype))
    return _tensor(typed, offset, size, stride, metadata=metadata)


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _parameter(data: np.ndarray, requires_grad: bool = False, hooks: Any = None) -> np.ndarray:
    array: np.ndarray = a(np.ndarray, data)
    return array


def _size(sizes: tuple[int, ...]) -> tuple[int, ...]:
    numbers: tuple[int, ...] = a(tuple, sizes)
    return numbers


def _counter(counts: Any) -> dict[Any, Any]:
    counted: dict[Any, Any] = a(dict, counts)
    return counted


def _set(items: Any) -> list[Any]:
    values: list[Any] = a(list, items)
    return values


def _encode(text: str, codec: str) -> bytes:
    """How bytes are pickled for Python 2 too."""
    if codec != "latin1":
        raise ValueError(f"its pickle has bytes in {codec!r}")
    return bytes(a(str, text), "latin1")


def _numpy_type(name: str, align: bool = False, copy: bool = True) -> _NumPyType:
    if not re.fullmatch("[biuf][1248]", a(str, name)):
        raise ValueError(f"it has a NumPy scalar of type {name!r}, which is no number")
    return _NumPyType(np.dtype(name))


def _scalar(kind: _NumPyType, data: bytes) -> Any:
    (value,) = np.frombuffer(a(bytes, data), a(_NumPyType, kind).dtype)
    return value.item()


def _device(kind: str, index: int = 0) -> str:
    return f"{a(str, kind)}:{a(int, index)}"


def _global(name: str) -> Any:
    """What stands here for a Python object that a pickle names as "module name"."""
    if name not in GLOBALS:
        raise ForeignObject(
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
    "collections Counter": _counter,
    **{f"{module} set": _set for module in ("builtins", "__builtin__")},
    "torch Size": _size,
    "torch device": _device,
    "_codecs encode": _encode,
    "numpy dtype": _numpy_type,
    **{f"numpy.{core}.multiarray scalar": _scalar for core in ("core", "_core")},
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.storage UntypedStorage": np.dtype(np.uint8),
    **{f"torch {name}Storage": np.dtype(dtype) for name, dtype in STORAGES.items()},
    **{f"torch {name}": np.dtype(dtype) for name, dtype in DTYPES.items()},
}
