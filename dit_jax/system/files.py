"""Files that are there whole or not at all; paths; files and names from elsewhere."""

import contextlib
import errno
import fcntl
import io
import json
import logging
import math
import os
import pathlib
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

logger = logging.getLogger("dit_jax")

# Unicode's categories of characters that a terminal obeys or hides: controls, formats such as the
# bidirectional and zero-width ones, surrogates, line and paragraph separators.
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
WRITING = {  # flags of the modes that open for it
    "wb": os.O_WRONLY | os.O_CREAT,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "a+b": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "r+": os.O_RDWR,
    "r+b": os.O_RDWR | os.O_CREAT,
}
MOST_JSON_BYTES = 64 * 2**20
MOST_JSON_DEPTH = 100
MOST_JSON_LINES_BYTES = 256 * 2**20  # of all lines of a file that are kept, each at least 64
MOST_NPY_HEADER_BYTES = 10_240  # NumPy's limit, and room for what is before the header
# Arrays may take 16 times the bytes of the file that they come from, so that a small file cannot
# fill the memory; 1 GiB is always allowed.
MOST_GROWTH = 16
FREE_BYTES = 2**30


def printable(text: object) -> str:
    r"""Shows each control character of a text as its escape: a newline as \n, ESC as \x1b.

    For names inside messages: whoever made a file or an archive chose its name. Bidirectional and
    zero-width controls and lone surrogates are escaped too.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c
        for c in text
    )


def to_path(text: str | os.PathLike, name: str) -> pathlib.Path:
    """The local path that a flag or a config key names, with `~` and `~user` expanded.

    Args: name, of the flag or key, such as '--workdir' or 'latents.vae', for messages.
    Raises: ValueError for an empty text, a remote path, an unknown user, or a NUL character.
    """
    text = os.fspath(text)
    shown = f"{name}={printable(text)}"
    if not text:
        raise ValueError(f"{name} is empty: give a path, or leave it out.")
    if "\0" in text:
        raise ValueError(f"{shown} has a NUL character, which no path can have.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(
            f"{shown}: remote paths are not read or written yet; mount it, or take a local path."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib's, which names no user
        user = text.partition("/")[0]
        raise ValueError(
            f"{shown}: {printable(user)} has no home directory; write ./{printable(text)} if that "
            "is its name."
        ) from None


def check_utf8(directory: pathlib.Path) -> None:
    """Demands a name in UTF-8, as libraries need that keep checkpoints and array_record files.

    Raises: ValueError.
    """
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{printable(directory)} is not in UTF-8, but checkpoints and datasets can lie in such "
            "directories only: choose another name."
        ) from None


class LostError(OSError):
    """The directory or the lock went away while a command ran; what is kept is told."""

    @classmethod
    def of(cls, directory: pathlib.Path) -> "LostError":
        """Of a directory that is not where it was."""
        return cls(
            f"{directory} is gone: it was removed or moved while this command ran.\n"
            "Nothing more is written; if it was moved, move it back."
        )


class Directory:
    """A directory that must stay where it is while a command reads it or writes into it.

    Entered, it turns an OSError from inside into a LostError where the directory has gone: whatever
    failed there, this is why.   Raises: LostError if it is not there.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._status = path.stat()
        except FileNotFoundError:
            raise LostError.of(path) from None

    def is_there(self) -> bool:
        """Whether it lies where it did; another of its name does not count."""
        return self.path.is_dir() and os.path.samestat(self.path.stat(), self._status)

    def check(self) -> None:
        """Raises: LostError if it was removed or moved."""
        if not self.is_there():
            raise LostError.of(self.path)

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if isinstance(error, OSError):
            try:
                self.check()
            except LostError as lost:
                raise lost from error


