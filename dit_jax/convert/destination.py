"""Destination of a conversion: a workdir that appears complete, or not at all."""

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
    """Raises unless a workdir can be made at this path. Called before the work begins.

    Raises: ValueError if it is a file, or a directory that is not empty; OSError if nothing can be
      written there.
    """
    shown = files.printable(workdir)
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(f"{shown} is not empty: choose a new directory, or remove it.")
    if os.path.lexists(workdir) and not workdir.is_dir():
        raise UserError(f"{shown} is no directory: choose a new one.")
    # The nearest parent that exists: the others are made in it.
    parent = next(path for path in workdir.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserFileError(
            f"cannot write to {shown}: {files.printable(parent)} is no directory, or may not be "
            "written to. Choose another place."
        )


@contextlib.contextmanager
def fill(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to write to, and makes it the workdir when all in it is written.

    The directory is `.<name>.partial` beside the workdir. It is removed if the conversion fails. If
    the conversion is killed it stays, and the next conversion to the same workdir empties it.
    Raises: ValueError or OSError as `check`; OSError if another process is writing there, or if it
      cannot be written.
    """
    check(workdir)
    # os.replace does not follow links: a workdir that is a link is resolved first.
    shown, workdir = files.printable(workdir), pathlib.Path(os.path.realpath(workdir))
    partial = workdir.with_name(f".{workdir.name}.partial")
    # Emptying a link would remove files elsewhere.
    if partial.is_symlink():
        raise UserFileError(f"{files.printable(partial)} is a link: remove it.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserFileError(f"cannot write to {shown}: {error.strerror}") from error
    try:
        # The lock comes first: what is in the directory may belong to a running conversion.
        _lock(lock_fd, shown)
        _empty(partial)
        try:
            yield partial
            try:
                os.replace(partial, workdir)
            except OSError as error:
                raise UserFileError(
                    f"cannot make {shown}: {error.strerror}. Choose a directory that is not there "
                    "yet."
                ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock_fd)


def _lock(directory, shown):
    """Locks an open directory. The lock ends with the process, even if that is killed."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserFileError(
            f"another process converts to {shown} now: wait for it, or choose another directory."
        ) from error
    except OSError:
        pass  # the file system has no locks


def _empty(directory):
    """Removes what a killed conversion left in the directory."""
    if leftovers := list(directory.iterdir()):
        logger.info("%s: removed, of a conversion that was ended", files.printable(directory))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
