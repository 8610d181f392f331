"""JSON that people or disks may have damaged, read within bounds."""

import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")
MOST_JSON_BYTES = 64 * 2**20
MOST_JSON_DEPTH = 100
MOST_JSON_LINES_BYTES = 256 * 2**20  # of all lines of a file that are kept, each at least 64


def read_bytes(path: pathlib.Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The contents of a file, but for what is beyond `most` bytes.

    Raises: OSError; FileNotFoundError for a pipe or a device too, which may have no end.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {files.printable(path)}.")
    with path.open("rb") as file:
        return file.read(most)


def read_json(path: pathlib.Path, what: str) -> Any:
    """Reads a JSON file that a person or a disk may have damaged.

    Args: what, completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `parse_json`.
    """
    if not path.is_file():
        raise MissingFileError(f"no {files.printable(path)}: it must be {what}.")

    def read(path):
        with path.open("rb") as file:
            return file.read(MOST_JSON_BYTES + 1)

    return parse_json(files.open_and(path, read), files.printable(path), what)


def read_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a file one after another, each with its newline.

    Of a line longer than MOST_JSON_BYTES its beginning alone, one byte more than that, and its
    newline: so `parse_json` refuses it.
    Raises: OSError.
    """
    with path.open("rb", buffering=2**20) as file:  # long lines come in parts of this size
        while line := file.readline(MOST_JSON_BYTES + 1):
            rest = line
            while len(rest) > MOST_JSON_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MOST_JSON_BYTES + 1)
            ended = rest.endswith(b"\n") and not line.endswith(b"\n")
            yield line + b"\n" * ended


def read_json_lines(
    path: pathlib.Path, list_wrong: Callable[[dict], list[str]] = lambda row: []
) -> list[dict]:
    """The objects in a JSON-lines file; [] if there is no such file.

    Lines that are damaged are left out and counted in a warning. A last line that a kill or a full
    disk cut short is left out without a warning.

    Args: list_wrong, returns the keys of an object that are wrong: a line with any is damaged.
    Raises: OSError; ValueError if the lines have more than MOST_JSON_LINES_BYTES.
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
            if not line.strip() or not is_whole:
                continue
            wrong = f"{number}"
        else:
            if keys := list_wrong(row):
                wrong = f"{number}, with a wrong {files.list_some(keys)}"
        if wrong:
            damaged, first = damaged + 1, first or wrong
            continue
        rows.append(row)
        kept += max(len(line), 64)  # {} takes as many in memory
        if kept > MOST_JSON_LINES_BYTES:
            raise UserError(
                f"{files.printable(path)} has more than {MOST_JSON_LINES_BYTES // 2**20} MiB of "
                f"lines, the most that are read; line {number} goes beyond. Keep the lines you "
                "need."
            )
    if damaged:
        logger.warning(
            "%d damaged lines of %s are left out, the first is line %s.",
            damaged,
            files.printable(path),
            first,
        )
    return rows


def parse_json(contents: bytes | str, name: str, what: str) -> Any:
    """The value of a JSON text; NaN and infinities are numbers, as for Python.

    Args: name, of its source in messages.   what: completes "It must be ..." there.
    Raises: ValueError for what is no JSON, a key that is twice in one object, more than
      MOST_JSON_BYTES or MOST_JSON_DEPTH.
    """
    try:
        if len(contents) > MOST_JSON_BYTES:
            raise UserError(f"it has more than {MOST_JSON_BYTES // 2**20} MiB")
        text = contents if isinstance(contents, str) else contents.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_to_dict)
        if isinstance(value, dict | list) and _is_deeper(value, MOST_JSON_DEPTH):
            raise RecursionError
        return value
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        reason = f"it is not in UTF-8, with {found!r} at byte {error.start}"
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
        place = "it ends too early" if is_cut else f"line {error.lineno}, column {error.colno}"
        reason = f"{place}: {error.msg}"
    except RecursionError:
        reason = f"it is nested more than {MOST_JSON_DEPTH} deep"
    except ValueError as error:  # ours above, or a number of more digits than Python takes
        reason = str(error).partition(";")[0]
    raise UserError(f"cannot read {name}: {reason}. It must be {what}.")


def _to_dict(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise UserError(f"the key {twice[:100]!r} is in one object twice")
    return value


def _is_deeper(value, most):
    level = [value]
    for _ in range(most):
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:  # most values are flat, and a file may have a million lines
            break
    return bool(level)
