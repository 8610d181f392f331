"""Locks: one command at a time writes into a directory.

A lock is a file that the operating system locks for a process. It ends with its process, however
that ends, so a lock left by a dead process does not block.
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

# What file systems without locks answer.
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
MOST_BYTES = 2**20  # of a lock file, which holds a command
GLANCE_SECONDS = 1e-3  # between two tries while `is_held` of other processes looks at the lock


class Lock:
    """A held lock of a directory; `check` tells whether it still guards it.

    Whoever holds it may watch more directories inside, of what must not be written anew elsewhere.
    """

    def __init__(self, path: pathlib.Path, file: TextIO | None):
        self.path = path
        self._file = file  # None: another process of this command holds it, or nothing can be held
        self.directory = files.Directory(path.parent)
        self.watched: list[files.Directory] = [self.directory]

    def check(self) -> None:
        """Demands that the lock's file, and so the directory, is still there and still ours.

        Raises: files.LostError if a directory that is watched was removed or moved, or the file
          removed or replaced.
        """
        for directory in self.watched:
            directory.check()
        if self._file is None or files.is_at(self._file, self.path):
            return
        raise files.LostError(
            f"{self.path} was removed or replaced, so another command may write into "
            f"{self.path.parent}.\nWhat is saved is kept; see that nothing else runs there."
        )

    def check_together(self) -> None:
        """As `check`, called and raised in all processes alike: so none waits for another."""
        problem = ""
        try:
            self.check()
        except files.LostError as error:
            problem = str(error)
        if problem := sharding.from_first_process(problem):
            raise files.LostError(problem)


@contextlib.contextmanager
def hold(path: pathlib.Path, wait: bool = False) -> Iterator[Lock]:
    """Holds the lock file `path` in the first process, for all processes of this command.

    The directory is made if it is not there; in it may be nothing but files and directories, whose
    names a stranger may have chosen. On a file system without locks, a warning says so.

    Args: wait, for another command that holds it to end, instead of raising.
    Raises: OSError that names the command which holds the lock, or a link or pipe in the
      directory, in all processes alike; files.LostError in place of an OSError from inside when the
      directory has gone.
    """
    opened = []

    def take():
        opened.append(_take(path, wait))
        try:
            files.check_tree(path.parent, links=False)  # all that the command may write to
        except OSError:
            _release(path, opened[0])
            raise

    # Every process learns of a failure: the others would wait for the first one.
    sharding.in_first_process(take, f"cannot write into {path.parent}")
    file = opened[0] if opened else None
    lock = Lock(path, file)
    try:
        with lock.directory:
            yield lock
    finally:
        _release(path, file)


def _release(path, file):
    if file is not None:
        if files.is_at(file, path):
            path.unlink()  # while it is held: who opened it before finds that out
        file.close()


def _take(path, wait):
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
                    raise UserFileError(f"{_describe_holder(path)} writes into it.\n{WAY_OUT}")
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
        if files.is_at(file, path):  # else its last holder has just removed it
            file.truncate(0)
            file.write(json.dumps(_this_command()))
            file.flush()
            return file
        file.close()


WAY_OUT = "Wait for it to end, or stop it; its lock ends with it. Or choose another directory."


def _try_lock(file):
    """Whether this process holds the file now; no other one holds it then, or looks at it."""
    while not _try(file, fcntl.LOCK_EX):
        if not _try(file, fcntl.LOCK_SH):
            return False
        # It was shared, so by processes that only look, or its holder has just ended.
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(GLANCE_SECONDS)
    return True


def _try(file, kind):
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: pathlib.Path) -> bool:
    """Whether a process holds the lock file.

    It looks through a shared lock, for which `hold` waits: who only looks makes no `hold` fail.
    """
    try:
        with files.open_to_write(path, "r+") as file:
            return not _try(file, fcntl.LOCK_SH)
    except OSError:  # no such file, or a file system without locks
        return False


def _this_command():
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }


def _describe_holder(path):
    """The command that wrote the lock file, in words."""
    try:
        holder = json_files.parse_json(json_files.read_bytes(path, MOST_BYTES), "", "")
        pid, host, since, command = (holder[k] for k in ("pid", "host", "since", "command"))
        return f"process {pid} on {host}, since {since}, {command!r},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another command"  # which has only begun, or has just ended
