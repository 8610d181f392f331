"""Directory locks: only one command at a time writes into a directory.

A lock is a file that is locked with flock. The operating system releases the lock when the process
ends in any way, so a dead process never blocks other processes.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from dit_jax import sharding
from dit_jax.errors import UserFileError
from dit_jax.system import files, json_files

logger = logging.getLogger("dit_jax")

# Errors of file systems without locks.
UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
MAX_BYTES = 2**20  # that are read from a lock file, which contains a command line
RETRY_SECONDS = 1e-3  # between two tries, while another process tests the lock with `is_held`


class Lock:
    """Lock of a directory, which this command holds; `check` verifies that it is still valid.

    The holder may append subdirectories to `watched`. Then `check` also verifies that these were
    not removed or moved. Otherwise later writes would recreate them.
    """

    def __init__(self, path: pathlib.Path, file: TextIO | None):
        self.path = path
        # None if another process of this command holds the lock, or the file system has no locks.
        self._file = file
        self.directory = files.Directory(path.parent)
        self.watched: list[files.Directory] = [self.directory]

    def check(self) -> None:
        """Raises a files.LostError unless the watched directories and the lock are in place."""
        for directory in self.watched:
            directory.check()
        if self._file is None or files.is_at(self._file, self.path):
            return
        raise files.LostError(
            f"{self.path} was removed or replaced, so another command may write into "
            f"{self.path.parent}.\nAll saved work is kept. Make sure that no other command writes "
            "there."
        )

    def check_together(self) -> None:
        """Calls `check` in all processes; if the check in the first process fails, all raise.

        Otherwise the other processes would wait forever for the first one.
        """
        problem = ""
        try:
            self.check()
        except files.LostError as error:
            problem = str(error)
        if problem := sharding.broadcast_text(problem):
            raise files.LostError(problem)


@contextlib.contextmanager
def hold(path: pathlib.Path, wait: bool = False) -> Iterator[Lock]:
    """Context manager that holds a lock file; only the first process of a command takes the lock.

    The directory of the lock file is created if needed. On a file system without locks, a warning
    is logged and the command continues.

    Args:
      path: the lock file, in the directory to lock.
      wait: whether to wait until another command releases the lock, instead of raising.
    Raises: in all processes, OSError if another command holds the lock, or if the directory
      contains a link or pipe; files.LostError in place of an OSError inside the context if the
      directory is gone.
    """
    lock_files = []  # stays empty in all processes but the first

    def take():
        lock_files.append(_take(path, wait))
        try:
            # The command may write to any name in the directory, so no name may be a link or pipe.
            files.check_tree(path.parent, links=False)
        except OSError:
            _release(path, lock_files[0])
            raise

    # If the first process fails, all must raise, or the others would wait for it forever.
    sharding.in_first_process(take, f"cannot write into {path.parent}")
    file = lock_files[0] if lock_files else None
    lock = Lock(path, file)
    try:
        with lock.directory:
            yield lock
    finally:
        _release(path, file)


def _release(path, file):
    """Removes and unlocks the lock file; does nothing for None."""
    if file is not None:
        # Removed before it is unlocked. Another process may have opened this file already: `_take`
        # there notices that the file is no longer at the path, and opens the new one.
        if files.is_at(file, path):
            path.unlink()
        file.close()


def _take(path, wait):
    """Returns the locked and open lock file, or None on a file system without locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserFileError(
            f"{path.parent} is a file, or is inside a file: choose another directory."
        ) from None
    while True:
        file = files.open_to_write(path, "a+")
        try:
            if not _try_lock(file):
                if not wait:
                    raise UserFileError(
                        f"{_describe_holder(path)} writes into it.\nWait until that command ends, "
                        "stop it, or choose another directory."
                    )
                logger.warning("waiting for another command: %s", _describe_holder(path))
                fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError) and error.errno in UNSUPPORTED_ERRNOS:
                logger.warning(
                    "%s cannot be locked (%s): make sure that no other command writes there.",
                    path.parent,
                    error.strerror,
                )
                return None
            raise
        # If not, the previous holder has just removed this file: lock a new one.
        if files.is_at(file, path):
            file.truncate(0)
            file.write(json.dumps(_describe_this_command()))
            file.flush()
            return file
        file.close()


def _try_lock(file):
    """Tries to lock a file exclusively; returns False if another command holds it."""
    while not _try_flock(file, fcntl.LOCK_EX):
        if not _try_flock(file, fcntl.LOCK_SH):
            return False
        # A shared lock was possible, so no command holds the lock. Either `is_held` in another
        # process tests the lock for a moment, or the holder has just ended.
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(RETRY_SECONDS)
    return True


def _try_flock(file, operation):
    """Calls flock without waiting; returns whether it succeeded."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: pathlib.Path) -> bool:
    """Returns whether a process holds the lock file.

    The test takes a shared lock for a moment. Meanwhile `hold` in another process waits.
    """
    try:
        with files.open_to_write(path, "r+", create=False) as file:
            return not _try_flock(file, fcntl.LOCK_SH)
    except OSError:  # no such file, or a file system without locks
        return False


def _describe_this_command():
    """Returns the contents of the lock file, which the errors of other commands show."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }


def _describe_holder(path):
    """Returns a description of the command that wrote the lock file, for messages."""
    try:
        holder = json_files.parse_json(json_files.read_bytes(path, MAX_BYTES), "", "")
        pid, host, since, command = (holder[k] for k in ("pid", "host", "since", "command"))
        return f"process {pid} on {host}, since {since}, {command!r},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another command"  # it has not written the lock file yet, or has just ended
