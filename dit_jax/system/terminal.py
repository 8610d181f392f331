"""Safe terminal and log output: control characters are escaped, and a closed pipe is no error.

Names of files, tensors and archives may contain escape sequences. These can move the cursor, rename
the window or hide text. All output of a command passes through `escape`.
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

# Controls with which a progress bar redraws itself: go to the start of the line, or one line up.
BAR_CONTROLS = re.compile(r"\r|\x1b\[A")


def escape(text: str) -> str:
    """Returns a text with all control characters escaped except newline and tab."""
    return re.sub(r"[^\n\t]+", lambda part: files.printable(part[0]), text)


class Stream:
    """Wrapper of standard output or error that escapes text, and drops output without a reader.

    If the reader is gone, as after `| head -1`, the command continues and its output is dropped.
    Characters that the terminal's encoding lacks are written as escapes.

    Args: allow_bars, whether the control characters of progress bars are not escaped.
    """

    def __init__(self, stream: TextIO, allow_bars: bool = False):
        self._stream, self._allow_bars = stream, allow_bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes the text; returns its length.   Raises: OSError as `flush`."""
        self._try(self._stream.write, self._escape(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream.   Raises: OSError for a full disk, only once."""
        self._try(self._stream.flush)

    def _try(self, function, *arguments):
        """Calls function(*arguments); after an OSError drops all later output."""
        try:
            function(*arguments)
        except OSError as error:
            # The file descriptor itself is replaced, because Python flushes the stream at exit and
            # would fail again.
            null = _open_null()
            os.dup2(null, self._stream.fileno())
            os.close(null)
            error.filename = error.filename or self._stream.name
            if error.errno != errno.EPIPE:  # EPIPE: the reader is gone
                raise

    def _escape(self, text):
        """Returns the escaped text; with `allow_bars`, BAR_CONTROLS stay as they are."""
        if not self._allow_bars:
            return escape(text)
        parts, controls = BAR_CONTROLS.split(text), [*BAR_CONTROLS.findall(text), ""]
        return "".join(
            escape(part) + control for part, control in zip(parts, controls, strict=True)
        )

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Formatter(logging.Formatter):
    """Formatter of log records that escapes their text."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the escaped text of a record."""
        return escape(super().format(record))


def open_streams() -> None:
    """Replaces standard output and error with `Stream`s, or with /dev/null if they are closed.

    Only commands call this. A library must not replace the streams of its caller.
    """
    # sys.stdout is None if the descriptor was closed when Python started.
    sys.stdout = Stream(sys.stdout or os.fdopen(_open_null(), "w"))
    sys.stderr = Stream(sys.stderr or os.fdopen(_open_null(), "w"), allow_bars=True)


def format_command(words: Sequence[str]) -> str:
    """Returns a command as a line for a shell, quoted, in printable characters."""
    return " ".join(map(_quote, words))


def _open_null():
    """Returns a file descriptor of /dev/null, open for writing."""
    return os.open(os.devnull, os.O_WRONLY)


def _quote(word):
    """Returns a word quoted for a shell."""
    if files.printable(word) == word:
        return shlex.quote(word)
    # Bash and zsh understand escapes in $'...'. Each byte is escaped, so that a file name that is
    # not valid UTF-8 stays exact.
    quoted = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{quoted}'"
