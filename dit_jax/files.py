"""Files that are there whole or not at all."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import BinaryIO


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
