"""The run of one cell of a sweep: training, then an evaluation at every compute point.

An interrupted cell continues from what it has saved.
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
    cell: grid.Cell,
    evaluation: ConfigDict,
    directory: pathlib.Path,
    made_by_sweep: bool = False,
) -> None:
    """Trains and evaluates a cell; an interrupted or finished cell does only what is missing.

    Args:
      evaluation: `config.evaluate` of the sweep.   directory: of the cell.
      made_by_sweep: whether the sweep has made the directory, which must then still exist.
    Raises: files.LostError if the sweep's directory is gone; ValueError as `check`; as
      `train.train_and_evaluate` and `samples.evaluate`, whose errors are recorded as the cell's
      failure. A signal (stopping.Stopped) and a full disk are not failures.
    """
    # If the sweep's directory was moved, a new one here would start the cell from scratch.
    if made_by_sweep:
        files.Directory(directory)
    # A process of a killed sweep may still run the cell: wait until it ends.
    with locks.hold(directory / LOCK, wait=True) as lock:
        if sharding.broadcast_text(get_state(cell, evaluation, directory)) == "done":
            logger.info("%s is done.", cell.name)
            return
        if lost := _list_lost_pictures(_read_record(directory), directory):
            logger.warning("%s has lost %s: it is measured again.", cell.name, ", ".join(lost))
        check(cell, directory, latents.open_split(cell.config, "train").metadata)
        # Wall time adds up over calls. A call that was killed has recorded none.
        began = time.monotonic()
        earlier_seconds = _read_record(directory).get("wall_seconds", 0)
        pictures = []

        def write_state(state, **failure):
            if jax.process_index() == 0:
                lock.directory.check()  # after a move, a checkpoint may have made a new directory
                fields = {
                    "wall_seconds": earlier_seconds + time.monotonic() - began,
                    "devices": jax.device_count(),
                    **failure,
                    "pictures": pictures,
                    **rows.describe_code(),
                }
                _write_record(cell, evaluation, directory, state, fields)

        # The record is written first, so that a killed cell counts as begun.
        write_state("begun")
        try:
            train.train_and_evaluate(cell.config, directory)
            for row in _evaluate(cell, evaluation, directory) if evaluation.num else ():
                pictures.append(row["picture"])
        except Exception as error:
            if not cli.is_repairable(error):  # after a full disk, the cell may continue later
                write_state("failed", error=str(error), traceback=traceback.format_exc())
            raise
        except stopping.Stopped:
            write_state("begun")  # again, to record the time until the signal
            raise
        write_state("done")


def check(cell: grid.Cell, directory: pathlib.Path, metadata: dict) -> None:
    """Raises if the directory has a run that cannot become the cell's.

    Args: metadata, of the training data.
    Raises: ValueError with the config's keys that differ, or the compute points that the run has
      passed without a checkpoint.
    """
    workdirs.check_config(directory, latents.build(cell.config).resolve(metadata))
    saved = workdirs.saved_steps(directory)
    # Training never goes back, so a step before the last checkpoint cannot be saved any more.
    missing = [step for step in cell.steps if saved and step <= saved[-1] and step not in saved]
    if missing:
        raise UserError(
            f"{directory} is trained to step {saved[-1]} and has kept {saved}, not the compute "
            f"points {missing}. Choose compute points among the kept steps and beyond the last, "
            "or another --workdir."
        )


def _evaluate(cell, evaluation, directory):
    """Yields the row of every compute point; a point that was measured before is read back."""
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
    fields = _read_record(directory)
    if not fields:
        return "waiting"
    if fields["digest"] != _compute_digest(cell, evaluation):
        return "begun"
    if fields["state"] == "done" and _list_lost_pictures(fields, directory):
        return "begun"
    return fields["state"]


def _list_lost_pictures(fields, directory):
    """Returns the pictures in a cell's record whose row or file is missing."""
    pictures = fields.get("pictures", ())  # absent without evaluations and in older records
    evaluations = rows.read(directory / "evaluations.jsonl") if pictures else []
    have_row = {row.get("picture") for row in evaluations}
    return [name for name in pictures if name not in have_row or not (directory / name).is_file()]


def get_error(directory: pathlib.Path) -> str:
    """Returns the message of the error that made the cell fail."""
    return _read_record(directory).get("error") or "no message"


def record_failure(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path, error: str):
    """Records that a cell failed, if its process died before it could record this itself."""
    if get_state(cell, evaluation, directory) != "failed":
        fields = _read_record(directory) | {"error": error}
        _write_record(cell, evaluation, directory, "failed", fields)


def forget_failure(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path) -> None:
    """Sets a failed cell to 'begun', so that it is tried again."""
    if get_state(cell, evaluation, directory) == "failed":
        _write_record(cell, evaluation, directory, "begun", _read_record(directory))


def _compute_digest(cell, evaluation):
    """Returns a digest of everything that determines the cell's results."""
    parts = cell.config.to_dict(), cell.steps, evaluation.to_dict()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_record(directory):
    """Returns the record of a cell; {} if it is absent or damaged."""
    try:
        return record.read(directory) if (directory / record.FILE).is_file() else {}
    except ValueError as error:
        logger.warning("%s; the cell begins where its checkpoints end.", error)
        return {}


def _write_record(cell, evaluation, directory, state, fields):
    """Writes the record of a cell: the fields, the cell's identity and its state."""
    identity = {"name": cell.name, "grid": cell.grid, "size": cell.size, "steps": cell.steps}
    identity |= {"axes": cell.axes, "digest": _compute_digest(cell, evaluation), "state": state}
    # `fields` may be an older record, so the current values must win.
    text = json.dumps(fields | identity, indent=2) + "\n"
    files.replace_text(directory / record.FILE, text)


def is_running(directory: pathlib.Path) -> bool:
    """Returns whether some process is running the cell."""
    return locks.is_held(directory / LOCK)
