"""Reader of tensors in files that torch.save wrote, without torch and without running the file.

Such a file is a pickle, a program that builds Python objects, together with the tensors' numbers.
Here the pickle is read as data. A class or function is only a name, and a call becomes a record of
the function and its arguments. Nothing is imported or called, so that no file can do harm.
"""

import pathlib
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dit_jax.errors import UserError
from dit_jax.system import files

MAX_PICKLE_BYTES = 16 * 2**20  # 10,000 tensors take 2 MiB
MAGIC = 0x1950A86A20F9469CFC6C  # first object in a file of the old format, which is no zip archive
DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Keys of a training checkpoint that hold weights. The first one that exists is read.
PARTS = ("ema", "state_dict")
# Opcodes that push their argument.
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES"),
}
# Opcode that collects the last items into a tuple, a list or a dict -> their number; None for all
# since the last mark.
COLLECTORS = dict(TUPLE=None, TUPLE1=1, TUPLE2=2, TUPLE3=3)
COLLECTORS |= dict(APPENDS=None, APPEND=1, SETITEMS=None, SETITEM=2)


class Global(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str


class Call(NamedTuple):
    """A call, or a new object, that a pickle requests."""

    function: Any
    arguments: Any


class Pairs:
    """A dict of a pickle, as a list of keys and values, which may be of any type."""

    def __init__(self, pairs: list | None = None):
        self.pairs = pairs or []


# Opcode that pushes a new value -> the function that makes it.
NEW_VALUES = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": Pairs,
}


class Storage(NamedTuple):
    """A record of numbers, or the part of it that begins at `begin`."""

    key: str  # the name of the record
    dtype: np.dtype
    begin: int  # in numbers
    record_size: int  # in numbers, of the whole record


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def describe(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors in a file, without reading their numbers.

    Of a training checkpoint only the EMA or else the state_dict is described.
    Raises: ValueError if torch.save did not write the file, or with the names of values that are no
      tensors.
    """
    with path.open("rb") as file:
        contents, _ = _open(file)
    return {name: tensor.shape for name, tensor in _find_tensors(contents).items()}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns name -> array, read-only. Tensors that shared their numbers in torch share them here.

    Raises: ValueError as `describe`, or if numbers are damaged or missing.
    """
    with path.open("rb") as file:
        contents, read_record = _open(file)
        tensors = _find_tensors(contents)
        # One record serves all tensors that view it, and is read once. Storages of one key but
        # different sizes stay apart: a view must lie inside the record that its size was checked
        # against.
        records = {tensor.storage._replace(begin=0) for tensor in tensors.values()}
        size = sum(record.record_size * record.dtype.itemsize for record in records)
        if size > path.stat().st_size:
            raise UserError(f"its tensors are {size:,} bytes, more than the file has")
        arrays = {record: read_record(record) for record in records}
    return {
        # as_strided checks no bounds: `_to_tensor` has checked them.
        name: np.lib.stride_tricks.as_strided(
            arrays[t.storage._replace(begin=0)][t.storage.begin + t.offset :],
            t.shape,
            [t.storage.dtype.itemsize * stride for stride in t.strides],
            writeable=False,
        )
        for name, t in tensors.items()
    }


def _open(file: BinaryIO) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """Returns (contents of the pickle, a function that reads a storage's record)."""
    if zipfile.is_zipfile(file):
        return _open_archive(zipfile.ZipFile(file))
    file.seek(0)
    try:
        magic, _ = _load(file)
    except ValueError as error:
        raise UserError(f"torch.save did not write it: {error}") from error
    if magic != MAGIC:
        raise UserError("torch.save did not write it")
    # The older format is five pickles, then the records: magic number, protocol, system, contents,
    # and the keys of the records in order.
    (_protocol, _), (system, _), (contents, storages), (keys, _) = (_load(file) for _ in range(4))
    if not dict(system.pairs).get("little_endian"):
        raise UserError("its numbers are not in little-endian order")
    begins, begin = {}, file.tell()
    for key in keys:  # a record is its size, in 8 bytes, and then its numbers
        if key not in storages:
            raise UserError(f"its record {key!r} is of a kind that is not supported")
        begins[key] = begin
        begin += 8 + storages[key].record_size * storages[key].dtype.itemsize

    def read_record(storage):
        file.seek(begins[storage.key])
        size = int.from_bytes(file.read(8), "little")
        if size != storage.record_size:
            raise UserError(f"its record {storage.key!r} has {size:,} numbers, not {storage[3]:,}")
        return np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype, size)

    return contents, read_record


def _open_archive(archive):
    """Returns the same as `_open`, for a zip archive, whose members are the records."""
    members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    # With several data.pkl, or two members of one name, it is open which one is meant.
    if len(roots) != 1 or len(members) != len(archive.infolist()):
        raise UserError("it is a zip archive, but torch.save did not write it")
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise UserError("it is a program of TorchScript, not tensors by their names")

    def read(name, size=None):
        if (member := members.get(root + name)) is None:
            raise UserError(f"its record {name!r} is not there")
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"its record {name!r} is compressed, which torch.save does not do")
        if size is not None and member.file_size != size:
            raise UserError(f"its record {name!r} has {member.file_size:,} bytes, not {size:,}")
        return archive.read(member)

    if f"{root}byteorder" in members and read("byteorder") != b"little":
        raise UserError("its numbers are not in little-endian order")
    if (size := members[f"{root}data.pkl"].file_size) > MAX_PICKLE_BYTES:
        raise UserError(f"its pickle has {size:,} bytes, more than {MAX_PICKLE_BYTES:,}")
    contents, _ = _load(read("data.pkl"))

    def read_record(storage):
        size = storage.record_size * storage.dtype.itemsize
        return np.frombuffer(read(f"data/{storage.key}", size), storage.dtype)

    return contents, read_record


