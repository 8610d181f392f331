"""Arrays of .npz files from elsewhere: described and read within bounds, and nothing run."""

import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.system import files

MOST_NPY_HEADER_BYTES = 10_240  # NumPy's limit, and room for what is before the header
# Arrays may take 16 times the bytes of the file that they come from, so that a small file cannot
# fill the memory; 1 GiB is always allowed.
MOST_GROWTH = 16
FREE_BYTES = 2**30


class DamagedFileError(UserError):
    """A file that its reader cannot read."""


class NpzArray(NamedTuple):
    """An array of an .npz, as its header describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # of the data in the .npy
    crc: int  # CRC-32 of the whole .npy


def describe_npz(path: pathlib.Path) -> dict[str, NpzArray]:
    """Name -> description of every array in an .npz, from the headers alone.

    Raises: OSError; DamagedFileError as `parse`, or for what NumPy's savez does not write: Python
      objects, which could run code, members that are no arrays, lengths that do not fit a shape.
    """
    return parse(path, _describe_npz)


def read_npz(path: pathlib.Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The named arrays of an .npz, or all; nothing in the file is run.

    Raises: OSError; DamagedFileError as `describe_npz`; ValueError for a name that is not there, or
      arrays that take more than `most_bytes`.
    """
    described = describe_npz(path)
    names = list(described) if names is None else list(names)
    if missing := [name for name in names if name not in described]:
        raise UserError(
            f"{files.printable(path)} has no {' or '.join(missing)}; it holds "
            f"{files.list_some(described)}."
        )
    sizes = [math.prod(described[name].shape) * described[name].dtype.itemsize for name in names]
    check_bytes(path, sum(sizes))

    def read(path):
        with zipfile.ZipFile(path) as archive:
            return {name: _read_npy(archive, name) for name in names}

    return parse(path, read)


def most_bytes(path: pathlib.Path) -> int:
    """How many bytes the arrays of a file may take in memory."""
    return FREE_BYTES + MOST_GROWTH * path.stat().st_size


def check_bytes(path: pathlib.Path, size: int) -> None:
    """Demands that a file's arrays, of so many bytes, are no more than a file of its size holds.

    Raises: ValueError with both sizes.
    """
    if size > most_bytes(path):
        raise UserError(
            f"the arrays in {files.printable(path)} would take {_bytes(size)}, but the file has "
            f"{path.stat().st_size:,}: that is more than {MOST_GROWTH} times as many and 1 GiB, as "
            "no real file has. Get it from another place."
        )


def parse(path: pathlib.Path, reader: Callable[[pathlib.Path], Any]) -> Any:
    """What the reader makes of a file from elsewhere.

    Raises: OSError if the system refuses the file; DamagedFileError that says how it begins if the
      reader cannot read it.
    """

    def begin(path):
        with path.open("rb") as file:
            return file.read(20)

    beginning = files.open_and(path, begin)
    try:
        return reader(path)
    except (MemoryError, ImportError, DamagedFileError):
        raise
    # NumPy, zipfile, safetensors and others each have their own for a damaged file.
    except Exception as error:
        reason = files.printable((str(error).splitlines() or ["no message"])[0][:500])
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise DamagedFileError(
            f"cannot read {files.printable(path)}: {kind}{reason}\n"
            f"Its {path.stat().st_size:,} bytes begin with {beginning!r}: it is cut short, "
            f"damaged, no {files.printable(path.suffix)} file, or holds more than it should."
        ) from error


def _bytes(size):
    """1,234 or, since Python writes no number of more than 4300 digits, how large it is."""
    return f"{size:,} bytes" if size < 10**30 else "more than 10^30 bytes"


def _describe_npz(path):
    with zipfile.ZipFile(path) as archive:
        described = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise UserError(f"{name[:200]!r} in it is no .npy")
            if name in described:
                raise UserError(f"{name[:200]!r} is in it twice")
            described[name] = _describe_npy(archive, member)
    return described


def _describe_npy(archive, member):
    name = member.filename[:200]
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile inflates these in steps without a bound.
        raise UserError(f"{name!r} in it is compressed in a way that NumPy does not write")
    with archive.open(member) as file:
        beginning = io.BytesIO(file.read(MOST_NPY_HEADER_BYTES))
    version = np.lib.format.read_magic(beginning)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise UserError(f"{name!r} in it has version {version}")
    try:
        shape, fortran_order, dtype = readers[version](beginning)
    except (MemoryError, RecursionError) as error:  # of Python's parser, within 10 kB
        raise UserError(f"{name!r} in it has a header that is no header") from error
    if dtype.hasobject:
        raise UserError(f"{name!r} in it holds Python objects, which could run code")
    offset, size = beginning.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not dtype.itemsize or offset + size != member.file_size:
        raise UserError(
            f"{name!r} in it has {member.file_size:,} bytes, which are not those of a {dtype} of "
            f"shape {str(shape)[:200]}"
        )
    return NpzArray(shape, dtype, fortran_order, offset, member.CRC)


def _read_npy(archive, name):
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
