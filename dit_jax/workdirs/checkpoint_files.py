"""The complete checkpoints in a workdir: their steps, and the paths of their JSON items."""

import pathlib
import re


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in ascending order."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return []
    # Orbax renames a checkpoint's directory to its step when the checkpoint is complete.
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def newest_first(workdir: pathlib.Path, item: str) -> list[pathlib.Path]:
    """Returns the paths of a JSON item in all checkpoints, the newest first."""
    steps = saved_steps(workdir)[::-1]
    return [workdir / "checkpoints" / str(step) / item / "metadata" for step in steps]
