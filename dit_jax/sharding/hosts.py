"""Coordination of the processes of one run: all of them succeed, or all of them raise."""

import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.errors import UserFileError


def in_every_process(f: Callable):
    """Returns f() in every process; if one process raises, all raise, so that none waits forever.

    Raises: the error of this process; OSError if only other processes failed.
    """
    result, failure = None, None
    try:
        result = f()
    except Exception as error:  # of any kind: the other processes must not wait for this one
        failure = error
    if not all_true(failure is None):
        raise failure or UserFileError(
            "another process failed: see its output; run the same command again."
        )
    return result


def broadcast_result(f: Callable):
    """Returns the first process's f(), a JSON value, in every process; all raise if f raises."""
    result = in_every_process(lambda: f() if jax.process_index() == 0 else None)
    return json.loads(broadcast_text(json.dumps(result)))


def all_true(ok: bool) -> bool:
    """Returns whether ok is true in every process; all processes must call this function."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def broadcast_text(text: str) -> str:
    """Returns the first process's text in every process; all processes must call this function."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    # A broadcast needs arrays of one shape in all processes, so the length is sent first.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    if jax.process_index() != 0:
        encoded = np.zeros(size, np.uint8)  # only its shape counts
    return np.asarray(multihost_utils.broadcast_one_to_all(encoded)).tobytes().decode()


def in_first_process(act: Callable[[], None], message: str) -> None:
    """Calls act() in the first process.

    Raises: OSError with the message, in all processes, if act raised an OSError.
    """
    problem, failure = "", None
    if jax.process_index() == 0:
        try:
            act()
        except OSError as error:
            problem, failure = f"{message}: {error}", error
    if problem := broadcast_text(problem):
        raise UserFileError(problem) from failure
