"""One cell of a sweep: trained, then evaluated at every compute point; continued where it was."""

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

LOCK = "cell.lock"  # in a cell's directory, beside the lock of its training
# Exit status of a cell that a signal or a full disk ended; sysexits.h's EX_TEMPFAIL.
INTERRUPTED = 75


def run(
    cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path, made: bool = False
) -> None:
    """Trains and evaluates a cell, or what is left of it.

    Args: evaluation, `config.evaluate` of the sweep.   directory: the cell's.   made: a sweep has
      made it, so it is not made anew.
    Raises: files.LostError if it was made and is not there; ValueError as `check`; as
      `train.train_and_evaluate` and `samples.evaluate`, and then what failed is recorded. A
      signal, as stopping.Stopped, or a full disk is no failure.
    """
    if made:
        files.Directory(directory)
    # Waits for another process that runs it: one of a sweep that was killed, say.
    with locks.hold(directory / LOCK, wait=True) as lock:
        if sharding.from_first_process(state(cell, evaluation, directory)) == "done":
            logger.info("%s is done.", cell.name)
            return
        if lost := _lost(_read(directory), directory):
            logger.warning("%s has lost %s: it is measured again.", cell.name, ", ".join(lost))
        check(cell, directory, latents.open_split(cell.config, "train").metadata)
        began = time.monotonic()
        # Of the parts of this run that came to an end; those that were killed are not known.
        before = _read(directory).get("wall_seconds", 0)
        pictures = []

        def note(state, **more):
            if jax.process_index() == 0:
                lock.directory.check()  # a checkpoint may have made one of its name
                seconds = before + time.monotonic() - began
                more = {"wall_seconds": seconds, "devices": jax.device_count(), **more}
                more |= {"pictures": pictures, **rows.describe_code()}
                _write(cell, evaluation, directory, state, more)

        note("begun")
        try:
            train.train_and_evaluate(cell.config, directory)
            for row in _evaluate(cell, evaluation, directory) if evaluation.num else ():
                pictures.append(row["picture"])
        except Exception as error:  # of any kind
            if not cli.is_passing(error):  # a full disk is not the cell's: it has only begun
                note("failed", error=str(error), traceback=traceback.format_exc())
            raise
        except stopping.Stopped:
            note("begun")  # with the time that it took
            raise
        note("done")


def check(cell: grid.Cell, directory: pathlib.Path, metadata: dict) -> None:
    """Demands that what the directory holds is of the cell's config and has its compute points.

    Args: metadata, of the data that it trains on.
    Raises: ValueError with the keys that differ, or the compute points that are gone.
    """
    workdirs.check_config(directory, latents.build(cell.config).resolve(metadata))
    saved = workdirs.saved_steps(directory)
    gone = [step for step in cell.steps if saved and step <= saved[-1] and step not in saved]
    if gone:
        raise UserError(
            f"{directory} is trained to step {saved[-1]} and has kept {saved}, not the compute "
            f"points {gone}. Take steps among these and beyond the last, or another --workdir."
        )


def _evaluate(cell, evaluation, directory):
    """The row of each compute point."""
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
        logger.info("step %d  %s", step, metric_log.format_values(rows.measures(row)))
        yield row


def load_extractor(evaluation: ConfigDict) -> extractors.Extractor:
    """That of `config.evaluate`, else of its reference.   Raises: as `extractors.load`."""
    return extractors.load(
        evaluation.extractor or references.default_extractor(evaluation.reference),
        evaluation.weights and files.to_path(evaluation.weights, "evaluate.weights"),
    )


def state(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path) -> str:
    """'waiting', 'begun', 'failed' or 'done', of this very cell.

    One of another config has only begun, as has one that was done and has lost rows or pictures.
    """
    found = _read(directory)
    if not found:
        return "waiting"
    if found["digest"] != _digest(cell, evaluation):
        return "begun"
    return "begun" if found["state"] == "done" and _lost(found, directory) else found["state"]


def _lost(found, directory):
    """The pictures of a cell's record without a row or a file."""
    pictures = found.get("pictures", ())  # none without evaluations, or of an older version
    kept = rows.read(directory / "evaluations.jsonl") if pictures else []
    named = {row.get("picture") for row in kept}
    return [name for name in pictures if name not in named or not (directory / name).is_file()]


def error(directory: pathlib.Path) -> str:
    """What made the cell fail."""
    return _read(directory).get("error") or "no message"


def record_failure(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path, error: str):
    """Of a process that could not do so itself."""
    if state(cell, evaluation, directory) != "failed":
        _write(cell, evaluation, directory, "failed", _read(directory) | {"error": error})


def forget_failure(cell: grid.Cell, evaluation: ConfigDict, directory: pathlib.Path) -> None:
    """A cell that failed has begun: it is to be tried again."""
    if state(cell, evaluation, directory) == "failed":
        _write(cell, evaluation, directory, "begun", _read(directory))


def _digest(cell, evaluation):
    parts = cell.config.to_dict(), cell.steps, evaluation.to_dict()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read(directory):
    """The record of a cell; {} if there is none, or a damaged one, which is made again."""
    try:
        return record.read(directory) if (directory / record.FILE).is_file() else {}
    except ValueError as error:
        logger.warning("%s; the cell begins where its checkpoints end.", error)
        return {}


def _write(cell, evaluation, directory, state, more):
    names = {"name": cell.name, "grid": cell.grid, "size": cell.size, "steps": cell.steps}
    names |= {"axes": cell.axes, "digest": _digest(cell, evaluation), "state": state}
    text = json.dumps(more | names, indent=2) + "\n"
    files.replace_text(directory / record.FILE, text)


def busy(directory: pathlib.Path) -> bool:
    """Whether a process runs the cell."""
    return locks.is_held(directory / LOCK)
