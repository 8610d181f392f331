"""Errors that tell the user what to fix: a command prints only the message, without a traceback.

The message contains the values and says what to do. An operating system error that names a file is
shown in the same way. Any other error is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """A value that is wrong: of a flag, of a config key, or in a file."""


class UserFileError(OSError):
    """A file or directory that cannot be read or written."""


class MissingFileError(UserFileError, FileNotFoundError):
    """A file or directory that does not exist."""