def replace(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """What `write(file)` writes becomes the file, whole or not at all.

    Of several commands that replace one file each waits for the one before, and the last one's
    stays.
    Raises: OSError; LostError if the directory is not there.
    """
    unfinished = temporary(path)
    try:
        with _open_alone(unfinished) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(unfinished, path)
            except BaseException:
                unfinished.unlink(missing_ok=True)  # it is still locked, so nobody else's
                raise
    except OSError as error:
        if not path.parent.is_dir():
            raise LostError.of(path.parent) from error
        error.filename = error.filename or str(path)  # a full disk's has none
        raise


def _open_alone(path):
    """The empty file of this path, open to be written by this process alone."""
    while True:
        file = open_to_write(path, "r+b")
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file, path):  # else who held it has given it its name
                file.truncate(0)  # of a command that was killed
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_at(file: IO, path: pathlib.Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def flush_to_disk(path: pathlib.Path) -> None:
    """Waits until a file's contents are on the disk.   Raises: OSError."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def temporary(path: pathlib.Path) -> pathlib.Path:
    """The file beside it that `replace` writes first."""
    return path.with_name(f"{path.name}.tmp")


def replace_text(path: pathlib.Path, text: str) -> None:
    """As `replace`, of a text, as UTF-8."""
    replace(path, lambda file: file.write(text.encode()))


def open_to_write(path: pathlib.Path, mode: str) -> IO:
    """Opens a file as `open` does, but no link (a hard one neither), pipe or device.

    A directory from elsewhere may hold these under the names that a command writes to.

    Args: mode, one of WRITING.
    Raises: OSError.
    """
    safely = os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe would wait for its other end
    try:
        number = os.open(path, WRITING[mode] | safely, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _no_file(path) from error
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(number)
        raise _no_file(path)
    if mode == "wb":
        os.truncate(number, 0)
    return os.fdopen(number, mode)


def _no_file(path):
    return OSError(
        f"{printable(path)} is a link, pipe or device, which is not written to: remove it, or put "
        "a file in its place."
    )


def read_bytes(path: pathlib.Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The contents of a file, but for what is beyond `most` bytes.

    Raises: OSError; FileNotFoundError for a pipe or a device too, which may have no end.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {printable(path)}.")
    with path.open("rb") as file:
        return file.read(most)


def refuse_link(path: str | os.PathLike) -> None:
    """Raises: OSError if a path, in a directory that is written to, is a link."""
    if os.path.islink(path):
        raise OSError(
            f"{printable(path)} is a link: what is written there would go elsewhere. Put what it "
            "leads to in its place; the whole directory may be a link."
        )


def check_tree(directory: pathlib.Path, links: bool = True) -> None:
    """Demands that there is nothing but files and directories in a directory, at any depth.

    Reading from a pipe or a device may never end, and writing to a link leads out of the directory.

    Args: links, whether links to files and directories may be there.
    Raises: OSError that names what is there.
    """
    waiting, seen = [directory], set()
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except FileNotFoundError:  # another command has removed it since
            continue
        with entries:
            for entry in entries:
                if not links:
                    refuse_link(entry.path)
                try:
                    status = entry.stat()
                except OSError:  # a link that leads nowhere
                    continue
                if stat.S_ISDIR(status.st_mode):
                    if (status.st_dev, status.st_ino) not in seen:  # links may make a circle
                        waiting.append(entry.path)
                    seen.add((status.st_dev, status.st_ino))
                elif not stat.S_ISREG(status.st_mode):
                    raise OSError(
                        f"{printable(entry.path)} is no file, but a pipe, socket or device: remove "
                        "it."
                    )


def read_json(path: pathlib.Path, what: str) -> Any:
    """Reads a JSON file that a person or a disk may have damaged.

    Args: what, completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `parse_json`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {printable(path)}: it must be {what}.")

    def read(path):
        with path.open("rb") as file:
            return file.read(MOST_JSON_BYTES + 1)

    return parse_json(_open_and(path, read), printable(path), what)


def read_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a file one after another, each with its newline.

    Of a line longer than MOST_JSON_BYTES its beginning alone, one byte more than that, and its
    newline: so `parse_json` refuses it.
    Raises: OSError.
    """
    with path.open("rb", buffering=2**20) as file:  # long lines come in parts of this size
        while line := file.readline(MOST_JSON_BYTES + 1):
            rest = line
            while len(rest) > MOST_JSON_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MOST_JSON_BYTES + 1)
            ended = rest.endswith(b"\n") and not line.endswith(b"\n")
            yield line + b"\n" * ended


def read_json_lines(
    path: pathlib.Path, list_wrong: Callable[[dict], list[str]] = lambda row: []
) -> list[dict]:
    """The objects in a JSON-lines file; [] if there is no such file.

    Lines that are damaged are left out and counted in a warning. A last line that a kill or a full
    disk cut short is left out without a warning.

    Args: list_wrong, returns the keys of an object that are wrong: a line with any is damaged.
    Raises: OSError; ValueError if the lines have more than MOST_JSON_LINES_BYTES.
    """
    rows, damaged, first, kept = [], 0, "", 0
    lines = read_lines(path) if path.is_file() else ()
    for number, line in enumerate(lines, start=1):
        wrong, is_whole = "", line.endswith(b"\n")
        try:
            row = parse_json(line.removesuffix(b"\n"), "", "")
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if not line.strip() or not is_whole:
                continue
            wrong = f"{number}"
        else:
            if keys := list_wrong(row):
                wrong = f"{number}, with a wrong {some_of(keys)}"
        if wrong:
            damaged, first = damaged + 1, first or wrong
            continue
        rows.append(row)
        kept += max(len(line), 64)  # {} takes as many in memory
        if kept > MOST_JSON_LINES_BYTES:
            raise ValueError(
                f"{printable(path)} has more than {MOST_JSON_LINES_BYTES // 2**20} MiB of lines, "
                f"the most that are read; line {number} goes beyond. Keep the lines that you need."
            )
    if damaged:
        logger.warning(
            "%d damaged lines of %s are left out, the first is line %s.",
            damaged,
            printable(path),
            first,
        )
    return rows


def parse_json(contents: bytes | str, name: str, what: str) -> Any:
    """The value of a JSON text; NaN and infinities are numbers, as for Python.

    Args: name, of its source in messages.   what: completes "It must be ..." there.
    Raises: ValueError for what is no JSON, a key that is twice in one object, more than
      MOST_JSON_BYTES or MOST_JSON_DEPTH.
    """
    try:
        if len(contents) > MOST_JSON_BYTES:
            raise ValueError(f"it has more than {MOST_JSON_BYTES // 2**20} MiB")
        text = contents if isinstance(contents, str) else contents.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_to_dict)
        if isinstance(value, dict | list) and _is_deeper(value, MOST_JSON_DEPTH):
            raise RecursionError
        return value
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        reason = f"it is not in UTF-8, with {found!r} at byte {error.start}"
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
        place = "it ends too early" if is_cut else f"line {error.lineno}, column {error.colno}"
        reason = f"{place}: {error.msg}"
    except RecursionError:
        reason = f"it is nested more than {MOST_JSON_DEPTH} deep"
    except ValueError as error:  # ours above, or a number of more digits than Python takes
        reason = str(error).partition(";")[0]
    raise ValueError(f"cannot read {name}: {reason}. It must be {what}.")


def _to_dict(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:100]!r} is in one object twice")
    return value


def _is_deeper(value, most):
    level = [value]
    for _ in range(most):
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:  # most values are flat, and a file may have a million lines
            break
    return bool(level)


class DamagedFileError(ValueError):
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
        raise ValueError(
            f"{printable(path)} has no {' or '.join(missing)}; it holds {some_of(described)}."
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
        raise ValueError(
            f"the arrays in {printable(path)} would take {_bytes(size)}, but the file has "
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

    beginning = _open_and(path, begin)
    try:
        return reader(path)
    except (MemoryError, ImportError, DamagedFileError):
        raise
    # NumPy, zipfile, safetensors and others each have their own for a damaged file.
    except Exception as error:
        reason = printable((str(error).splitlines() or ["no message"])[0][:500])
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise DamagedFileError(
            f"cannot read {printable(path)}: {kind}{reason}\n"
            f"Its {path.stat().st_size:,} bytes begin with {beginning!r}: it is cut short, "
            f"damaged, no {printable(path.suffix)} file, or holds more than it should."
        ) from error


def some_of(names: Collection[str], most: int = 5) -> str:
    """The first few of many names from elsewhere, for messages, and how many more there are."""
    shown = [printable(name[:200]) for _, name in zip(range(most), names, strict=False)]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown) + more if names else "none"


def _open_and(path, read):
    """read(path); what the system refuses is said by this project's own OSError."""
    try:
        return read(path)
    except OSError as error:
        raise type(error)(f"cannot read {printable(path)}: {error.strerror or error}") from error


def _bytes(size):
    """1,234 or, since Python writes no number of more than 4300 digits, how large it is."""
    return f"{size:,} bytes" if size < 10**30 else "more than 10^30 bytes"


def _describe_npz(path):
    with zipfile.ZipFile(path) as archive:
        described = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise ValueError(f"{name[:200]!r} in it is no .npy")
            if name in described:
                raise ValueError(f"{name[:200]!r} is in it twice")
            described[name] = _describe_npy(archive, member)
    return described


def _describe_npy(archive, member):
    name = member.filename[:200]
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile inflates these in steps without a bound.
        raise ValueError(f"{name!r} in it is compressed in a way that NumPy does not write")
    with archive.open(member) as file:
        beginning = io.BytesIO(file.read(MOST_NPY_HEADER_BYTES))
    version = np.lib.format.read_magic(beginning)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{name!r} in it has version {version}")
    try:
        shape, fortran_order, dtype = readers[version](beginning)
    except (MemoryError, RecursionError) as error:  # of Python's parser, within 10 kB
        raise ValueError(f"{name!r} in it has a header that is no header") from error
    if dtype.hasobject:
        raise ValueError(f"{name!r} in it holds Python objects, which could run code")
    offset, size = beginning.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not dtype.itemsize or offset + size != member.file_size:
        raise ValueError(
            f"{name!r} in it has {member.file_size:,} bytes, which are not those of a {dtype} of "
            f"shape {str(shape)[:200]}"
        )
    return NpzArray(shape, dtype, fortran_order, offset, member.CRC)


def _read_npy(archive, name):
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
