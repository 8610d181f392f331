"""Queries of evaluations.jsonl files: reading rows, selecting them by --where, values by name."""

import glob
import pathlib
import re
from collections.abc import Iterable

from dit_jax import workdirs
from dit_jax.diffusion import samplers
from dit_jax.errors import MissingFileError, UserError
from dit_jax.evaluation import row_schema
from dit_jax.system import json_files


def read(patterns: Iterable[str]) -> list[dict]:
    """Reads the rows of files or globs.

    Each row gets 'workdir', the shortest name that distinguishes its workdir from the others, and
    'place', its file and row number.
    Raises: FileNotFoundError for a pattern that matches no file.
    """
    paths = []
    for pattern in patterns:
        is_file = pathlib.Path(pattern).is_file()  # a file's name may look like a glob
        matches = [pattern] if is_file else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise MissingFileError(
                f"there is no file {pattern}. python -m dit_jax.evaluate --workdir DIR writes "
                "DIR/evaluations.jsonl."
            )
        paths += [path for path in matches if path not in paths]
    names = _make_short_names([_get_directory_parts(path) for path in paths])
    return [
        {**row, "workdir": name, "place": f"{path} row {i}"}
        for path, name in zip(paths, names, strict=True)
        for i, row in enumerate(
            json_files.read_json_lines(pathlib.Path(path), row_schema.list_invalid_keys), 1
        )
    ]


def _get_directory_parts(path):
    """Returns the path of a file's workdir or images, as a tuple of its parts.

    A workdir has a file evaluations.jsonl. Images have NAME.evaluations.jsonl beside them.
    """
    path = pathlib.Path(path).absolute()
    if path.name == "evaluations.jsonl":
        return path.parent.parts
    return path.with_name(path.name.removesuffix(".evaluations.jsonl")).parts


def _make_short_names(directories):
    """Returns a name for each directory: its last parts, as few as make all names distinct."""
    for count in range(1, max(map(len, directories)) + 1):
        names = ["/".join(parts[-count:]) for parts in directories]
        if len(set(names)) == len(names):
            break
    return names


def get_value(row: dict, name: str):
    """Returns the value of a row's key, such as 'fid', or setting, such as 'steps'; else None.

    Args: name, with a dot for a key of an object, such as 'reference.digest'.
    """
    outer, dot, inner = name.partition(".")
    value = row.get(outer, get_settings(row).get(outer))
    if dot:
        value = value.get(inner) if isinstance(value, dict) else None
    return None if isinstance(value, dict) else value


def get_settings(row: dict) -> dict:
    """Returns the settings of a measurement, without those that its sampler or grid ignores."""
    if "samples" in row:  # images that no run drew
        return {"num": row["samples"]["num"]}
    if "sample" not in row:
        likelihood = row.get("likelihood")
        # Older versions did not clip, and their rows do not have the setting.
        return {"clip_x_0": False, **likelihood} if likelihood else {}
    sample = {"guide": None, "guide_step": None, **workdirs.upgrade_sample(row["sample"])}
    # An ignored setting must not make two curves of one.
    for key in list(sample):
        for chooser, users in samplers.find_users(key).items():
            if sample.get(chooser) not in users:
                sample.pop(key, None)
    return sample


def select(rows: list[dict], condition: str) -> list[dict]:
    """Returns the rows that meet a condition of --where, such as 'num=50000,sampler=ddpm'.

    Raises: ValueError for a condition of another form, for a name that no row has, or if no row
      meets the condition.
    """
    # Values may have commas too, so a comma separates conditions only before another NAME=.
    for part in re.split(r",(?=[\w.]+=)", condition):
        name, equals, expected = part.partition("=")
        if not equals:
            raise UserError(f"--where={condition}: {part!r} is not of the form NAME=VALUE.")
        values = {to_text(get_value(row, name)): None for row in rows}  # in order, each once
        if set(values) == {"none"}:
            raise UserError(f"no row has {name!r} of --where. The rows have {list_names(rows)}.")
        rows = [row for row in rows if _equals(get_value(row, name), expected)]
        if not rows:
            raise UserError(f"no row has {part}. The rows have {name} {', '.join(values)}.")
    return rows


def _equals(value, text):
    """Returns whether a value equals the text that a user typed; numbers are compared as such."""
    if not is_number(value):
        return to_text(value).lower() == text.lower()
    try:
        return float(text) == value
    except ValueError:
        return False


def is_number(value: object) -> bool:
    """Returns whether a value is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_text(value) -> str:
    """Returns a value as a user types it in --where."""
    if isinstance(value, list):
        return ",".join(map(to_text, value))
    if is_number(value):
        return f"{value:.10g}"
    return value if isinstance(value, str) else str(value).lower()


def list_names(rows: list[dict]) -> str:
    """Returns the names that --where, --x and --y accept for these rows, separated by commas."""
    names = {name for row in rows for name in (*row, *get_settings(row))}
    names -= {"place", "git_revision", "picture"}
    present = [name for name in names if any(get_value(row, name) is not None for row in rows)]
    return ", ".join(sorted(present))
