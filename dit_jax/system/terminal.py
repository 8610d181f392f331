"""Safe terminal and log output: control characters are escaped, and a closed pipe is no error.

Names of files, tensors and archives may contain escape sequences that move the cursor, rename the
window or hide text. All output of a command passes through `escape`.
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

# What a progress bar writes to redraw itself: a return to the start of the line, or one line up.
BAR = re.compile(r"\r|\x1b\[A")


def escape(text: str) -> str:
    """Returns a text with all control characters escaped except newline and tab."""
    return re.sub(r"[^\n\t]+", lambda part: files.printable(part[0]), text)


class Stream:
    """Wrapper of standard output or error that escapes text and survives a closed reader.

    If the reader is gone, as after `| head -1`, the command continues and its output is dropped.
    Characters that the terminal's encoding lacks are written as escapes.

    Args: bars, whether the control characters of progress bars are written as they are.
    """

    def __init__(self, stream: TextIO, bars: bool = False):
        self._stream, self._bars = stream, bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes the text; returns its length.   Raises: OSError as `flush`."""
        self._try(self._stream.write, self._escape(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream.   Raises: OSError, once, for a full disk; then output is dropped."""
        self._try(self._stream.flush)

    def _try(self, act, *arguments):
        """Calls act(*arguments); after an OSError drops all later output."""
        try:
            act(*arguments)
        except OSError as error:
            # Later output goes to /dev/null, on the level of file descriptors: at exit Python
            # flushes the stream and would fail again.
            nowhere = _open_nowhere()
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            error.filename = error.filename or self._stream.name
            if error.errno != errno.EPIPE:  # EPIPE: the reader is gone
                raise

    def _escape(self, text):
        """Returns the escaped text; with `bars`, matches of BAR stay as they are."""
        if not self._bars:
            return escape(text)
        parts = BAR.split(text)
        return "".join(
            escape(part) + bar for part, bar in zip(parts, [*BAR.findall(text), ""], strict=True)
        )

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Formatter(logging.Formatter):
    """Formatter of log records that escapes their text."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the escaped text of a record."""
        return escape(super().format(record))


def open_streams() -> None:
    """Replaces standard output and error with `Stream`s; a closed one is replaced with /dev/null.

    Only commands call this. A library must not replace the streams of its caller.
    """
    # sys.stdout is None if the descriptor was closed when Python started.
    sys.stdout = Stream(sys.stdout or os.fdopen(_open_nowhere(), "w"))
    sys.stderr = Stream(sys.stderr or os.fdopen(_open_nowhere(), "w"), bars=True)


def command_line(words: Sequence[str]) -> str:
    """Returns a command as one line for a shell, quoted, in printable characters."""
    return " ".join(map(_quote, words))


def _open_nowhere():
    """Returns a file descriptor of /dev/null, open for writing."""
    return os.open(os.devnull, os.O_WRONLY)


def _quote(word):
    """Returns a word quoted for a shell."""
    if files.printable(word) == word:
        return shlex.quote(word)
    # Bash and zsh understand escapes in $'...'. Escaping single bytes keeps file names exact that
    # are not valid UTF-8.
    quoted = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{quoted}'"
