"""What a command writes to the terminal or the log: harmless, and never the end of its work.

Names of files, tensors and archives may hold escape sequences that move the cursor, rename the
window or hide text. Every line of a command passes `escape` on its way out.
"""

import errno
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TextIO

from dit_jax.system import files

# A progress bar returns to the beginning of its line, or moves up to it.
BAR = re.compile(r"\r|\x1b\[A")


def escape(text: str) -> str:
    """Shows control characters as escapes, but for newlines and tabs; see `files.printable`."""
    return re.sub(r"[^\n\t]+", lambda part: files.printable(part[0]), text)


class Stream:
    """Standard output or error whose text is escaped, and whose reader may go away.

    Without a reader, as after `| head -1`, what is written is dropped and the command goes on.
    Characters that the terminal's encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO, bars: bool = False):
        """Args: bars, lets through what progress bars write."""
        self._stream, self._bars = stream, bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes the text; returns its length.   Raises: as `flush`."""
        self._try(self._stream.write, self._escape(text))
        return len(text)

    def flush(self) -> None:
        """Raises: OSError of a file on a full disk, once; what follows is dropped."""
        self._try(self._stream.flush)

    def _try(self, act, *arguments):
        try:
            act(*arguments)
        except OSError as error:
            self._drop()
            error.filename = error.filename or self._stream.name
            if error.errno != errno.EPIPE:
                raise

    def _escape(self, text):
        if not self._bars:
            return escape(text)
        parts = BAR.split(text)
        return "".join(
            escape(part) + bar for part, bar in zip(parts, [*BAR.findall(text), ""], strict=True)
        )

    def _drop(self):
        """Sends what follows nowhere; Python would complain of it again when it ends."""
        nowhere = _open_nowhere()
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Formatter(logging.Formatter):
    """Formats log records as escaped text."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record))


def open_streams() -> None:
    """Makes standard output and error of this process `Stream`s; one that is closed goes nowhere.

    For a command; a library leaves both alone.
    """
    sys.stdout = Stream(sys.stdout or os.fdopen(_open_nowhere(), "w"))
    sys.stderr = Stream(sys.stderr or os.fdopen(_open_nowhere(), "w"), bars=True)


def command_line(words: Sequence[str]) -> str:
    """The words of a command as a shell takes them, on one line of printable characters."""
    return " ".join(map(_quote, words))


def _open_nowhere():
    return os.open(os.devnull, os.O_WRONLY)


def _quote(word):
    if files.printable(word) == word:
        return shlex.quote(word)
    # Bash and zsh read escapes in $'...'; bytes, so that names that are not UTF-8 are exact too.
    quoted = "".join(
        c if 32 <= ord(c) < 127 and c not in "'\\" else "".join(f"\\x{b:02x}" for b in _bytes(c))
        for c in word
    )
    return f"$'{quoted}'"


def _bytes(character):
    return character.encode(errors="surrogateescape")
