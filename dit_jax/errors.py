"""Errors that the user can fix: a command prints only the message, without a traceback.

The message contains the values and says what to do. An error of the operating system that names a
file is shown in the same way. Any other error is a bug and keeps its traceback.
"""

from collections.abc import Iterable


class UserError(ValueError):
    """A wrong value of a flag or config key, or in a file."""


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raises a UserError, which lists the choices, unless the value of a key is one of them."""
    if value not in (choices := list(choices)):
        raise UserError(f"unknown {key}={value!r}; choose one of {', '.join(choices)}.")


class UserFileError(OSError):
    """A file or directory that cannot be read or written."""


class MissingFileError(UserFileError, FileNotFoundError):
    """A file or directory that does not exist."""
