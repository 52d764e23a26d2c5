"""Writes PyTorch's two file formats by hand, hostile files too: nothing named has to exist here."""

import io
import pickle
import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
FOUR = np.arange(4, dtype="<f4").tobytes()
COUNTED = struct.pack("<q", 4) + FOUR


class Name:
    """A Python object that the pickle names."""

    def __init__(self, module, name):
        self.name = (module, name)


class Call(Name):
    """Pickled as the call of module.name(*args)."""

    def __init__(self, module, name, *args):
        super().__init__(module, name)
        self.args = args


class Storage:
    def __init__(self, key="0", size=4, kind="FloatStorage"):
        self.id = ("storage", Name("torch", kind), key, "cpu", size)


def tensor(storage=None, offset=0, size=(4,), stride=(1,)):
    hooks = Call("collections", "OrderedDict")
    storage = storage or Storage()
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride, False, hooks)


def dumps(value):
    """The opcodes of a value, protocol 2; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Call):
        return dumps(Name(*value.name)) + dumps(tuple(value.args)) + b"R"
    if isinstance(value, Name):
        return f"c{value.name[0]}\n{value.name[1]}\n".encode()
    if isinstance(value, Storage):
        return dumps(value.id) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(dumps, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(dumps, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(dumps(k) + dumps(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def zipped(value, records=(("data/0", FOUR),), **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + dumps(value) + b".")
        for name, data in records:
            archive.writestr(f"a/{name}", data)
    return file.getvalue()


def legacy(value, keys=("0",), tail=COUNTED):
    head = [pickle.dumps(v, 2) for v in (MAGIC, 1001, {"little_endian": True})]
    pickles = [*head, b"\x80\x02" + dumps(value) + b".", pickle.dumps(list(keys), 2)]
    return b"".join(pickles) + tail


def saved(value, in_zip=True):
    """A file of dicts and lists with float32 arrays, as `torch.save` would write it."""
    storages = []

    def convert(part):
        if isinstance(part, dict):
            return {name: convert(item) for name, item in part.items()}
        if isinstance(part, list):
            return [convert(item) for item in part]
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part, "<f4")
            storages.append(array.tobytes())
            stride = tuple(n // 4 for n in array.strides)
            return tensor(Storage(str(len(storages) - 1), array.size), 0, array.shape, stride)
        return part

    value = convert(value)
    if in_zip:
        return zipped(value, [(f"data/{i}", data) for i, data in enumerate(storages)])
    tail = b"".join(struct.pack("<q", len(data) // 4) + data for data in storages)
    return legacy(value, [str(i) for i in range(len(storages))], tail)
