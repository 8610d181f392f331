"""Directory locks: only one command at a time writes into a directory.

A lock is a file that is locked with flock. The operating system releases it when the process ends
in any way, so a dead process never blocks others.
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
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
MAX_BYTES = 2**20  # read from a lock file, which holds a command line
RETRY_SECONDS = 1e-3  # between two tries while `is_held` in another process tests the lock


class Lock:
    """Held lock of a directory; `check` verifies that it is still valid.

    The holder may append subdirectories to `watched`. `check` then also verifies that these were
    not removed or moved, or later writes would recreate them.
    """

    def __init__(self, path: pathlib.Path, file: TextIO | None):
        self.path = path
        # None: the first process of this command holds the lock, or the file system has no locks.
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
            f"{self.path.parent}.\nWhat is saved is kept; see that nothing else runs there."
        )

    def check_together(self) -> None:
        """Calls `check` in all processes together; if it fails in the first one, all raise.

        So none waits forever for one that has stopped.
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
    """Holds a lock file while the context is entered.

    The first process holds it for all processes of the command. The directory of the lock file is
    created if needed. It may contain only files and directories; links and pipes are refused. On a
    file system without locks, a warning is logged and the command continues.

    Args:
      path: the lock file, in the directory to lock.
      wait: whether to wait until another command releases the lock, instead of raising.
    Raises: in all processes, OSError that names the command which holds the lock, or a link or
      pipe in the directory; files.LostError in place of an OSError inside the context if the
      directory is gone.
    """
    opened = []

    def take():
        opened.append(_take(path, wait))
        try:
            # The command may write to any name in the directory, so no name may be a link or pipe.
            files.check_tree(path.parent, links=False)
        except OSError:
            _release(path, opened[0])
            raise

    # If the first process fails, all must raise, or the others would wait for it forever.
    sharding.in_first_process(take, f"cannot write into {path.parent}")
    file = opened[0] if opened else None
    lock = Lock(path, file)
    try:
        with lock.directory:
            yield lock
    finally:
        _release(path, file)


def _release(path, file):
    """Removes and unlocks the lock file; does nothing for None."""
    if file is not None:
        # Removed before it is unlocked: a process that has it open already then finds in _take that
        # its file is no longer at the path, and starts again.
        if files.is_at(file, path):
            path.unlink()
        file.close()


def _take(path, wait):
    """Returns the locked and open lock file, or None on a file system without locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserFileError(
            f"{path.parent} is, or lies in, a file: choose another directory."
        ) from None
    while True:
        file = files.open_to_write(path, "a+")
        try:
            if not _try_lock(file):
                if not wait:
                    raise UserFileError(
                        f"{_describe_holder(path)} writes into it.\nWait for it to end, or stop "
                        "it; its lock ends with it. Or choose another directory."
                    )
                logger.warning("waiting for another command: %s", _describe_holder(path))
                fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError) and error.errno in UNSUPPORTED:
                logger.warning(
                    "%s cannot be locked (%s): see that no other command writes there.",
                    path.parent,
                    error.strerror,
                )
                return None
            raise
        # Otherwise the previous holder has just removed this file: lock the new one.
        if files.is_at(file, path):
            file.truncate(0)
            file.write(json.dumps(_this_command()))
            file.flush()
            return file
        file.close()


def _try_lock(file):
    """Tries to lock a file exclusively; returns False if another command holds it."""
    while not _try(file, fcntl.LOCK_EX):
        if not _try(file, fcntl.LOCK_SH):
            return False
        # A shared lock was possible, so nobody holds the lock: `is_held` in another process tests
        # it for a moment, or its holder has just ended. Try again.
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(RETRY_SECONDS)
    return True


def _try(file, kind):
    """Calls flock without waiting; returns whether it succeeded."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: pathlib.Path) -> bool:
    """Returns whether a process holds the lock file.

    It takes a shared lock for a moment, for which `hold` waits.
    """
    try:
        with files.open_to_write(path, "r+", create=False) as file:
            return not _try(file, fcntl.LOCK_SH)
    except OSError:  # no such file, or a file system without locks
        return False


def _this_command():
    """Returns what is written to the lock file: this command, for the error of another one."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }


def _describe_holder(path):
    """Returns the command that wrote the lock file, in words, for messages."""
    try:
        holder = json_files.parse_json(json_files.read_bytes(path, MAX_BYTES), "", "")
        pid, host, since, command = (holder[k] for k in ("pid", "host", "since", "command"))
        return f"process {pid} on {host}, since {since}, {command!r},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another command"  # it has not written the file yet, or has just ended
