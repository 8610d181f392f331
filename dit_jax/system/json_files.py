"""Safe reader for JSON files that may be damaged: sizes are bounded, errors name the position."""

import collections
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")
MAX_BYTES = 64 * 2**20  # of a file or a line
MAX_DEPTH = 100  # of nested lists and objects
MAX_LINES_BYTES = 256 * 2**20  # of all rows of a file; a row counts as MIN_ROW_BYTES or more
MIN_ROW_BYTES = 64  # in memory even {} takes as many


def read_bytes(path: pathlib.Path, limit: int = MAX_BYTES) -> bytes:
    """Returns the first `limit` bytes of a file.

    Raises: OSError; FileNotFoundError also for a pipe or a device, which may never end.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {files.printable(path)}.")
    with path.open("rb") as file:
        return file.read(limit)


def read_json(path: pathlib.Path, expected: str) -> Any:
    """Reads a JSON file that may be damaged.

    Args:
      expected: completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `parse_json`.
    """
    if not path.is_file():
        raise MissingFileError(f"no {files.printable(path)}: it must be {expected}.")
    # One byte more than the limit, so that parse_json refuses a longer file.
    contents = files.read_or_explain(path, lambda path: read_bytes(path, MAX_BYTES + 1))
    return parse_json(contents, files.printable(path), expected)


def read_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a file, each with its newline.

    A longer line than MAX_BYTES is cut to MAX_BYTES + 1 and a newline, so `parse_json` refuses it.
    """
    with path.open("rb", buffering=2**20) as file:  # a long line is read in parts of this size
        while line := file.readline(MAX_BYTES + 1):
            part = line
            # The remainder of a long line is read part by part, so it is never whole in memory.
            while len(part) > MAX_BYTES and not part.endswith(b"\n"):
                part = file.readline(MAX_BYTES + 1)
            is_cut = part.endswith(b"\n") and not line.endswith(b"\n")
            yield line + b"\n" if is_cut else line


def read_json_lines(
    path: pathlib.Path, list_invalid_keys: Callable[[dict], list[str]] = lambda row: []
) -> list[dict]:
    """Reads the objects in a JSON-lines file; returns [] if the file does not exist.

    Damaged lines are skipped, and one warning counts them. A last line that a kill or a full disk
    cut short has no newline; such a line is skipped without a warning.

    Args:
      list_invalid_keys: returns the keys of an object with wrong values. A line whose object has
        such a key is damaged.
    Raises: OSError; ValueError if the rows take more than MAX_LINES_BYTES.
    """
    rows, num_bytes, num_damaged, first_damaged = [], 0, 0, ""
    lines = read_lines(path) if path.is_file() else ()
    for line_number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line.removesuffix(b"\n"), "", "")
            if not isinstance(row, dict):
                raise UserError
        except ValueError:
            # A blank line is harmless; an incomplete last line is expected after a kill.
            if line.strip() and line.endswith(b"\n"):
                num_damaged += 1
                first_damaged = first_damaged or f"{line_number}"
            continue
        if keys := list_invalid_keys(row):
            num_damaged += 1
            first_damaged = first_damaged or f"{line_number}, with a wrong {files.list_some(keys)}"
            continue
        rows.append(row)
        # All rows stay in memory, so their total size is bounded.
        num_bytes += max(len(line), MIN_ROW_BYTES)
        if num_bytes > MAX_LINES_BYTES:
            raise UserError(
                f"{files.printable(path)} has more than {MAX_LINES_BYTES // 2**20} MiB of lines: "
                f"line {line_number} exceeds this limit. Keep only the lines that you need."
            )
    # One warning for all damaged lines, or a large file could flood the log.
    if num_damaged:
        text = "%d damaged lines of %s are left out, the first is line %s."
        logger.warning(text, num_damaged, files.printable(path), first_damaged)
    return rows


def parse_json(contents: bytes | str, name: str, expected: str) -> Any:
    """Returns the value of a JSON text; NaN and infinities are accepted, as in Python's json.

    Args:
      name: the source of the text, for messages.
      expected: completes "It must be ..." in messages.
    Raises: ValueError for invalid JSON, a duplicate key, or more than MAX_BYTES or MAX_DEPTH.
    """
    try:
        if len(contents) > MAX_BYTES:
            raise UserError(f"it has more than {MAX_BYTES // 2**20} MiB")
        text = contents if isinstance(contents, str) else contents.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_to_dict)
        if isinstance(value, dict | list) and _is_nested_deeper(value, MAX_DEPTH):
            raise RecursionError
        return value
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        reason = f"it is not in UTF-8, with {byte!r} at byte {error.start}"
    except json.JSONDecodeError as error:
        # A file that was cut short fails at its end or inside a string.
        is_cut = error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
        position = "it ends too early" if is_cut else f"line {error.lineno}, column {error.colno}"
        reason = f"{position}: {error.msg}"
    except RecursionError:
        reason = f"it is nested more than {MAX_DEPTH} deep"
    except ValueError as error:  # a UserError from above, or a number with too many digits
        reason = str(error).partition(";")[0]
    raise UserError(f"cannot read {name}: {reason}. It must be {expected}.")


def _to_dict(pairs):
    """Returns a JSON object as a dict.   Raises: ValueError for a duplicate key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"the key {key[:100]!r} is in one object twice")
    return value


def _is_nested_deeper(value, depth):
    """Returns whether lists and objects are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        groups = [value.values() if isinstance(value, dict) else value for value in level]
        level = [child for group in groups for child in group if isinstance(child, dict | list)]
        if not level:  # for speed: most values are flat, and a file may have a million lines
            break
    return bool(level)
