"""The JSON row of a measurement: what was measured, of which checkpoint, by which code."""

import importlib.metadata
import json
import pathlib
import shutil
import subprocess

from ml_collections import ConfigDict

from dit_jax import flops, metrics, sharding


def of_checkpoint(config: ConfigDict, step: int, kind: str, settings: dict) -> dict:
    """What a row says of a checkpoint, and of how it is measured: {kind: settings}."""
    counts, images_seen = flops.count(config), step * config.batch_size
    return {
        "step": step,
        kind: json.loads(json.dumps(settings)),  # as it will be read back
        "params": counts["params"],
        "gmacs": counts["gmacs"],
        "images_seen": images_seen,
        "train_gflops": images_seen * counts["train_gflops_per_image"],
        "git_revision": git_revision(),
    }


def find(path: pathlib.Path, row: dict) -> dict | None:
    """The row of a JSON-lines file that has all of this one's values, and so its measures.

    In every process the first one's; never one that code with uncommitted changes has measured.
    """
    row = json.loads(json.dumps(row))  # tuples are lists there
    found = None
    if not row["git_revision"].endswith("-dirty"):
        rows = metrics.read_json_lines(path)
        found = next((r for r in rows if row.items() <= r.items()), None)
    return json.loads(sharding.from_first_process(json.dumps(found)))


def append(path: pathlib.Path, row: dict) -> None:
    """Adds the row as a line of its own, also after one that was cut short.

    Raises: OSError that tells what was measured.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * cut + json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}\nMeasured: {json.dumps(row)}") from error


def git_revision() -> str:
    """The commit of this code, with '-dirty' if it has changes; of an installation its version."""
    root = pathlib.Path(__file__).parents[1]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if (root / ".git").exists() and shutil.which("git"):
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    return importlib.metadata.version("dit_jax")