def _load(pickle: bytes | BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Returns (a pickle's object, made of plain data, Pairs and Calls; its storages by key)."""
    stack, marks, memo, storages, begin = [], [], {}, {}, None
    for opcode, argument, position in pickletools.genops(pickle):
        # Positions count from the beginning of the file, where this pickle need not begin.
        begin = position if begin is None else begin
        if position - begin > MAX_PICKLE_BYTES:
            raise UserError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
        elif name in NEW_VALUES:
            stack.append(NEW_VALUES[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in COLLECTORS:
            count = COLLECTORS[name]
            start = marks.pop() if count is None else len(stack) - count
            items = stack[start:]
            del stack[start:]
            if name.startswith("TUPLE"):
                stack.append(tuple(items))
            else:
                _extend(stack[-1], items)
        # The memo holds objects that occur more than once.
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        # Where Python's unpickler would import and call, names and calls are only recorded.
        elif name == "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [Global(*stack[-2:])]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_call(*stack[-2:])]
        elif name == "BUILD":
            stack.pop()  # sets attributes, which no tensor or dict needs
        # torch refers to a tensor's numbers by a persistent id.
        elif name == "BINPERSID":
            stack.append(_to_storage(stack.pop(), storages))
        elif name == "STOP":
            return stack.pop(), storages
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"its pickle has {name}, which those of tensors have not")
    raise UserError("its pickle has no end")


def _extend(target, items):
    """Appends items to a list, or keys and values to Pairs; no tensor needs other objects'."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Pairs):
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))


def _call(function, arguments):
    """Returns Pairs for an OrderedDict, a Call for any other function or class."""
    if function != Global("collections", "OrderedDict"):
        return Call(function, arguments)
    # Python 2 passes a list of its items. Later versions set the items afterwards.
    return Pairs(arguments[0] if arguments and isinstance(arguments[0], list) else [])


def _to_storage(identity, storages):
    """Returns the Storage that a pickle refers to by ('storage', class, key, device, size).

    A view has one more item, (key, begin, size).
    """
    word, kind, key, _, size, *view = identity
    begin = view[0][1] if view and view[0] else 0
    if word != "storage" or not isinstance(key, str) or not _are_sizes((size, begin)):
        raise UserError("its pickle refers to what is no storage")  # not shown: it may be endless
    if not isinstance(kind, Global) or kind.name not in DTYPES:
        # It is no Storage, so `_find_tensors` reports the tensors that use it.
        return Call(kind, ())
    storage = Storage(key, DTYPES[kind.name], begin, size)
    storages.setdefault(key, storage)
    return storage


def _find_tensors(contents):
    """Returns {name: Tensor} of a file's contents, which must be tensors only."""
    if not isinstance(contents, Pairs):
        raise UserError(f"it holds a {_kind(contents)} instead of tensors by their names")
    # The keys of Pairs may be unhashable: only known names become keys here.
    parts = {name: value for name, value in _items(contents) if name in PARTS}
    parts = [parts[name] for name in PARTS if isinstance(parts.get(name), Pairs)]
    tensors, others = {}, []
    for name, value in _items(parts[0] if parts else contents):
        if (tensor := _to_tensor(value)) is None or not isinstance(name, str):
            others.append(
                f"{name[:100] if isinstance(name, str) else _kind(name)} ({_kind(value)})"
            )
        else:
            tensors[name] = tensor
    if others:
        raise UserError(f"it holds more than tensors: {files.list_some(others)}")
    return tensors


def _items(pairs: Pairs) -> Iterator[tuple[Any, Any]]:
    """Yields the (key, value) of Pairs."""
    for pair in pairs.pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError("its pickle has a dict of what are no pairs")
        yield tuple(pair)


def _to_tensor(value):
    """Returns the Tensor that a value in a pickle describes, or None if it describes none."""
    if not isinstance(value, Call) or not isinstance(value.arguments, tuple):
        return None
    name = value.function[1] if isinstance(value.function, Global) else None
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and value.arguments:
        return _to_tensor(value.arguments[0])
    if name not in ("_rebuild_tensor", "_rebuild_tensor_v2") or len(value.arguments) < 4:
        return None
    storage, offset, shape, strides, *_ = value.arguments
    if not isinstance(storage, Storage):
        return None
    are_tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not are_tuples or not _are_sizes((offset, *shape, *strides)) or len(shape) != len(strides):
        raise UserError("a tensor in it has a shape that is none")
    # The index of the last number that the view reaches.
    last = storage.begin + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.record_size:
        raise UserError(f"a tensor of {shape=}, {strides=} in it has not so many numbers"[:300])
    return Tensor(storage, offset, shape, strides)


def _are_sizes(values):
    """Returns whether all values are whole numbers of at least 0."""
    return all(type(value) is int and value >= 0 for value in values)


def _kind(value):
    """Returns the kind of an object in a pickle, for messages."""
    if isinstance(value, Call):
        value = value.function
    if isinstance(value, Global):
        is_text = all(isinstance(part, str) for part in value)
        return ".".join(value)[:100] if is_text else "class without a name"
    return "dict" if isinstance(value, Pairs) else type(value).__name__
