"""The run of one cell of a sweep: training, then an evaluation at every compute point.

A cell that was interrupted continues from what it has saved.
"""

import hashlib
import json
import logging
import pathlib
import time
import traceback

import jax
from ml_collections import ConfigDict

from dit_jax import cli, latents, sharding, train, workdirs
from dit_jax.errors import UserError
from dit_jax.evaluation import extractors, references, rows, samples
from dit_jax.sampling import runs
from dit_jax.system import files, locks, stopping
from dit_jax.training import metric_log
from experiments.scaling.cells import grid, record

logger = logging.getLogger("dit_jax")

LOCK = "cell.lock"  # in a cell's directory, beside the lock that training holds
# Exit status of a cell that a signal or a full disk ended: EX_TEMPFAIL of sysexits.h.
INTERRUPTED = 75


def run(
    cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path, made: bool = False
) -> None:
    """Trains and evaluates a cell, or does what remains to be done.

    Args:
      evaluation: `config.evaluate` of the sweep.   directory: of the cell.
      made: whether a sweep has made the directory. It is then not made again.
    Raises: files.LostError if a made directory is gone; ValueError as `check`; as
      `train.train_and_evaluate` and `samples.evaluate`, whose errors are recorded as the cell's
      failure. A signal (stopping.Stopped) and a full disk are not failures.
    """
    # The sweep's directory may have been moved since; a new one would start the cell from scratch.
    if made:
        files.Directory(directory)
    # A process of a killed sweep may still run the cell: wait until it ends.
    with locks.hold(directory / LOCK, wait=True) as lock:
        if sharding.broadcast_text(get_state(cell, evaluation, directory)) == "done":
            logger.info("%s is done.", cell.name)
            return
        if lost := _lost(_read(directory), directory):
            logger.warning("%s has lost %s: it is measured again.", cell.name, ", ".join(lost))
        check(cell, directory, latents.open_split(cell.config, "train").metadata)
        # The time of earlier parts of this run adds up. A part that was killed recorded none.
        began = time.monotonic()
        before = _read(directory).get("wall_seconds", 0)
        pictures = []

        def note(state, **more):
            if jax.process_index() == 0:
                lock.directory.check()  # after a move, a checkpoint may have made a new directory
                seconds = before + time.monotonic() - began
                more = {"wall_seconds": seconds, "devices": jax.device_count(), **more}
                more |= {"pictures": pictures, **rows.describe_code()}
                _write(cell, evaluation, directory, state, more)

        # The record is written first, so that a killed cell counts as begun.
        note("begun")
        try:
            train.train_and_evaluate(cell.config, directory)
            for row in _evaluate(cell, evaluation, directory) if evaluation.num else ():
                pictures.append(row["picture"])
        except Exception as error:  # any error is the cell's failure
            if not cli.is_repairable(error):  # but a full disk: the cell may continue later
                note("failed", error=str(error), traceback=traceback.format_exc())
            raise
        except stopping.Stopped:
            note("begun")  # again, to record the time until the signal
            raise
        note("done")


def check(cell: grid.Cell, directory: pathlib.Path, metadata: dict) -> None:
    """Raises unless the directory's run, if any, has the cell's config and its compute points.

    Args: metadata, of the training data.
    Raises: ValueError with the keys that differ, or the compute points without a checkpoint.
    """
    workdirs.check_config(directory, latents.build(cell.config).resolve(metadata))
    saved = workdirs.saved_steps(directory)
    # Training never goes back, so a step before the last checkpoint cannot be saved any more.
    missing = [step for step in cell.steps if saved and step <= saved[-1] and step not in saved]
    if missing:
        raise UserError(
            f"{directory} is trained to step {saved[-1]} and has kept {saved}, not the compute "
            f"points {missing}. Take steps among these and beyond the last, or another --workdir."
        )


def _evaluate(cell, evaluation, directory):
    """Evaluates every compute point and yields its row; a point measured before is read back."""
    extractor = load_extractor(evaluation)
    reference = references.load_for_run(
        cell.config, evaluation.reference, extractor, workdir=directory
    )
    for step in cell.steps:
        row = samples.evaluate(
            runs.load(directory, step),
            directory,
            extractor,
            reference,
            evaluation.num,
            evaluation.seed,
            evaluation.labels,
            evaluation.batch_size or None,
        )
        logger.info("step %d  %s", step, metric_log.format_values(rows.get_measures(row)))
        yield row


def load_extractor(evaluation: ConfigDict) -> extractors.Extractor:
    """Loads the extractor of `config.evaluate`, by default that of its reference.

    Raises: as `extractors.load`.
    """
    return extractors.load(
        evaluation.extractor or references.default_extractor(evaluation.reference),
        evaluation.weights and files.to_path(evaluation.weights, "evaluate.weights"),
    )


def get_state(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path) -> str:
    """Returns 'waiting', 'begun', 'failed' or 'done'.

    A record of another config or evaluation counts as 'begun'. So does a finished cell that has
    lost rows or pictures.
    """
    known = _read(directory)
    if not known:
        return "waiting"
    if known["digest"] != _digest(cell, evaluation):
        return "begun"
    return "begun" if known["state"] == "done" and _lost(known, directory) else known["state"]


def _lost(found, directory):
    """Returns the pictures in a cell's record whose row or file is missing."""
    pictures = found.get("pictures", ())  # absent without evaluations and in older records
    kept = rows.read(directory / "evaluations.jsonl") if pictures else []
    named = {row.get("picture") for row in kept}
    return [name for name in pictures if name not in named or not (directory / name).is_file()]


def get_error(directory: pathlib.Path) -> str:
    """Returns the message of the error that made the cell fail."""
    return _read(directory).get("error") or "no message"


def record_failure(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path, error: str):
    """Records that a cell failed, for a process that died before it could record this itself."""
    if get_state(cell, evaluation, directory) != "failed":
        _write(cell, evaluation, directory, "failed", _read(directory) | {"error": error})


def forget_failure(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path) -> None:
    """Sets a failed cell to 'begun', so that it is tried again."""
    if get_state(cell, evaluation, directory) == "failed":
        _write(cell, evaluation, directory, "begun", _read(directory))


def _digest(cell, evaluation):
    """Returns a digest of everything that determines the cell's results."""
    parts = cell.config.to_dict(), cell.steps, evaluation.to_dict()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read(directory):
    """Returns the record of a cell; {} if there is none or if it is damaged."""
    try:
        return record.read(directory) if (directory / record.FILE).is_file() else {}
    except ValueError as error:
        logger.warning("%s; the cell begins where its checkpoints end.", error)
        return {}


def _write(cell, evaluation, directory, state, more):
    names = {"name": cell.name, "grid": cell.grid, "size": cell.size, "steps": cell.steps}
    names |= {"axes": cell.axes, "digest": _digest(cell, evaluation), "state": state}
    # `more` may be an older record, so the current values must win.
    text = json.dumps(more | names, indent=2) + "\n"
    files.replace_text(directory / record.FILE, text)


def is_busy(directory: pathlib.Path) -> bool:
    """Returns whether some process is running the cell."""
    return locks.is_held(directory / LOCK)
