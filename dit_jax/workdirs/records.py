"""Records in a workdir: the steps of its checkpoints, and data.json."""

import json
import logging
import pathlib
import re

from dit_jax import sharding
from dit_jax.data import manifest
from dit_jax.system import files, json_files

logger = logging.getLogger("dit_jax")


def write_data(workdir: pathlib.Path, data: dict) -> None:
    """Writes data.json: {split: identity} of the data that the run is trained on.

    All processes must call this; the first one writes.
    Raises: OSError, in all processes.
    """

    def write():
        text = json.dumps(manifest.with_digest(data), indent=1) + "\n"
        files.replace_text(workdir / "data.json", text)

    sharding.in_first_process(write, f"cannot write to the workdir {workdir}")


def load_data(workdir: pathlib.Path) -> dict:
    """Returns the data that `write_data` wrote, from data.json or else from a checkpoint.

    If data.json is missing or damaged, the newest checkpoint with a readable copy is used.
    Returns: {split: identity}; {} if the workdir was converted, or written by an older version.
    Raises: files.LostError if the workdir does not exist, because it was moved.
    """
    # Otherwise a workdir that was moved would look like one without records.
    files.Directory(workdir)
    path = workdir / "data.json"
    for candidate in [path, *newest_first(workdir, "data")]:
        try:
            data = json_files.read_json(candidate, "the identities of a run's data")
            # Only data.json contains a digest of its values.
            data = (
                manifest.without_digest(data, path) if candidate == path else data.get("data", {})
            )
            manifest.check_identities(data, candidate)
            return data
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s is not used: %s", candidate.relative_to(workdir), error)
    return {}


def newest_first(workdir, item):
    """Returns the paths of a JSON item in all checkpoints, the newest first."""
    return [
        workdir / "checkpoints" / str(step) / item / "metadata"
        for step in saved_steps(workdir)[::-1]
    ]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in ascending order."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return []
    # Orbax writes to a directory with another name and renames it when the checkpoint is complete.
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
