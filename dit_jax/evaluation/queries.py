"""Queries of evaluations.jsonl: rows of several files, their values by name, and --where."""

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
    """Returns the rows of files or globs.

    Each row gets 'workdir', the shortest distinct name of its workdir, and 'place', its file and
    number.
    Raises: FileNotFoundError for a pattern without a file.
    """
    paths = []
    for pattern in patterns:
        literal = pathlib.Path(pattern).is_file()  # a file's name may look like a glob
        matches = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise MissingFileError(
                f"no file {pattern}: python -m dit_jax.evaluate --workdir DIR writes "
                "DIR/evaluations.jsonl."
            )
        paths += [path for path in matches if path not in paths]
    names = _shorten([_directory(path) for path in paths])
    return [
        {**row, "workdir": name, "place": f"{path} row {i}"}
        for path, name in zip(paths, names, strict=True)
        for i, row in enumerate(
            json_files.read_json_lines(pathlib.Path(path), row_schema.list_invalid_keys), 1
        )
    ]


def _directory(path):
    """Returns the parts of the path of the workdir, or of the images, that a file belongs to.

    A workdir's file is evaluations.jsonl. That of images is NAME.evaluations.jsonl beside them.
    """
    path = pathlib.Path(path).absolute()
    if path.name == "evaluations.jsonl":
        return path.parent.parts
    return path.with_name(path.name.removesuffix(".evaluations.jsonl")).parts


def _shorten(directories):
    """Returns a name for each directory: as few of its last parts as make all distinct."""
    for count in range(1, max(map(len, directories)) + 1):
        names = ["/".join(parts[-count:]) for parts in directories]
        if len(set(names)) == len(names):
            break
    return names


def get_value(row: dict, name: str):
    """Returns a row's value, such as 'fid', or a setting, such as 'steps'; None if it has neither.

    A dot leads into an object: 'reference.digest'.
    """
    outer, dot, inner = name.partition(".")
    value = row.get(outer, get_settings(row).get(outer))
    if dot:
        value = value.get(inner) if isinstance(value, dict) else None
    return None if isinstance(value, dict) else value


def get_settings(row: dict) -> dict:
    """Returns how a row was measured, without settings that its sampler or grid ignores."""
    if "samples" in row:  # images without a run; they give their file its name
        return {"num": row["samples"]["num"]}
    if "sample" not in row:
        likelihood = row.get("likelihood", {})
        return likelihood and {"clip_x_0": False, **likelihood}  # older rows lack it
    sample = {"guide": None, "guide_step": None, **workdirs.upgrade_sample(row["sample"])}
    # Otherwise rows that differ in an ignored setting would become different curves.
    for key in list(sample):
        for chooser, users in samplers.find_users(key).items():
            if sample.get(chooser) not in users:
                sample.pop(key, None)
    return sample


def select(rows: list[dict], condition: str) -> list[dict]:
    """Returns the rows that meet a condition of --where, such as 'num=50000,sampler=ddpm'.

    Raises: ValueError for a condition of another form, a name that no row has, or if no row is
      left.
    """
    # A comma separates conditions only before another name: values may have commas too.
    for part in re.split(r",(?=[\w.]+=)", condition):
        name, equals, expected = part.partition("=")
        if not equals:
            raise UserError(f"--where={condition}: {part!r} is no NAME=VALUE.")
        known = {to_text(get_value(row, name)): None for row in rows}
        if set(known) == {"none"}:
            raise UserError(f"no row has {name!r} of --where. They have {list_names(rows)}.")
        rows = [row for row in rows if _equals(get_value(row, name), expected)]
        if not rows:
            raise UserError(f"no row has {part}: the rows have {name} {', '.join(known)}.")
    return rows


def _equals(value, text):
    """Returns whether a value equals the text that a user typed; numbers compare as numbers."""
    if not is_number(value):
        return to_text(value).lower() == text.lower()
    try:
        return float(text) == value
    except ValueError:
        return False


def is_number(value: object) -> bool:
    """Returns whether a value is a number. True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_text(value) -> str:
    """Returns a value as a user types it in --where."""
    if isinstance(value, list):
        return ",".join(map(to_text, value))
    if is_number(value):
        return f"{value:.10g}"
    return value if isinstance(value, str) else str(value).lower()


def list_names(rows: list[dict]) -> str:
    """Returns the names that --where, --x and --y accept for these rows, for messages."""
    names = {name: None for row in rows for name in (*row, *get_settings(row))}
    known = [name for name in names if any(get_value(row, name) is not None for row in rows)]
    return ", ".join(sorted(set(known) - {"place", "git_revision", "picture"}))
