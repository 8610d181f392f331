"""The workdir that a conversion makes: there whole, or not at all."""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

from dit_jax.errors import UserError, UserFileError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")


def check(workdir: pathlib.Path) -> None:
    """Demands, before the work, that a workdir can be made here.

    Raises: ValueError for a file or a directory that is not empty; OSError where nothing can be
      written.
    """
    shown = files.printable(workdir)
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(f"{shown} is not empty: choose a new directory, or remove it.")
    if os.path.lexists(workdir) and not workdir.is_dir():
        raise UserError(f"{shown} is no directory: choose a new one.")
    parent = next(path for path in workdir.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserFileError(
            f"cannot write to {shown}: {files.printable(parent)} is no directory, or may not be "
            "written to. Choose another place."
        )


@contextlib.contextmanager
def fill(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write to, which becomes the workdir when all in it is written.

    It is `.<name>.partial` beside the workdir, and goes if the conversion fails. A conversion that
    is killed leaves it; the next one to the same workdir removes it and begins again.
    Raises: ValueError or OSError as `check`; OSError if another process fills it now, or if it
      cannot be written.
    """
    check(workdir)
    shown, workdir = files.printable(workdir), pathlib.Path(os.path.realpath(workdir))
    partial = workdir.with_name(f".{workdir.name}.partial")
    if partial.is_symlink():
        raise UserFileError(f"{files.printable(partial)} is a link: remove it.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        hold = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserFileError(f"cannot write to {shown}: {error.strerror}") from error
    try:
        _hold(hold, shown)
        _empty(partial)
        try:
            yield partial
            _become(partial, workdir)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(hold)


def _hold(directory, shown):
    """Locks an open directory; the lock of a process that was killed is gone with it."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):  # others: a file system without locks
            raise UserFileError(
                f"another process converts to {shown} now: wait for it, or choose another "
                "directory."
            ) from error


def _empty(directory):
    if left := list(directory.iterdir()):
        logger.info("%s: removed, of a conversion that was ended", files.printable(directory))
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _become(partial, workdir):
    try:
        os.replace(partial, workdir)
    except OSError as error:
        raise UserFileError(
            f"cannot make {files.printable(workdir)}: {error.strerror}. Choose a directory that is "
            "not there yet."
        ) from error
