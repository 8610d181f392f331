"""Files in the format of torch.save, made without torch from pickles written byte by byte."""

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
    """A reference to a class or function, by its module and name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """A call of a function with a tuple of arguments, which unpickling makes."""

    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments


class Persistent:
    """A reference to an object that torch stores beside the pickle, by its persistent id."""

    def __init__(self, identity):
        self.identity = identity


def pickle(value):
    """Returns the pickle, of protocol 2, of dicts, lists, tuples, scalars and the classes above."""
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value):
    """Returns the opcodes that push a value on the stack."""
    if isinstance(value, bool | None):
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, dict):
        items = b"".join(_encode(key) + _encode(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_encode, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_encode, value)) + b"t"
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _encode(value.function) + _encode(value.arguments) + b"R"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return _encode(value.identity) + b"Q"


def storage(key, dtype, size, *view):
    """Returns the reference to a storage, an array of this size and dtype under a key."""
    kind = Global("torch", STORAGES[np.dtype(dtype).name])
    return Persistent(("storage", kind, key, "cpu", size, *view))


def tensor(storage, shape, strides=None, offset=0, function="_rebuild_tensor_v2"):
    """Returns a tensor that views a storage; strides and offset are in elements."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = (storage, offset, tuple(shape), tuple(strides), False, hooks)
    return Call(Global("torch._utils", function), arguments)


def tensors(arrays):
    """Returns (contents to pickle, {key: bytes of its storage}) for arrays by name."""
    records = {str(i): np.ascontiguousarray(a) for i, a in enumerate(arrays.values())}
    by_name = {
        name: tensor(storage(key, a.dtype, a.size), a.shape)
        for name, (key, a) in zip(arrays, records.items(), strict=True)
    }
    return by_name, {key: a.tobytes() for key, a in records.items()}


def save(path, contents, records, compression=zipfile.ZIP_STORED):
    """Writes a zip archive with the pickled contents, or with contents that are a pickle."""
    data = contents if isinstance(contents, bytes) else pickle(contents)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for key, record in records.items():
            archive.writestr(f"archive/data/{key}", record)


def save_legacy(path, contents, records, itemsize=4, **system):
    """Writes the same without an archive, as torch did before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True} | system
    parts = [pickle(MAGIC), pickle(1001), pickle(system), pickle(contents), pickle([*records])]
    for record in records.values():
        parts += [struct.pack("<q", len(record) // itemsize), record]
    path.write_bytes(b"".join(parts))
