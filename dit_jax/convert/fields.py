"""Fields of the JSON files beside weights, whose values may be of any type and size."""

import pathlib

from dit_jax.errors import UserError
from dit_jax.system import files, json_files

MOST = 2**20  # of a size of a model
MOST_LAYERS = 1000
MOST_NUMBER = 1e30


def read(path: pathlib.Path, what: str) -> dict:
    """The fields of a JSON file.

    Args: what, completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `files.read_json`, or for what is no object.
    """
    found = json_files.read_json(path, what)
    if not isinstance(found, dict):
        raise UserError(
            f"cannot read {files.printable(path)}: it holds a {type(found).__name__} instead of "
            f"fields with names. It must be {what}."
        )
    return found


def is_count(value: object, most: int = MOST) -> bool:
    """Whether a value is a whole number from 1 to `most`."""
    return type(value) is int and 0 < value <= most


def is_number(value: object) -> bool:
    """Whether a value is a finite number; of whole ones, one that is a float too."""
    return type(value) in (int, float) and abs(value) < MOST_NUMBER


def refuse_pipeline(directory: pathlib.Path, part: str) -> None:
    """Demands that a directory is no whole pipeline of diffusers.

    Args: part, the directory in a pipeline that is wanted.
    Raises: ValueError with the commands that take it.
    """
    if (directory / "model_index.json").is_file():
        shown = files.printable(directory)
        raise UserError(
            f"{shown} is a whole pipeline: `convert sd {shown} DST` takes all of it, "
            f"`convert {part} {shown}/{part} DST` its {part} alone."
        )


def list_wrong(found: dict, wrong: dict, most: int = 20) -> str:
    """A line for each wrong field, with its value and what is supported; the first of many."""
    lines = [
        f"  {show(name)}={show(repr(found.get(name)))}; supported: {what}"
        for name, what in list(wrong.items())[:most]
    ]
    if len(wrong) > most:
        lines.append(f"  and {len(wrong) - most:,} more")
    return "\n".join(lines)


def show(value: object, most: int = 300) -> str:
    """A value for messages: a text as it is, others as Python writes them; cut if it is long."""
    text = files.printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= most else f"{text[:most]}..."
