"""JSON rows of measurements: the checkpoint, the settings, the code and the measured values."""

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

ROUNDING = 1e-3  # the most that rounding may take a measure below 0


def describe_checkpoint(trained: runs.Trained, kind: str, settings: dict) -> dict:
    """Returns the part of a row before its measures: checkpoint, {kind: settings} and code."""
    config, counts = trained.config, models.count(trained.config)
    images_seen = trained.step * config.batch_size
    return {
        "step": trained.step,
        "params_digest": digests.digest(trained.params),
        kind: _convert_to_json(settings),
        "params": counts["params"],
        "gmacs": counts["gmacs"],
        "images_seen": images_seen,
        "train_gflops": images_seen * counts["train_gflops_per_image"],
        **describe_code(),
    }


def _convert_to_json(row):
    """Returns a row as it will be read back from JSON, which has lists for tuples."""
    return json.loads(json.dumps(row))


def describe_code() -> dict:
    """Returns what samples depend on besides checkpoint and settings: device, versions, code."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "git_revision": get_git_revision(),
    }


def get_name(row: dict) -> str:
    """Returns a name for the files of a row without measures: its step and a digest."""
    # Two revisions share the name, so that `batch_cache.BatchCache` can report the difference.
    digested = {key: value for key, value in row.items() if key != "git_revision"}
    digest = hashlib.sha256(json.dumps(digested, sort_keys=True).encode()).hexdigest()[:8]
    return f"{row['step']}-{digest}" if "step" in row else digest


def hold(path: pathlib.Path, row: dict) -> contextlib.AbstractContextManager[locks.Lock]:
    """Locks a row without measures, so that no other command measures the same row.

    Raises: OSError as `locks.hold`; files.LostError if the file's directory does not exist.
    """
    directory = path.with_suffix("")
    # A directory that was moved while the model was loaded must not be created again.
    if not path.parent.is_dir():
        raise files.LostError.for_directory(path.parent)
    for target in (path, directory):
        if target.is_symlink():
            raise UserFileError(
                f"{files.printable(target)} is a link, and links are not written to. Remove it."
            )
    return locks.hold(directory / f"{get_name(row)}.lock")


def read(path: pathlib.Path) -> list[dict]:
    """Reads the rows of an evaluations.jsonl, and warns of damaged rows, which are left out."""
    return json_files.read_json_lines(path, row_schema.list_invalid_keys)


def find(path: pathlib.Path, row: dict) -> dict | None:
    """Returns the row of a file that has all values of `row` and its measures, or None.

    The first process reads for all. No row matches if the code has uncommitted changes.
    """
    row = _convert_to_json(row)

    def match():
        candidates = [] if "-dirty" in row["git_revision"] else read(path)
        return next((match for match in candidates if row.items() <= match.items()), None)

    return sharding.broadcast_result(match)


def get_measures(row: dict) -> dict[str, float]:
    """Returns the measures in a row of samples, without the run's training speed."""
    # The keys after 'picture' are the measures.
    names = list(row)[list(row).index("picture") + 1 :]
    return {name: row[name] for name in names if name not in ("img_per_s", "seconds")}


def check(measured: dict[str, float | None]) -> None:
    """Checks the measures of a row before it is written.

    Raises: FloatingPointError for values that are not finite, or that are below zero by more than
      rounding.
    """

    def is_possible(name, value):
        measure = measures.find(name)
        may_be_negative = measure and measure.may_be_negative
        return value is None or (math.isfinite(value) and (may_be_negative or value > -ROUNDING))

    impossible = [
        f"{name} {value}" for name, value in measured.items() if not is_possible(name, value)
    ]
    if impossible:
        raise FloatingPointError(
            f"measured the impossible values {', '.join(impossible)}, so no row is written. Are "
            "the losses of the checkpoint finite? Are the reference and the extractor's weights "
            "undamaged?"
        )


def append(path: pathlib.Path, row: dict) -> None:
    """Appends the row as a new line, even if the last line of the file is incomplete.

    Raises: OSError, with the row in its message, if the file cannot be written.
    """
    try:
        with files.open_to_write(path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # the caller removes the batches next
    except OSError as error:
        raise UserFileError(f"cannot write {path}: {error}\nMeasured: {json.dumps(row)}") from error


def get_git_revision() -> str:
    """Returns the commit of this code, and '-dirty-' and a digest of uncommitted changes.

    Without git or a repository, returns the version of the installed package.
    Raises: OSError if git fails.
    """
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return importlib.metadata.version("dit_jax")

    def run_git(*arguments):
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
        if result.returncode:
            raise UserFileError(
                f"git {arguments[0]} in {root} failed, so rows cannot have the revision of the "
                f"code: {result.stderr.decode().strip()}"
            )
        return result.stdout

    changes = run_git("diff", "HEAD", "--no-ext-diff")
    suffix = f"-dirty-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else ""
    return run_git("rev-parse", "HEAD").decode().strip() + suffix
