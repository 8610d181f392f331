"""What a run leaves beside its arrays: the steps saved, and data.json."""

import json
import logging
import pathlib
import re

from dit_jax import sharding
from dit_jax.data import manifest
from dit_jax.system import files, json_files

logger = logging.getLogger("dit_jax")


def write_data(workdir: pathlib.Path, data: dict) -> None:
    """Writes data.json: the identities of the data that the run is made of, by split.

    Raises: OSError.
    """

    def write():
        text = json.dumps(manifest.with_digest(data), indent=1) + "\n"
        files.replace_text(workdir / "data.json", text)

    sharding.in_first_process(write, f"cannot write to the workdir {workdir}")


def load_data(workdir: pathlib.Path) -> dict:
    """What `write_data` wrote; where that is lost, what the newest checkpoint keeps of it.

    {} of a workdir that an older version wrote, or that was converted.
    Raises: files.LostError if the workdir is not there: it was moved.
    """
    files.Directory(workdir)
    path = workdir / "data.json"
    for candidate in [path, *newest_first(workdir, "data")]:
        try:
            data = json_files.read_json(candidate, "the identities of a run's data")
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
    """The paths of a JSON item of the checkpoints."""
    return [
        workdir / "checkpoints" / str(step) / item / "metadata"
        for step in saved_steps(workdir)[::-1]
    ]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints, ascending; directories of other names are none."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
