"""Work of several processes of one run: what one does for all, and what all must agree on."""

import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.errors import UserFileError


def in_every_process(f: Callable):
    """Runs f in every process; if one raises, all raise, so that none waits forever.

    Raises: the process's own error; OSError if only other processes failed.
    """
    result, failure = None, None
    try:
        result = f()
    except Exception as error:  # whatever it is, the others must not wait for this process
        failure = error
    if not all_true(failure is None):
        raise failure or UserFileError(
            "another process failed: see its output; run the same command again."
        )
    return result


def broadcast_result(f: Callable):
    """Returns f() of the first process, in every process, as JSON keeps it; all raise if f does."""
    result = in_every_process(lambda: f() if jax.process_index() == 0 else None)
    return json.loads(broadcast_text(json.dumps(result)))


def all_true(ok: bool) -> bool:
    """Returns whether ok is true in every process; all processes must call this."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def broadcast_text(text: str) -> str:
    """Returns the first process's text, in every process; all processes must call this."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    # A broadcast needs arrays of the same shape in all processes, so the length goes first.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    # The other processes only contribute the shape.
    encoded = encoded if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(encoded)).tobytes().decode()


def in_first_process(act: Callable[[], None], message: str) -> None:
    """Calls act() in the first process.

    Raises: OSError with the message, in all processes, if act raised one. So none waits for it.
    """
    problem, failure = "", None
    if jax.process_index() == 0:
        try:
            act()
        except OSError as error:
            problem, failure = f"{message}: {error}", error
    if problem := broadcast_text(problem):
        raise UserFileError(problem) from failure
