"""Errors whose message is for the user: a command ends with it, and shows no traceback.

Their text has the values, and says what to do. Any other error of a command is a bug and keeps its
traceback, but for those of the operating system that name a file.
"""


class UserError(ValueError):
    """A value that cannot be: of a flag, of the config, or in a file."""


class UserFileError(OSError):
    """A file or directory that cannot be read or written."""


class MissingFileError(UserFileError, FileNotFoundError):
    """A file or directory that is not there."""
