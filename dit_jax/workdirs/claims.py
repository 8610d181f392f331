"""A workdir claimed for a run: one command at a time writes checkpoints into it."""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator

from ml_collections import ConfigDict

from dit_jax import sharding
from dit_jax.system import files, locks
from dit_jax.workdirs import records, run_config

logger = logging.getLogger("dit_jax")

LOCK = "train.lock"  # in a workdir that a command writes checkpoints into


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config: ConfigDict) -> Iterator[locks.Lock]:
    """Makes the workdir, if it is not there, and holds it for a run of this config.

    Raises: ValueError as `check_config`; OSError as `locks.hold`, if another command writes into
      the workdir, or if the directory cannot be written.
    """
    files.check_utf8(workdir)  # first: what is refused must not leave a directory behind
    run_config.check_config(workdir, config)
    with locks.hold(workdir / LOCK) as lock:
        run_config.check_config(workdir, config)  # again: another run may have ended since
        _warn_of_length(workdir, config)

        def make():
            (workdir / "checkpoints").mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=workdir):
                pass

        sharding.in_first_process(make, f"cannot write to the workdir {workdir}")
        with files.Directory(workdir / "checkpoints") as checkpoints:
            lock.watched.append(checkpoints)
            yield lock


def _warn_of_length(workdir, config):
    if records.saved_steps(workdir) and config.optim.schedule == "cosine":
        then = run_config.load_config(workdir).total_steps
        if then != config.total_steps:
            logger.warning(
                "total_steps was %d, now %d: so is the cosine schedule's end",
                then,
                config.total_steps,
            )
