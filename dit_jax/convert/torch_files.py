"""Reader of tensors in files that torch.save wrote, without torch and without running the file.

Such a file has records with the numbers of the tensors, and a pickle: a program that builds Python
objects. Here the pickle is read as data. A class or function is only a name, and a call becomes an
object with the function's name and its arguments. Nothing is imported or called, so that no file
can do harm.
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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object in a file of the format before zip archives
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
# Keys of the weights in a training checkpoint. The first key that exists is read.
WEIGHT_KEYS = ("ema", "state_dict")
# Opcodes that push their argument.
PUSH_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES"),
}
# Opcode that collects the last items of the stack into a tuple, a list or a dict -> their number.
# None is for all items since the last mark.
COLLECT_ITEMS = dict(TUPLE=None, TUPLE1=1, TUPLE2=2, TUPLE3=3)
COLLECT_ITEMS |= dict(APPENDS=None, APPEND=1, SETITEMS=None, SETITEM=2)


class Global(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str


class Call(NamedTuple):
    """A call, or a new object, that a pickle requests."""

    function: Any
    arguments: Any


class Pairs:
    """A dict in a pickle, as a list of (key, value), since its keys may be unhashable."""

    def __init__(self, pairs: list | None = None):
        self.pairs = pairs or []


# Opcode that pushes a new value -> the function that makes the value.
PUSH_NEW = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": Pairs,
}


class Storage(NamedTuple):
    """A record of numbers, or the end of a record from `begin` on."""

    key: str  # the name of the record
    dtype: np.dtype
    begin: int  # in numbers
    record_size: int  # in numbers, of the whole record


class Tensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int  # in numbers
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers


class Pickle(NamedTuple):
    """The contents of a pickle."""

    value: Any  # made of plain data, Pairs, Globals, Calls and Storages
    storages: dict[str, Storage]  # by key


def describe(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors in a file, without reading their numbers.

    In a training checkpoint, only the tensors of its EMA are described, or else its state_dict.
    Raises: ValueError if torch.save did not write the file, or with the names of values that are no
      tensors.
    """
    with path.open("rb") as file:
        contents, _ = _open(file)
    return {name: tensor.shape for name, tensor in _list_tensors(contents).items()}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns name -> read-only array. Tensors that shared memory in torch share memory here.

    Raises: ValueError as `describe`, or if numbers are damaged or missing.
    """
    with path.open("rb") as file:
        contents, read_record = _open(file)
        tensors = _list_tensors(contents)
        # All tensors that view a record share one array. Storages of one key but different sizes
        # are read separately, so that a view stays inside the record that it was checked against.
        records = {tensor.storage._replace(begin=0) for tensor in tensors.values()}
        num_bytes = sum(record.record_size * record.dtype.itemsize for record in records)
        if num_bytes > path.stat().st_size:
            raise UserError(f"its tensors are {num_bytes:,} bytes, more than the file has")
        arrays = {record: read_record(record) for record in records}
    return {
        # as_strided checks no bounds: `_to_tensor` has checked them.
        name: np.lib.stride_tricks.as_strided(
            arrays[tensor.storage._replace(begin=0)][tensor.storage.begin + tensor.offset :],
            tensor.shape,
            [tensor.storage.dtype.itemsize * stride for stride in tensor.strides],
            writeable=False,
        )
        for name, tensor in tensors.items()
    }


def _open(file: BinaryIO) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """Returns (contents of the pickle, a function that reads a storage's record)."""
    if zipfile.is_zipfile(file):
        return _open_archive(zipfile.ZipFile(file))
    file.seek(0)
    try:
        magic = _read_pickle(file).value
    except ValueError as error:
        raise UserError(f"torch.save did not write it: {error}") from error
    if magic != LEGACY_MAGIC:
        raise UserError("torch.save did not write it")
    return _open_legacy(file)


def _open_legacy(file):
    """Returns the same as `_open`, for a file of the older format, from behind its magic number.

    Four pickles follow there, then the records. A record is its size, in 8 bytes, and its numbers.
    """
    _protocol, system, contents, keys = (_read_pickle(file) for _ in range(4))
    if not dict(system.value.pairs).get("little_endian"):
        raise UserError("its numbers are not in little-endian order")
    positions, position = {}, file.tell()
    for key in keys.value:
        if key not in contents.storages:
            raise UserError(f"its record {key!r} is of a kind that is not supported")
        storage = contents.storages[key]
        positions[key] = position
        position += 8 + storage.record_size * storage.dtype.itemsize

    def read_record(storage):
        file.seek(positions[storage.key])
        size = int.from_bytes(file.read(8), "little")
        if size != storage.record_size:
            raise UserError(
                f"its record {storage.key!r} has {size:,} numbers, not {storage.record_size:,}"
            )
        return np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype, size)

    return contents.value, read_record


def _open_archive(archive):
    """Returns the same as `_open`, for a zip archive, whose members are the records."""
    members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    # torch.save writes one data.pkl, and no two members of one name.
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
    contents = _read_pickle(read("data.pkl"))

    def read_record(storage):
        size = storage.record_size * storage.dtype.itemsize
        return np.frombuffer(read(f"data/{storage.key}", size), storage.dtype)

    return contents.value, read_record


