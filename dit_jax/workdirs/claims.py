"""Claims of a workdir: only one command at a time writes checkpoints into it."""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator

from ml_collections import ConfigDict

from dit_jax import sharding
from dit_jax.errors import UserError
from dit_jax.system import files, locks
from dit_jax.workdirs import checkpoint_files, run_config

logger = logging.getLogger("dit_jax")

LOCK = "train.lock"  # name of the lock file in a workdir


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config: ConfigDict) -> Iterator[locks.Lock]:
    """Creates the workdir if needed, and locks it for a run of this config.

    Raises: ValueError as `check_config`; OSError as `locks.hold`, if another command writes into
      the workdir, or if the directory is not writable.
    """
    # Checked before the lock creates the directory, so that a refused run leaves nothing behind.
    files.check_utf8(workdir)
    if (workdir / "encode.json").is_file():
        raise UserError(f"{workdir} holds moments of dit_jax.encode: choose another workdir.")
    run_config.check_config(workdir, config)
    with locks.hold(workdir / LOCK) as lock:
        run_config.check_config(workdir, config)  # again: another run may have ended meanwhile
        _warn_of_total_steps(workdir, config)

        def create_checkpoints():
            # The temporary file tests that the workdir is writable.
            (workdir / "checkpoints").mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=workdir):
                pass

        sharding.in_first_process(create_checkpoints, f"cannot write to the workdir {workdir}")
        with files.Directory(workdir / "checkpoints") as checkpoints:
            lock.watched.append(checkpoints)
            yield lock


def _warn_of_total_steps(workdir, config):
    """Warns if another total_steps changes the cosine schedule of the run."""
    if checkpoint_files.saved_steps(workdir) and config.optim.schedule == "cosine":
        saved, current = run_config.load_config(workdir).total_steps, config.total_steps
        if saved != current:
            message = "total_steps was %d, now %d: the cosine schedule ends at the new one"
            logger.warning(message, saved, current)
