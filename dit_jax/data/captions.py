"""Reader of metadata.jsonl in an image folder: one JSON line per image, with its captions.

    {"file_name": "sub/a.png", "text": "a red cat"}
    {"file_name": "b.png", "text": ["two cats", "a pair of cats"]}

The key of the captions is data.caption_feature. All invalid lines are reported at once.
"""

import functools
import pathlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator

from dit_jax.data import listing, pixels
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, json_files

NAME = "metadata.jsonl"
MAX_SHOWN = 100  # characters of a line or a name in an error
# The valid lines may have this many bytes per image of the folder, plus 64 MiB in all.
MAX_BYTES_PER_IMAGE = 2**14


def read(
    path: pathlib.Path, feature: str, known: Collection[str]
) -> tuple[list[str], list[str | list[str]]]:
    """Returns the file names in metadata.jsonl, and a caption or a list of captions for each.

    Args:
      feature: the key of the captions in a line.
      known: the image paths relative to the folder, with "/"; no other file may be listed, and
        the names are returned as they are spelled here.
    Raises: FileNotFoundError; ValueError that lists the invalid lines.
    """
    if not path.is_file():
        raise MissingFileError(
            f"no {files.printable(path)}: with data.caption_feature={feature!r} a folder needs one "
            f'line of JSON for each image there, such as {{"file_name": "a.png", "{feature}": '
            '"a red cat"}.'
        )
    # The file and the file system may spell a name differently in Unicode: "é" is one character or
    # two. Built only when a name is not found as it is written.
    composed = functools.cache(lambda: {_compose(name): name for name in known})
    max_bytes = json_files.MAX_BYTES + MAX_BYTES_PER_IMAGE * len(known)
    lines, faults = {}, []  # {name: (line number, caption or list of captions)}, [(number, fault)]
    num_faults = num_bytes = 0
    # An invalid line does not stop the reading, so that one error can list all of them.
    for number, line in _lines(path):
        try:
            name, caption = _parse(line, feature)
            name = _spell(name, known, composed)
            if name in lines:
                raise UserError(
                    f'lists "{name[:MAX_SHOWN]}" again, as line {lines[name][0]} does; remove one'
                )
        except ValueError as error:
            num_faults += 1
            if len(faults) < listing.SHOWN:
                # As text: the error object would keep the whole line in memory.
                faults.append((number, str(error)))
            continue
        # A file from elsewhere must not fill the memory.
        num_bytes += len(line)
        if num_bytes > max_bytes:
            raise UserError(
                f"{files.printable(path)} has more than {max_bytes:,} bytes of captions up to line "
                f"{number}, the most for a folder of {listing.count(len(known), 'image')}: shorten "
                "them."
            )
        lines[name] = number, caption
    if faults:
        raise _describe_faults(path, faults, num_faults, num_faults + len(lines))
    return list(lines), [caption for _, caption in lines.values()]


def _describe_faults(path, faults, num_faults, num_lines):
    """Returns the error for invalid lines, of which `faults` are the first."""
    shown = files.printable(path)
    if num_faults == 1:  # it fits in one sentence
        ((number, fault),) = faults
        return UserError(f"line {number} of {shown} {files.printable(fault)}.")
    listed = listing.list_some([f"line {number} {fault}" for number, fault in faults], num_faults)
    return UserError(f"{num_faults:,} of {num_lines:,} lines are wrong in {shown}:\n{listed}")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of the lines that are not blank, without newline and BOM."""
    # Not splitlines(): it also splits at Unicode's other line ends, which captions may contain.
    for number, line in enumerate(json_files.read_lines(path), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, line.removesuffix(b"\n")


def _parse(line, feature):
    """Returns (file name, caption or list of captions) of a line.

    Raises: ValueError with the fault, worded to follow "line 3".
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        raise UserError(f"is not in UTF-8: {error.reason}, {byte!r}; save it as UTF-8") from None
    shown, reason = f"not {text[:MAX_SHOWN].strip()!r}", ""
    try:
        row = json_files.parse_json(text, "it", "an object of JSON")
    except ValueError as error:
        row, reason = None, f": {error}".rstrip(".")
    row = row if isinstance(row, dict) else {}
    name, caption = row.get("file_name"), row.get(feature)
    if not (name and isinstance(name, str)):
        raise UserError(f"must be JSON with file_name, a text, {shown}{reason}")
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(text, str) for text in captions):
        raise UserError(
            f"must be JSON with {feature}, a caption or a list of captions, at least one, {shown}"
        )
    # A JSON escape may be a lone surrogate, which is no character and has no UTF-8.
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:
        raise UserError(f"has a caption with half a character, a lone surrogate: {shown}") from None
    return name, caption


def _spell(name, known, composed: Callable[[], dict[str, str]]):
    """Returns a listed name as the folder spells it; `composed` returns {NFC name: its spelling}.

    Raises: ValueError with the reason if the folder has no such image, worded as in `_parse`.
    """
    if name in known:
        return name
    # "./a.png" and "sub//a.png" are valid ways to write a path.
    plain = "/".join(part for part in name.split("/") if part not in ("", "."))
    if not name.startswith("/"):
        if plain in known:
            return plain
        if known_name := composed().get(_compose(plain)):
            return known_name
    raise UserError(f'names "{name[:MAX_SHOWN]}", {_why_not(name)}')


def _compose(name):
    """Returns a name in Unicode's composed form, NFC."""
    return unicodedata.normalize("NFC", name)


def _why_not(name):
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
