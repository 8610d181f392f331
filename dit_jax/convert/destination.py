"""Destination of a conversion: a workdir that appears when it is complete."""

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
    """Raises unless a workdir can be made at this path. Called before a conversion begins.

    Raises: ValueError if the path is a file, or a directory that is not empty; OSError if nothing
      can be written there.
    """
    shown = files.printable(workdir)
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(f"{shown} is not empty: choose a new directory, or remove it.")
    if os.path.lexists(workdir) and not workdir.is_dir():
        raise UserError(f"{shown} is no directory: choose a new directory.")
    # Missing parents will be made in the nearest parent that exists.
    parent = next(path for path in workdir.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserFileError(
            f"cannot write to {shown}: {files.printable(parent)} is no directory, or you may not "
            "write to it. Choose another directory."
        )


@contextlib.contextmanager
def fill(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to write to, and renames it to the workdir at the end.

    The directory is `.<name>.partial` beside the workdir. A conversion that fails removes it. A
    conversion that is killed leaves it, and the next conversion to the same workdir empties it.
    Raises: ValueError or OSError as `check`; OSError if another process is writing to the
      directory, or if it cannot be written.
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
        # Locked before it is emptied: its contents may belong to a running conversion.
        _lock(lock_fd, shown)
        _empty(partial)
        try:
            yield partial
            try:
                os.replace(partial, workdir)
            except OSError as error:
                raise UserFileError(
                    f"cannot make {shown}: {error.strerror}. Choose a directory that does not "
                    "exist yet."
                ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock_fd)


def _lock(directory_fd, shown):
    """Locks an open directory until the process ends, even if it is killed."""
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserFileError(
            f"another process is converting to {shown}: wait for it, or choose another directory."
        ) from error
    except OSError:
        pass  # the file system has no locks


def _empty(directory):
    """Removes the files of a killed conversion from the directory."""
    leftovers = list(directory.iterdir())
    if leftovers:
        logger.info("%s: removed the files of a killed conversion", files.printable(directory))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
