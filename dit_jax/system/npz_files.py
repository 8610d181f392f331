"""Safe reader for untrusted .npz files: memory is bounded and no code in the file is run."""

import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.system import files

MAX_HEADER_BYTES = 10_240  # NumPy's limit for a header, plus the magic and length before it
# Arrays may take MAX_GROWTH times as many bytes as their file, plus FREE_BYTES. So a small
# compressed file cannot fill the memory.
MAX_GROWTH = 16
FREE_BYTES = 2**30


class DamagedFileError(UserError):
    """Error for a file that its reader cannot read."""


class NpzArray(NamedTuple):
    """Description of an array in an .npz file, from the array's header."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # where the data begins in the .npy, in bytes
    crc: int  # CRC-32 of the whole .npy


def describe_npz(path: pathlib.Path) -> dict[str, NpzArray]:
    """Returns {name: description} of all arrays in an .npz; reads only the headers.

    Raises: OSError; DamagedFileError as `parse`, or for contents that NumPy's savez does not write:
      Python objects (which could run code), members that are no arrays, or sizes that do not match
      the shape.
    """
    return parse(path, _describe_npz)


def read_npz(path: pathlib.Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz, or all arrays, without running code in the file.

    Raises: OSError; DamagedFileError as `describe_npz`; ValueError for a missing name, or arrays
      that take more than `max_bytes`.
    """
    arrays = describe_npz(path)
    names = list(arrays if names is None else names)
    if missing := [name for name in names if name not in arrays]:
        raise UserError(
            f"{files.printable(path)} has no {' or '.join(missing)}; it holds "
            f"{files.list_some(arrays)}."
        )
    # Checked before anything is read: compression can make a file small and its arrays huge.
    sizes = [math.prod(arrays[name].shape) * arrays[name].dtype.itemsize for name in names]
    check_bytes(path, sum(sizes))

    def read(path):
        with zipfile.ZipFile(path) as archive:
            return {name: _read_npy(archive, name) for name in names}

    return parse(path, read)


def max_bytes(path: pathlib.Path) -> int:
    """Returns how many bytes the arrays of a file may take in memory."""
    return FREE_BYTES + MAX_GROWTH * path.stat().st_size


def check_bytes(path: pathlib.Path, size: int) -> None:
    """Raises a ValueError if `size`, the bytes of a file's arrays, is more than `max_bytes`."""
    if size > max_bytes(path):
        raise UserError(
            f"the arrays in {files.printable(path)} would take {_format_bytes(size)}, but the file "
            f"has {path.stat().st_size:,} bytes. The limit is {MAX_GROWTH} times the file's size "
            "plus 1 GiB, which no real file exceeds. Get the file from another source."
        )


def parse(path: pathlib.Path, reader: Callable[[pathlib.Path], Any]) -> Any:
    """Returns reader(path), for a file that may be damaged.

    Raises: OSError if the file cannot be opened; DamagedFileError, with the first bytes of the
      file, if the reader fails.
    """

    def read_beginning(path):
        with path.open("rb") as file:
            return file.read(20)

    beginning = files.read_or_explain(path, read_beginning)
    try:
        return reader(path)
    except (MemoryError, ImportError, DamagedFileError):
        raise
    # NumPy, zipfile, safetensors and others each raise their own exceptions for a damaged file.
    except Exception as error:
        reason = files.printable((str(error).splitlines() or ["no message"])[0][:500])
        kind = "" if type(error) in (ValueError, UserError) else f"{type(error).__name__}: "
        raise DamagedFileError(
            f"cannot read {files.printable(path)}: {kind}{reason}\n"
            f"The file has {path.stat().st_size:,} bytes and begins with {beginning!r}. It is cut "
            f"short, damaged, no {files.printable(path.suffix)} file, or has unexpected contents. "
            "Get the file again."
        ) from error


def _format_bytes(size):
    """Returns a text such as '1,234 bytes' for any size that a damaged header may contain."""
    # Python refuses to format numbers of more than 4300 digits.
    return f"{size:,} bytes" if size < 10**30 else "more than 10^30 bytes"


def _describe_npz(path):
    """Returns {name: NpzArray}.   Raises: any exception for a damaged file."""
    with zipfile.ZipFile(path) as archive:
        arrays = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise UserError(f"{name[:200]!r} in it is no .npy")
            if name in arrays:
                raise UserError(f"{name[:200]!r} is in it twice")
            arrays[name] = _describe_npy(archive, member)
    return arrays


def _describe_npy(archive, member):
    """Returns the NpzArray of a member.   Raises: any exception for a damaged member."""
    name = member.filename[:200]
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile decompresses other methods in steps of unbounded size.
        raise UserError(f"{name!r} in it is compressed in a way that NumPy does not write")
    with archive.open(member) as file:
        beginning = io.BytesIO(file.read(MAX_HEADER_BYTES))
    version = np.lib.format.read_magic(beginning)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise UserError(f"{name!r} in it has version {version}")
    try:
        shape, fortran_order, dtype = readers[version](beginning)
    except (MemoryError, RecursionError) as error:  # Python's parser: the header nests too deeply
        raise UserError(f"{name!r} in it has an invalid header") from error
    if dtype.hasobject:
        raise UserError(f"{name!r} in it holds Python objects, which could run code")
    # The size of the member must match the shape, or reading could allocate any amount of memory.
    offset, size = beginning.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not dtype.itemsize or offset + size != member.file_size:
        raise UserError(
            f"{name!r} in it has {member.file_size:,} bytes, which do not match a {dtype} of "
            f"shape {str(shape)[:200]}"
        )
    return NpzArray(shape, dtype, fortran_order, offset, member.CRC)


def _read_npy(archive, name):
    """Reads an array; raises for pickled objects, which could run code."""
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
