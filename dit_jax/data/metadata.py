"""Reader of metadata.jsonl in an image folder: one JSON line per image, with further values.

    {"file_name": "sub/a.png", "text": "a red cat"}
    {"file_name": "b.png", "text": ["two cats", "a pair of cats"]}

A parser for each key decides which values are valid. All invalid lines are reported at once.
"""

import functools
import json
import pathlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dit_jax.data import listing, pixels
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, json_files

NAME = "metadata.jsonl"
MAX_SHOWN = 100  # characters of a line or a name in an error
# The valid lines may have this many bytes per image of the folder, plus 64 MiB in all.
MAX_BYTES_PER_IMAGE = 2**14

# Function from a key and its value (None without the key) to the value that is kept. It raises a
# ValueError whose message follows "line 3", such as "has no caption".
Parser = Callable[[str, Any], Any]


class ImageNames:
    """The image paths of a folder, relative to it and with "/", for names that a line gives."""

    def __init__(self, paths: Collection[str]):
        self.paths = paths

    @functools.cached_property
    def _path_by_nfc(self):
        """{path in Unicode's composed form, NFC: path}, built only if a name needs it."""
        return {_compose(path): path for path in self.paths}

    def parse(self, key: str, name: Any) -> str:
        """Returns the path that a name means; a `Parser`.

        The line and the file system may spell a path differently in Unicode: "é" is one character
        or two. "./a.png" and "sub//a.png" are valid too.
        """
        if not (name and isinstance(name, str)):
            raise UserError(f"must be JSON with {key}, a text")
        if name in self.paths:
            return name
        plain = "/".join(part for part in name.split("/") if part not in ("", "."))
        if not name.startswith("/"):
            if plain in self.paths:
                return plain
            if path := self._path_by_nfc.get(_compose(plain)):
                return path
        raise UserError(f'names "{name[:MAX_SHOWN]}", {_explain_unknown(name)}')


def parse_captions(key: str, value: Any) -> str | list[str]:
    """Checks a caption or a list of captions; a `Parser`."""
    captions = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"must be JSON with {key}, a caption or a list of captions, at least one")
    # A JSON escape may be a lone surrogate, which is no character and has no UTF-8.
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:
        raise UserError("has a caption with half a character, a lone surrogate") from None
    return value


def read(
    path: pathlib.Path, parsers: Mapping[str, Parser], image_names: ImageNames
) -> dict[str, dict[str, Any]]:
    """Reads metadata.jsonl as {image path: {key: value}}, in the order of the lines.

    Args:
      parsers: by the keys that are read from each line.
      image_names: the images of the folder; a line may name no other file.
    Raises: FileNotFoundError; ValueError that lists the invalid lines.
    """
    if not path.is_file():
        example = json.dumps({"file_name": "a.png", **dict.fromkeys(parsers, "...")})
        raise MissingFileError(
            f"no {files.printable(path)}: the config reads {', '.join(parsers)} of each image "
            f"from there. Write one line of JSON for each image, such as {example}."
        )
    parsers = {"file_name": image_names.parse, **parsers}
    num_images = len(image_names.paths)
    max_bytes = json_files.MAX_BYTES + MAX_BYTES_PER_IMAGE * num_images
    rows, line_numbers = {}, {}  # by image path
    faults = []  # [(line number, fault)], the first few
    num_faults = num_bytes = 0
    # An invalid line does not stop the reading, so that one error can list all of them.
    for line_number, line in _read_lines(path):
        try:
            values = _parse_line(line, parsers)
            if (name := values.pop("file_name")) in rows:
                raise UserError(
                    f'lists "{name[:MAX_SHOWN]}" again, as line {line_numbers[name]} does; remove '
                    "one"
                )
        except ValueError as error:
            num_faults += 1
            if len(faults) < listing.SHOWN:
                # As text: the error object would keep the whole line in memory.
                faults.append((line_number, str(error)))
            continue
        # A file from elsewhere must not fill the memory.
        num_bytes += len(line)
        if num_bytes > max_bytes:
            raise UserError(
                f"{files.printable(path)} has more than {max_bytes:,} bytes up to line "
                f"{line_number}, the most for a folder of {listing.count(num_images, 'image')}. "
                "Shorten the lines."
            )
        rows[name], line_numbers[name] = values, line_number
    if faults:
        raise _make_error(path, faults, num_faults, num_faults + len(rows))
    return rows


def _make_error(path, faults, num_faults, num_lines):
    """Returns the error for invalid lines, of which `faults` are the first."""
    shown = files.printable(path)
    if num_faults == 1:  # it fits in one sentence
        ((line_number, fault),) = faults
        return UserError(f"line {line_number} of {shown} {files.printable(fault)}.")
    lines = [f"line {line_number} {fault}" for line_number, fault in faults]
    return UserError(
        f"{num_faults:,} of {num_lines:,} lines are wrong in {shown}:\n"
        f"{listing.list_some(lines, num_faults)}"
    )


def _read_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of the lines that are not blank, without newline and BOM."""
    # Not splitlines(): it also splits at Unicode's other line ends, which captions may contain.
    for line_number, line in enumerate(json_files.read_lines(path), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
        if line.strip():
            yield line_number, line.removesuffix(b"\n")


def _parse_line(line, parsers):
    """Returns {key: value} of a line.   Raises: ValueError as a `Parser`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        raise UserError(f"is not in UTF-8: {error.reason}, {byte!r}; save it as UTF-8") from None
    shown = repr(text[:MAX_SHOWN].strip())
    try:
        row = json_files.parse_json(text, "it", "an object of JSON")
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"must be JSON with file_name, a text: {shown}: {reason}") from None
    row = row if isinstance(row, dict) else {}
    try:
        return {key: parse(key, row.get(key)) for key, parse in parsers.items()}
    except ValueError as error:
        raise UserError(f"{error}: {shown}") from None


def _compose(name):
    """Returns a name in Unicode's composed form, NFC."""
    return unicodedata.normalize("NFC", name)


def _explain_unknown(name):
    """Returns why no image of the folder has this name, for a message."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return "an absolute path: names are relative to the folder of metadata.jsonl"
    if ".." in re.split(r"[\\/]", name):
        return "which leads out of the folder: only what is inside is read"
    if "\\" in name:
        return 'with a backslash: write folders with "/"'
    if any(map(listing.is_hidden, name.split("/"))):
        return "a hidden file or one of the system's, which are left out"
    if listing.get_suffix(name) not in pixels.SUFFIXES:
        return f"which does not end as an image that is read: {' '.join(sorted(pixels.SUFFIXES))}"
    return "which is not there"
