"""JSON rows of measurements: what was measured, of which checkpoint, by which code."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import subprocess

import jax

from dit_jax import models, sharding
from dit_jax.errors import UserFileError
from dit_jax.evaluation import measures, row_schema
from dit_jax.sampling import runs
from dit_jax.system import files, json_files, locks
from dit_jax.workdirs import digests

ROUNDING = 1e-3  # how far below 0 a measure may be that cannot be negative


def describe_checkpoint(trained: runs.Trained, kind: str, settings: dict) -> dict:
    """Returns the part of a row about a checkpoint and how it is measured, {kind: settings}."""
    config, counts = trained.config, models.count(trained.config)
    images_seen = trained.step * config.batch_size
    return {
        "step": trained.step,
        "params_digest": digests.digest(trained.params),
        kind: json.loads(json.dumps(settings)),  # as it will be read back: a tuple becomes a list
        "params": counts["params"],
        "gmacs": counts["gmacs"],
        "images_seen": images_seen,
        "train_gflops": images_seen * counts["train_gflops_per_image"],
        **describe_code(),
    }


def describe_code() -> dict:
    """Returns device, library versions and code revision; samples may differ between them."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "git_revision": git_revision(),
    }


def get_name(row: dict) -> str:
    """Returns the name of a row without measures in file names: its step, and a digest."""
    # The revision is left out: `batch_cache.BatchCache` compares it, and reports a difference.
    known = {key: value for key, value in row.items() if key != "git_revision"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    return f"{row['step']}-{digest}" if "step" in row else digest


def hold(path: pathlib.Path, row: dict) -> contextlib.AbstractContextManager[locks.Lock]:
    """Locks a row without measures, so that no two commands measure the same. Others may go on.

    Raises: OSError as `locks.hold`; files.LostError if the file's directory has gone.
    """
    directory = path.with_suffix("")
    if not path.parent.is_dir():  # moved while the model was loaded: it is not created again
        raise files.LostError.for_directory(path.parent)
    for target in (path, directory):
        if target.is_symlink():
            raise UserFileError(
                f"{files.printable(target)} is a link, which is not written to: remove it."
            )
    return locks.hold(directory / f"{get_name(row)}.lock")


def read(path: pathlib.Path) -> list[dict]:
    """Returns the rows of an evaluations.jsonl without damaged ones, which a warning counts."""
    return json_files.read_json_lines(path, row_schema.list_invalid_keys)


def find(path: pathlib.Path, row: dict) -> dict | None:
    """Returns the row of a file that has all values of this one, and its measures; else None.

    The first process reads for all. A row of code with uncommitted changes is never returned.
    """
    row = json.loads(json.dumps(row))  # the file has lists for tuples

    def match():
        rows = [] if "-dirty" in row["git_revision"] else read(path)
        return next((r for r in rows if row.items() <= r.items()), None)

    return sharding.broadcast_result(match)


def get_measures(row: dict) -> dict[str, float]:
    """Returns the measures in a row of samples, without the run's training speed."""
    # The keys after 'picture' are the measures.
    names = list(row)[list(row).index("picture") + 1 :]
    return {name: row[name] for name in names if name not in ("img_per_s", "seconds")}


def check(measured: dict[str, float | None]) -> None:
    """Raises unless the measures have possible values. Called before a row with them is written.

    Raises: FloatingPointError for values that are not finite, or below zero beyond rounding.
    """

    def is_possible(name, value):
        measure = measures.find(name)
        signed = measure and measure.may_be_negative
        return value is None or (math.isfinite(value) and (signed or value > -ROUNDING))

    wrong = [f"{name} {value}" for name, value in measured.items() if not is_possible(name, value)]
    if wrong:
        raise FloatingPointError(
            f"measured {', '.join(wrong)}, which cannot be, so no row is written. Are the losses "
            "of the checkpoint finite, and the reference and the extractor's weights whole?"
        )


def append(path: pathlib.Path, row: dict) -> None:
    """Appends the row as a line of its own, even if the last line was cut short.

    Raises: OSError with the measures in its message.
    """
    try:
        with files.open_to_write(path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # the caller may now remove the batches
    except OSError as error:
        raise UserFileError(f"cannot write {path}: {error}\nMeasured: {json.dumps(row)}") from error


def git_revision() -> str:
    """Returns the commit of this code, with '-dirty-' and a digest if there are changes.

    An installation without git returns its version.
    Raises: OSError if git is there but fails.
    """
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return importlib.metadata.version("dit_jax")

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
        if done.returncode:
            raise UserFileError(
                f"git {arguments[0]} in {root} failed, so that rows cannot say which code they are "
                f"of: {done.stderr.decode().strip()}"
            )
        return done.stdout

    changes = git("diff", "HEAD", "--no-ext-diff")
    digest = f"-dirty-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else ""
    return git("rev-parse", "HEAD").decode().strip() + digest
