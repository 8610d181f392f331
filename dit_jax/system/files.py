"""Files that are there whole or not at all; paths; files and names from elsewhere."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Collection
from typing import IO, BinaryIO

from dit_jax.errors import UserError, UserFileError

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
        raise UserError(f"{name} is empty: give a path, or leave it out.")
    if "\0" in text:
        raise UserError(f"{shown} has a NUL character, which no path can have.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(
            f"{shown}: remote paths are not read or written yet; mount it, or take a local path."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib's, which names no user
        user = text.partition("/")[0]
        raise UserError(
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
        raise UserError(
            f"{printable(directory)} is not in UTF-8, but checkpoints and datasets can lie in such "
            "directories only: choose another name."
        ) from None


class LostError(UserFileError):
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
    return UserFileError(
        f"{printable(path)} is a link, pipe or device, which is not written to: remove it, or put "
        "a file in its place."
    )


def refuse_link(path: str | os.PathLike) -> None:
    """Raises: OSError if a path, in a directory that is written to, is a link."""
    if os.path.islink(path):
        raise UserFileError(
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
                    raise UserFileError(
                        f"{printable(entry.path)} is no file, but a pipe, socket or device: remove "
                        "it."
                    )


def list_some(names: Collection[str], most: int = 5) -> str:
    """The first few of many names from elsewhere, for messages, and how many more there are."""
    shown = [printable(name[:200]) for _, name in zip(range(most), names, strict=False)]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown) + more if names else "none"


def open_and(path, read):
    """read(path); what the system refuses is said by this project's own OSError."""
    try:
        return read(path)
    except OSError as error:
        raise type(error)(f"cannot read {printable(path)}: {error.strerror or error}") from error
