"""Safe reader of JSON files that may be damaged: sizes are bounded and errors say where."""

import collections
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")
MAX_BYTES = 64 * 2**20
MAX_DEPTH = 100
MAX_LINES_BYTES = 256 * 2**20  # of all lines kept from a file; a line counts 64 or more


def read_bytes(path: pathlib.Path, limit: int = MAX_BYTES) -> bytes:
    """Returns the first `limit` bytes of a file.

    Raises: OSError; FileNotFoundError also for a pipe or a device, whose data may never end.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {files.printable(path)}.")
    with path.open("rb") as file:
        return file.read(limit)


def read_json(path: pathlib.Path, what: str) -> Any:
    """Reads a JSON file that may be damaged.

    Args:
      what: completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `parse_json`.
    """
    if not path.is_file():
        raise MissingFileError(f"no {files.printable(path)}: it must be {what}.")
    # One byte more than the limit, so that parse_json sees the excess.
    contents = files.read_or_explain(path, lambda path: read_bytes(path, MAX_BYTES + 1))
    return parse_json(contents, files.printable(path), what)


def read_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a file, each with its newline.

    A line longer than MAX_BYTES is cut to one byte more and its newline: `parse_json` refuses it.
    """
    with path.open("rb", buffering=2**20) as file:  # long lines come in parts of this size
        while line := file.readline(MAX_BYTES + 1):
            rest = line
            # Skips the remainder of a line that is too long, without keeping it in memory.
            while len(rest) > MAX_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_BYTES + 1)
            ended = rest.endswith(b"\n") and not line.endswith(b"\n")
            yield line + b"\n" * ended


def read_json_lines(
    path: pathlib.Path, list_invalid_keys: Callable[[dict], list[str]] = lambda row: []
) -> list[dict]:
    """Reads the objects in a JSON-lines file; returns [] if the file does not exist.

    Damaged lines are skipped, and a warning counts them. A last line that a kill or a full disk cut
    short has no newline; it is skipped without a warning.

    Args:
      list_invalid_keys: returns the keys of an object with wrong values; one makes a line damaged.
    Raises: OSError; ValueError if the lines have more than MAX_LINES_BYTES.
    """
    rows, damaged, first, kept = [], 0, "", 0
    lines = read_lines(path) if path.is_file() else ()
    for number, line in enumerate(lines, start=1):
        wrong, is_whole = "", line.endswith(b"\n")
        try:
            row = parse_json(line.removesuffix(b"\n"), "", "")
            if not isinstance(row, dict):
                raise UserError
        except ValueError:
            # A blank line is harmless; an incomplete last line is expected after a kill.
            if not line.strip() or not is_whole:
                continue
            wrong = f"{number}"
        else:
            if keys := list_invalid_keys(row):
                wrong = f"{number}, with a wrong {files.list_some(keys)}"
        if wrong:
            damaged, first = damaged + 1, first or wrong
            continue
        rows.append(row)
        # All rows stay in memory, so their total size is bounded.
        kept += max(len(line), 64)  # in memory even {} takes 64 bytes
        if kept > MAX_LINES_BYTES:
            raise UserError(
                f"{files.printable(path)} has more than {MAX_LINES_BYTES // 2**20} MiB of "
                f"lines, the most that are read; line {number} goes beyond. Keep the lines you "
                "need."
            )
    # One warning for all damaged lines, or a large file could flood the log.
    if damaged:
        text = "%d damaged lines of %s are left out, the first is line %s."
        logger.warning(text, damaged, files.printable(path), first)
    return rows


def parse_json(contents: bytes | str, name: str, what: str) -> Any:
    """Returns the value of a JSON text; NaN and infinities are accepted, as in Python's json.

    Args:
      name: the source of the text, for messages.
      what: completes "It must be ..." in messages.
    Raises: ValueError for invalid JSON, a duplicate key, or more than MAX_BYTES or MAX_DEPTH.
    """
    try:
        if len(contents) > MAX_BYTES:
            raise UserError(f"it has more than {MAX_BYTES // 2**20} MiB")
        text = contents if isinstance(contents, str) else contents.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_to_dict)
        if isinstance(value, dict | list) and _is_deeper(value, MAX_DEPTH):
            raise RecursionError
        return value
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        reason = f"it is not in UTF-8, with {byte!r} at byte {error.start}"
    except json.JSONDecodeError as error:
        # A file that was cut short fails at its end or inside a string.
        is_cut = error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
        place = "it ends too early" if is_cut else f"line {error.lineno}, column {error.colno}"
        reason = f"{place}: {error.msg}"
    except RecursionError:
        reason = f"it is nested more than {MAX_DEPTH} deep"
    except ValueError as error:  # a UserError from above, or a number with too many digits
        reason = str(error).partition(";")[0]
    raise UserError(f"cannot read {name}: {reason}. It must be {what}.")


def _to_dict(pairs):
    """Returns a JSON object as a dict.   Raises: ValueError for a duplicate key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(twice, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"the key {twice[:100]!r} is in one object twice")
    return value


def _is_deeper(value, depth):
    """Returns whether lists and objects are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:  # for speed: most values are flat, and a file may have a million lines
            break
    return bool(level)
