"""Checks of fields in the JSON files beside weights. Their values may have any type and size."""

import pathlib

from dit_jax.errors import UserError
from dit_jax.system import files, json_files

MOST = 2**20  # the largest size of a model, such as a width
MOST_LAYERS = 1000
MOST_NUMBER = 1e30


def read(path: pathlib.Path, what: str) -> dict:
    """Returns the fields of a JSON file.

    Args:
      what: completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `json_files.read_json`, or if it is no object.
    """
    value = json_files.read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(
            f"cannot read {files.printable(path)}: it holds a {type(value).__name__} instead of "
            f"fields with names. It must be {what}."
        )
    return value


def is_count(value: object, most: int = MOST) -> bool:
    """Returns whether a value is a whole number from 1 to `most`."""
    # Not isinstance: True is an int too.
    return type(value) is int and 0 < value <= most


def is_number(value: object) -> bool:
    """Returns whether a value is a number of a magnitude below MOST_NUMBER.

    So it is finite, and a whole number can be converted to a float.
    """
    return type(value) in (int, float) and abs(value) < MOST_NUMBER


def refuse_pipeline(directory: pathlib.Path, part: str) -> None:
    """Raises if a directory is a whole pipeline of diffusers.

    Args:
      part: the name of the subdirectory that should have been given.
    Raises: ValueError with the commands that take the pipeline.
    """
    if (directory / "model_index.json").is_file():
        shown = files.printable(directory)
        raise UserError(
            f"{shown} is a whole pipeline: `convert sd {shown} DST` takes all of it, "
            f"`convert {part} {shown}/{part} DST` its {part} alone."
        )


def list_wrong(found: dict, wrong: dict, most: int = 20) -> str:
    """Returns a line for each wrong field, with its value and what is supported.

    Args:
      found: field -> value.
      wrong: field -> what is supported.
      most: the number of fields to list; the others are counted.
    """
    lines = [
        f"  {show(name)}={show(repr(found.get(name)))}; supported: {what}"
        for name, what in list(wrong.items())[:most]
    ]
    if len(wrong) > most:
        lines.append(f"  and {len(wrong) - most:,} more")
    return "\n".join(lines)


def show(value: object, most: int = 300) -> str:
    """Returns a value for messages, cut after `most` characters.

    A string is shown as it is, any other value as Python's repr.
    """
    text = files.printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= most else f"{text[:most]}..."
