"""Errors that tell the user what to fix: a command prints only the message, without a traceback.

The message contains the values and says what to do. An operating system error that names a file is
shown in the same way. Any other error is a bug and keeps its traceback.
"""

from collections.abc import Iterable


class UserError(ValueError):
    """A value that is wrong: of a flag, of a config key, or in a file."""


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raises UserError, with the choices, for a value of a config key that is none of them."""
    if value not in (choices := list(choices)):
        raise UserError(f"unknown {key}={value!r}; choose one of {', '.join(choices)}.")


class UserFileError(OSError):
    """A file or directory that cannot be read or written."""


class MissingFileError(UserFileError, FileNotFoundError):
    """A file or directory that does not exist."""
