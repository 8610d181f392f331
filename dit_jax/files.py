"""Files that are there whole or not at all; paths, and names that are safe to show."""

import os
import pathlib
import re
import unicodedata
from collections.abc import Callable
from typing import BinaryIO

# Unicode's categories of characters that a terminal obeys or hides: controls, formats such as the
# bidirectional and zero-width ones, surrogates, line and paragraph separators.
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    r"""Shows each control character of a text as its escape: a newline as \n, ESC as \x1b.

    For names inside messages: whoever made a file or an archive chose its name. Bidirectional and
    zero-width controls and lone surrogates are escaped too.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c
        for c in text
    )


def to_path(text: str | os.PathLike, name: str) -> pathlib.Path:
    """The local path that a flag or a config key names, with `~` and `~user` expanded.

    Args: name, of the flag or key, such as '--workdir' or 'latents.vae', for messages.
    Raises: ValueError for an empty text, a remote path, an unknown user, or a NUL character.
    """
    text = os.fspath(text)
    shown = f"{name}={printable(text)}"
    if not text:
        raise ValueError(f"{name} is empty: give a path, or leave it out.")
    if "\0" in text:
        raise ValueError(f"{shown} has a NUL character, which no path can have.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(
            f"{shown}: remote paths are not read or written yet; mount it, or take a local path."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib's, which names no user
        user = text.partition("/")[0]
        raise ValueError(
            f"{shown}: {printable(user)} has no home directory; write ./{printable(text)} if that "
            "is its name."
        ) from None


def replace(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """What `write(file)` writes becomes the file, whole or not at all.   Raises: OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk's has none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """As `replace`, of a text, as UTF-8."""
    replace(path, lambda file: file.write(text.encode()))
