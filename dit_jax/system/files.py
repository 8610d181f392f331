"""File system helpers: atomic writes, checked paths, and safe handling of untrusted files.

Directories and files may come from strangers. So file names are escaped in messages. A command does
not write to links, pipes and devices.
"""

import contextlib
import errno
import fcntl
import io
import itertools
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Collection
from typing import IO, BinaryIO

from dit_jax.errors import MissingFileError, UserError, UserFileError

# Unicode categories of characters that a terminal executes or hides: control characters, format
# characters (bidirectional, zero-width), surrogates, line and paragraph separators.
ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: object) -> str:
    r"""Returns a text with all control characters escaped: a newline becomes \n, ESC becomes \x1b.

    Bidirectional and zero-width characters and lone surrogates are escaped too. Messages need this
    for names of files, because strangers may have chosen these names.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ESCAPED_CATEGORIES else c
        for c in text
    )


def to_path(text: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the value of a flag or config key as a local path, with `~` and `~user` expanded.

    Args:
      name: the flag or key, such as '--workdir' or 'latents.vae', for messages.
    Raises: ValueError for an empty text, a remote path, an unknown user, or a NUL character.
    """
    text = os.fspath(text)
    shown = f"{name}={printable(text)}"
    if not text:
        raise UserError(f"{name} is empty: give a path, or leave it out.")
    if "\0" in text:
        raise UserError(f"{shown} has a NUL character, which no path can have.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(
            f"{shown}: remote paths are not supported. Mount the directory, or give a local path."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib raises it for an unknown user but does not name the user
        user = text.partition("/")[0]
        raise UserError(
            f"{shown}: {printable(user)} has no home directory. If it is the name of a file, write "
            f"./{printable(text)}."
        ) from None


def check_utf8(directory: pathlib.Path) -> None:
    """Raises a ValueError unless a path is valid UTF-8, which Orbax and array_record need."""
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{printable(directory)} is not valid UTF-8, but directories of checkpoints and "
            "datasets must be: choose another name."
        ) from None


class LostError(UserFileError):
    """Error for a directory or lock file that was removed or moved while a command ran."""

    @classmethod
    def for_directory(cls, directory: pathlib.Path) -> "LostError":
        """Returns the error for a directory."""
        return cls(
            f"{directory} is gone: it was removed or moved while this command ran.\n"
            "Nothing more is written. If the directory was moved, move it back."
        )


class Directory:
    """Directory that must stay in place while a command reads from it or writes into it.

    It is a context manager: if the directory is gone when an OSError leaves the context, a
    LostError replaces the OSError, because the lost directory is the real cause.
    Raises: LostError if there is no directory at the path.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._status = path.stat()
        except FileNotFoundError:
            raise LostError.for_directory(path) from None

    def is_there(self) -> bool:
        """Returns whether the same directory is still at the path, not a new one."""
        return self.path.is_dir() and os.path.samestat(self.path.stat(), self._status)

    def check(self) -> None:
        """Raises a LostError if the directory was removed, moved or replaced."""
        if not self.is_there():
            raise LostError.for_directory(self.path)

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if isinstance(error, OSError) and not self.is_there():
            raise LostError.for_directory(self.path) from error


def replace(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: the path always has all of the old or all of the new contents.

    If several commands replace the same file, they wait for each other; the last command wins.

    Args:
      write: called with an open file, into which it writes the contents.
    Raises: OSError; LostError if the directory does not exist.
    """
    unfinished = temporary(path)
    try:
        with _open_exclusively(unfinished) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a crash could leave an empty file
                os.replace(unfinished, path)
            except BaseException:
                # Safe: the file is still locked, so no other command writes to it.
                unfinished.unlink(missing_ok=True)
                raise
    except OSError as error:
        if not path.parent.is_dir():
            raise LostError.for_directory(path.parent) from error
        error.filename = error.filename or str(path)  # a full disk's error names no file
        raise


def _open_exclusively(path):
    """Opens an empty file that is locked by this process; waits while another process has it."""
    while True:
        file = open_to_write(path, "r+b")
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # If not, the previous process has renamed this file to its final name: open a new file.
            if is_at(file, path):
                file.truncate(0)  # a killed command may have left contents
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_at(file: IO, path: pathlib.Path) -> bool:
    """Returns whether the path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def flush_to_disk(path: pathlib.Path) -> None:
    """Waits until the contents of a file are on the disk (fsync).   Raises: OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def temporary(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of the temporary file that `replace` writes before it renames it."""
    return path.with_name(f"{path.name}.tmp")


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8 with `replace`."""
    replace(path, lambda file: file.write(text.encode()))


def open_to_write(path: pathlib.Path, mode: str, create: bool = True) -> IO:
    """Opens a file as `open` does, but refuses symbolic and hard links, pipes and devices.

    A stranger's directory may contain them under the names that a command writes to.

    Args:
      mode: 'a', 'a+' or 'r+', also with 'b'; not 'w', which would empty the target of a hard link.
      create: whether a file that does not exist is created.
    Raises: OSError.
    """
    # O_NONBLOCK, because opening a pipe would wait for its other end.
    safe_flags = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)

    def opener(name, mode_flags):
        return os.open(name, mode_flags | safe_flags, 0o666)

    try:
        file = open(path, mode, opener=opener)  # noqa: SIM115, the caller closes it
    except OSError as error:
        is_pipe = isinstance(error, io.UnsupportedOperation)
        if not is_pipe and error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _make_link_error(path) from error
    # The open file is examined, not the path, which could change in between.
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise _make_link_error(path)
    return file


def _make_link_error(path):
    """Returns the error for writing to a path that is no regular file."""
    return UserFileError(
        f"{printable(path)} is a link, pipe or device, but must be a file. Remove it, or put a "
        "file in its place."
    )


def refuse_link(path: str | os.PathLike) -> None:
    """Raises an OSError if a path that a command may write to is a symbolic link."""
    if os.path.islink(path):
        raise UserFileError(
            f"{printable(path)} is a link, so this command would write outside the directory. "
            "Replace the link with its target. Only the directory itself may be a link."
        )


def check_tree(directory: pathlib.Path, links: bool = True) -> None:
    """Checks that a directory contains only files and directories, at any depth.

    Reading from a pipe or a device may never end. Writing to a link changes files elsewhere.

    Args:
      links: whether links to files and directories are allowed too.
    Raises: OSError that names the wrong path.
    """
    to_visit, visited = [directory], set()
    while to_visit:
        try:
            entries = os.scandir(to_visit.pop())
        except FileNotFoundError:  # another command has just removed it
            continue
        with entries:
            for entry in entries:
                if not links:
                    refuse_link(entry.path)
                try:
                    status = entry.stat()
                except OSError:  # a link without a target
                    continue
                if stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity not in visited:  # links may form a cycle
                        to_visit.append(entry.path)
                    visited.add(identity)
                elif not stat.S_ISREG(status.st_mode):
                    raise UserFileError(
                        f"{printable(entry.path)} is a pipe, socket or device: remove it."
                    )


def list_some(names: Collection[str], limit: int = 5) -> str:
    """Returns the first names, escaped and cut to 200 characters, and the number of others."""
    shown = [printable(name[:200]) for name in itertools.islice(names, limit)]
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(shown) + more if names else "none"


def read_or_explain(path, read):
    """Returns read(path).   Raises: OSError with a message that names the path."""
    try:
        return read(path)
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else UserFileError
        raise kind(f"cannot read {printable(path)}: {error.strerror or error}") from error