def _read_pickle(source: bytes | BinaryIO) -> Pickle:
    """Returns the contents of a pickle, which in a file begins at the current position."""
    stack, marks, memo, storages, begin = [], [], {}, {}, None
    for opcode, argument, position in pickletools.genops(source):
        # Positions count from the beginning of the file, where this pickle need not begin.
        begin = position if begin is None else begin
        if position - begin > MAX_PICKLE_BYTES:
            raise UserError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        name = opcode.name
        if name in PUSH_ARGUMENT:
            stack.append(argument)
        elif name in PUSH_NEW:
            stack.append(PUSH_NEW[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in COLLECT_ITEMS:
            count = COLLECT_ITEMS[name]
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
        # Python's unpickler would import and call here. This one only keeps names and arguments.
        elif name == "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [Global(*stack[-2:])]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_record_call(*stack[-2:])]
        elif name == "BUILD":
            stack.pop()  # attributes of an object, which no tensor or dict needs
        # torch refers to the numbers of a tensor by a persistent id.
        elif name == "BINPERSID":
            stack.append(_to_storage(stack.pop(), storages))
        elif name == "STOP":
            return Pickle(stack.pop(), storages)
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"its pickle has the opcode {name}, which torch.save does not write")
    raise UserError("its pickle has no end")


def _extend(target, items):
    """Appends items to a list, or keys and values to Pairs."""
    # Other objects have items too, which no tensor needs.
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Pairs):
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))


def _record_call(function, arguments):
    """Returns Pairs for an OrderedDict, a Call for any other function or class."""
    if function != Global("collections", "OrderedDict"):
        return Call(function, arguments)
    # Python 2 passes a list of the items. Later versions set the items afterwards.
    return Pairs(arguments[0] if arguments and isinstance(arguments[0], list) else [])


def _to_storage(identity, storages):
    """Returns the Storage for a persistent id, and adds it to `storages`.

    The id is ('storage', class, key, device, size). If the storage is a view, (key, begin, size)
    follows.
    """
    tag, storage_class, key, _, size, *view = identity
    begin = view[0][1] if view and view[0] else 0
    if tag != "storage" or not isinstance(key, str) or not _are_sizes((size, begin)):
        raise UserError("its pickle has an invalid storage")  # not shown: it may be endless
    if not isinstance(storage_class, Global) or storage_class.name not in DTYPES:
        # A Call is no Storage, so `_list_tensors` reports the tensors that use it.
        return Call(storage_class, ())
    storage = Storage(key, DTYPES[storage_class.name], begin, size)
    storages.setdefault(key, storage)
    return storage


def _list_tensors(contents):
    """Returns {name: Tensor} of a file's contents, which must be tensors only."""
    if not isinstance(contents, Pairs):
        raise UserError(f"it holds a {_name_type(contents)} instead of tensors by their names")
    # The keys of Pairs may be unhashable: only known names become keys here.
    known = {name: value for name, value in _iterate(contents) if name in WEIGHT_KEYS}
    weights = [known[name] for name in WEIGHT_KEYS if isinstance(known.get(name), Pairs)]
    tensors, others = {}, []
    for name, value in _iterate(weights[0] if weights else contents):
        tensor = _to_tensor(value)
        if tensor is not None and isinstance(name, str):
            tensors[name] = tensor
        else:
            shown_name = name[:100] if isinstance(name, str) else _name_type(name)
            others.append(f"{shown_name} ({_name_type(value)})")
    if others:
        raise UserError(f"it holds more than tensors: {files.list_some(others)}")
    return tensors


def _iterate(pairs: Pairs) -> Iterator[tuple[Any, Any]]:
    """Yields each (key, value) of Pairs."""
    for pair in pairs.pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError("its pickle has a dict with an item that is no pair")
        yield tuple(pair)


def _to_tensor(value):
    """Returns the Tensor that a value in a pickle describes, or None if it describes none."""
    if not isinstance(value, Call) or not isinstance(value.arguments, tuple):
        return None
    name = value.function.name if isinstance(value.function, Global) else None
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and value.arguments:
        return _to_tensor(value.arguments[0])
    if name not in ("_rebuild_tensor", "_rebuild_tensor_v2") or len(value.arguments) < 4:
        return None
    storage, offset, shape, strides, *_ = value.arguments
    if not isinstance(storage, Storage):
        return None
    are_tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not are_tuples or not _are_sizes((offset, *shape, *strides)) or len(shape) != len(strides):
        raise UserError("a tensor in it has an invalid shape, offset or strides")
    # The index of the last number that the view reaches.
    steps = ((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    last = storage.begin + offset + sum(steps)
    if 0 not in shape and last >= storage.record_size:
        raise UserError(
            f"a tensor in it has more numbers than its record: {shape=}, {strides=}"[:300]
        )
    return Tensor(storage, offset, shape, strides)


def _are_sizes(values):
    """Returns whether all values are whole numbers of at least 0."""
    return all(type(value) is int and value >= 0 for value in values)


def _name_type(value):
    """Returns the name of the class or function that made a value in a pickle, for messages."""
    if isinstance(value, Call):
        value = value.function
    if isinstance(value, Global):
        is_name = all(isinstance(part, str) for part in value)
        return ".".join(value)[:100] if is_name else "class without a name"
    return "dict" if isinstance(value, Pairs) else type(value).__name__
