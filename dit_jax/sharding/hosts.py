"""Several processes of one run: what one does for all, and what all must agree on."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.errors import UserFileError


def in_every_process(f: Callable):
    """f() in every process; where it raises in one it ends all: they would wait for that one.

    Raises: the process's own error; OSError where only others failed.
    """
    result, failure = None, None
    try:
        result = f()
    except Exception as error:  # of any kind
        failure = error
    if not all_processes(failure is None):
        raise failure or OSError(
            "another process failed: see its output; run the same command again."
        )
    return result


def all_processes(ok: bool) -> bool:
    """Whether it is so in every process; all of them must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def from_first_process(text: str) -> str:
    """The first process's text, in every process; all of them must ask."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    encoded = encoded if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(encoded)).tobytes().decode()


def in_first_process(act: Callable[[], None], message: str) -> None:
    """Calls act() in the first process.

    Raises: OSError in all processes alike, with the message, if act did: so none waits for it.
    """
    problem, failure = "", None
    if jax.process_index() == 0:
        try:
            act()
        except OSError as error:
            problem, failure = f"{message}: {error}", error
    if problem := from_first_process(problem):
        raise UserFileError(problem) from failure
