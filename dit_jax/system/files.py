"""File system helpers: atomic writes, checked paths, and safe handling of untrusted files.

Directories and files may come from strangers. So their names are escaped in messages, and links,
pipes and devices are refused where a command would write to them.
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
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: object) -> str:
    r"""Returns a text with all control characters escaped: a newline becomes \n, ESC becomes \x1b.

    Bidirectional and zero-width characters and lone surrogates are escaped too. Used for names in
    messages, because strangers may have chosen them.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c
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
            f"{shown}: remote paths are not read or written yet; mount it, or take a local path."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib raises it for an unknown user but does not name the user
        user = text.partition("/")[0]
        raise UserError(
            f"{shown}: {printable(user)} has no home directory; write ./{printable(text)} if that "
            "is its name."
        ) from None


def check_utf8(directory: pathlib.Path) -> None:
    """Raises a ValueError unless a path is valid UTF-8, as Orbax and array_record need it."""
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{printable(directory)} is not in UTF-8, but checkpoints and datasets can lie in such "
            "directories only: choose another name."
        ) from None


class LostError(UserFileError):
    """Error for a directory or lock file that was removed or moved while a command ran."""

    @classmethod
    def for_directory(cls, directory: pathlib.Path) -> "LostError":
        """Returns the error for a directory."""
        return cls(
            f"{directory} is gone: it was removed or moved while this command ran.\n"
            "Nothing more is written; if it was moved, move it back."
        )


class Directory:
    """Directory that must stay in place while a command reads it or writes into it.

    As a context, it replaces an OSError raised inside with a LostError if the directory is gone,
    because that is then the real cause.
    Raises: LostError if there is no directory at the path.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._status = path.stat()
        except FileNotFoundError:
            raise LostError.for_directory(path) from None

    def is_there(self) -> bool:
        """Returns whether the same directory is still at the path; a new one does not count."""
        return self.path.is_dir() and os.path.samestat(self.path.stat(), self._status)

    def check(self) -> None:
        """Raises a LostError if the directory was removed, moved or replaced."""
        if not self.is_there():
            raise LostError.for_directory(self.path)

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if isinstance(error, OSError):
            try:
                self.check()
            except LostError as lost:
                raise lost from error


def replace(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: the path has the old contents or all of the new ones.

    If several commands replace the same file, they do so one after another; the last one wins.

    Args:
      write: writes the contents to the file that it is given.
    Raises: OSError; LostError if the directory does not exist.
    """
    unfinished = temporary(path)
    try:
        with _open_alone(unfinished) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a crash could leave an empty file
                os.replace(unfinished, path)
            except BaseException:
                # Safe: it is still locked, so no other command writes to it.
                unfinished.unlink(missing_ok=True)
                raise
    except OSError as error:
        if not path.parent.is_dir():
            raise LostError.for_directory(path.parent) from error
        error.filename = error.filename or str(path)  # the error of a full disk has no file name
        raise


def _open_alone(path):
    """Opens an empty file for this process alone; waits while another process writes to it."""
    while True:
        file = open_to_write(path, "r+b")
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # Otherwise the previous holder has renamed this file to its final name: open a new one.
            if is_at(file, path):
                file.truncate(0)  # a killed command may have left something in it
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_at(file: IO, path: pathlib.Path) -> bool:
    """Returns whether an open file is the one at the path."""
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
    """Writes a text as UTF-8 atomically, as `replace`."""
    replace(path, lambda file: file.write(text.encode()))


def open_to_write(path: pathlib.Path, mode: str, create: bool = True) -> IO:
    """Opens a file as `open` does, but refuses symbolic and hard links, pipes and devices.

    A directory from a stranger may contain these under the names that a command writes to.

    Args:
      mode: 'a', 'a+' or 'r+', or one of these with 'b'; not 'w', which would empty a hard link.
      create: whether a file that does not exist is created.
    Raises: OSError.
    """
    # O_NONBLOCK: opening a pipe would wait for its other end.
    more = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)

    def opener(name, mode_flags):
        return os.open(name, mode_flags | more, 0o666)

    try:
        file = open(path, mode, opener=opener)  # noqa: SIM115, the caller closes it
    except OSError as error:
        is_pipe = isinstance(error, io.UnsupportedOperation)
        if not is_pipe and error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _no_file(path) from error
    # The open file is examined, not the path, which could change in between.
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise _no_file(path)
    return file


def _no_file(path):
    """Returns the error for a path that is no regular file."""
    return UserFileError(
        f"{printable(path)} is a link, pipe or device, which is not written to: remove it, or put "
        "a file in its place."
    )


def refuse_link(path: str | os.PathLike) -> None:
    """Raises an OSError if a path that a command may write to is a symbolic link."""
    if os.path.islink(path):
        raise UserFileError(
            f"{printable(path)} is a link: what is written there would go elsewhere. Put what it "
            "leads to in its place; the whole directory may be a link."
        )


def check_tree(directory: pathlib.Path, links: bool = True) -> None:
    """Raises if a directory contains anything but files and directories, at any depth.

    Reading from a pipe or a device may never end. Writing to a link leaves the directory.

    Args:
      links: whether links to files and directories are allowed.
    Raises: OSError that names the offending path.
    """
    waiting, seen = [directory], set()
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
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
                    if (status.st_dev, status.st_ino) not in seen:  # links may form a cycle
                        waiting.append(entry.path)
                    seen.add((status.st_dev, status.st_ino))
                elif not stat.S_ISREG(status.st_mode):
                    raise UserFileError(
                        f"{printable(entry.path)} is no file, but a pipe, socket or device: remove "
                        "it."
                    )


def list_some(names: Collection[str], limit: int = 5) -> str:
    """Returns the first names, escaped and at most 200 characters each, and how many follow."""
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
