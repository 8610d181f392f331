"""Files as torch.save writes them, without torch: pickles put together by hand."""

import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    **{"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"},
    **{"int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage"},
    **{"uint8": "ByteStorage", "bool": "BoolStorage"},
}


class Global:
    """A class or function, by its module and name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """What a call of a function with a tuple of arguments gives."""

    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments


class Persistent:
    """What torch keeps beside the pickle, by its identity."""

    def __init__(self, identity):
        self.identity = identity


def pickle(value):
    """The pickle, of protocol 2, of a value of dicts, lists, tuples, texts and the above."""
    return b"\x80\x02" + _put(value) + b"."


def _put(value):
    if isinstance(value, bool | None):
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, dict):
        items = b"".join(_put(key) + _put(v) for key, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_put, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_put, value)) + b"t"
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _put(value.function) + _put(value.arguments) + b"R"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return _put(value.identity) + b"Q"


def storage(key, dtype, size, *view):
    """The reference to numbers that are kept under a key."""
    kind = Global("torch", STORAGES[np.dtype(dtype).name])
    return Persistent(("storage", kind, key, "cpu", size, *view))


def tensor(storage, shape, strides=None, offset=0, function="_rebuild_tensor_v2"):
    """A view of a storage; the strides are in numbers."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = (storage, offset, tuple(shape), tuple(strides), False, hooks)
    return Call(Global("torch._utils", function), arguments)


def tensors(arrays):
    """(what the pickle says, {key: bytes}) of arrays by their names."""
    records = {str(i): np.ascontiguousarray(a) for i, a in enumerate(arrays.values())}
    by_name = {
        name: tensor(storage(key, a.dtype, a.size), a.shape)
        for name, (key, a) in zip(arrays, records.items(), strict=True)
    }
    return by_name, {key: a.tobytes() for key, a in records.items()}


def save(path, contents, records, compression=zipfile.ZIP_STORED):
    """Writes a zip archive of what the pickle says, or the pickle itself, and the records."""
    data = contents if isinstance(contents, bytes) else pickle(contents)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for key, record in records.items():
            archive.writestr(f"archive/data/{key}", record)


def save_legacy(path, contents, records, itemsize=4, **system):
    """The same without an archive, as before torch 1.6."""
    system = {"protocol_version": 1001, "little_endian": True} | system
    parts = [pickle(MAGIC), pickle(1001), pickle(system), pickle(contents), pickle([*records])]
    for record in records.values():
        parts += [struct.pack("<q", len(record) // itemsize), record]
    path.write_bytes(b"".join(parts))
