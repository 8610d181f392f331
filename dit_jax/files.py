"""Files that are there whole or not at all."""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import BinaryIO

logger = logging.getLogger("dit_jax")


def replace(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """What `write(file)` writes becomes the file, whole or not at all.   Raises: OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """As `replace`, of a text, as UTF-8."""
    replace(path, lambda file: file.write(text.encode()))


def read_json(path: pathlib.Path) -> object:
    """The JSON in a file.   Raises: OSError; ValueError that names the file and the damage."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_json_lines(path: pathlib.Path, keys: Mapping[str, type] | None = None) -> list[dict]:
    """The objects in a JSON-lines file; [] if there is no such file.

    Lines that are damaged, or lack one of the keys with its type, are left out and counted in a
    warning. So is a last line that a kill or a full disk cut short, without a warning.
    """
    rows, damaged = [], []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if any(type(row[key]) is not kind for key, kind in (keys or {}).items()):
                raise ValueError
            rows.append(dict(row))
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.strip() and number < len(lines):
                damaged.append(number)
    if damaged:
        logger.warning(
            "%d damaged lines of %s are left out, the first is line %d.",
            len(damaged),
            path,
            damaged[0],
        )
    return rows
