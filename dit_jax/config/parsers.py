"""Parsers for the texts of flags and config keys, in addition to absl's."""

import ast
import math
import os
import pathlib
import re

from absl import flags

from dit_jax.config import ranges, sizes
from dit_jax.errors import UserError
from dit_jax.system import files

# {type of a list's values: description of the list}; None stands for int or float.
LIST_DESCRIPTIONS = {
    str: "texts with commas, such as a,b",
    bool: "values with commas, such as True,False",
    int: "whole numbers with commas, such as 1,2",
    float: "numbers with commas, such as 0.1,0.8",
    None: "numbers with commas, such as 0.1,0.8",
}


def parse(name: str, text: str, parser: flags.ArgumentParser) -> object:
    """Returns the value of --NAME=TEXT.   Raises: ValueError that describes valid values."""
    try:
        value = parser.parse(text)
        items = value if isinstance(value, tuple) else (value,)
        # absl accepts nan and inf.
        if all(math.isfinite(item) for item in items if isinstance(item, float)):
            return value
    except (ValueError, TypeError, OverflowError):
        if isinstance(parser, PathParser):  # its error already names the flag
            raise
    expected = parser.syntactic_help
    if isinstance(parser, flags.BooleanParser):
        expected = "true or false"
    elif isinstance(parser, flags.EnumParser):
        expected = f"one of {', '.join(parser.enum_values)}"
    raise UserError(f"--{name}={text} must be {expected}.")


class PathParser(flags.ArgumentParser):
    """Parser for a local path.

    Args:
      name: the name of the flag, for errors.
      as_string: whether `parse` returns a string instead of a pathlib.Path.
    """

    def __init__(self, name: str, as_string: bool = False):
        super().__init__()
        self.name, self.as_string = name, as_string

    def parse(self, argument: str) -> pathlib.Path | str:
        """Returns the path, with `~` expanded.   Raises: ValueError as `files.to_path`."""
        path = files.to_path(argument, f"--{self.name}")
        return os.fspath(path) if self.as_string else path


class StringParser(PathParser):
    """Parser for a string in a config, such as a name or a path."""

    def parse(self, argument: str) -> str:
        """Returns the string, as `expand_path`."""
        return expand_path(argument, f"--{self.name}")


def expand_path(text: str, name: str) -> str:
    """Returns a string in a config with a leading `~` expanded.

    Raises: ValueError, with `name`, the key of the string, for a remote path.
    """
    # Only paths begin with `~` or contain `://`.
    if text.startswith("~") or "://" in text:
        return str(files.to_path(text, name))
    return text


class ListParser(flags.ArgumentParser):
    """Parser for a tuple: '1,2', '(1, 2)' or, if the values are strings, 'a,b' without quotes.

    Args:
      kind: the type of the values, a key of LIST_DESCRIPTIONS. An int may be given for a float.
      count: the exact number of values; None for any number.
      min_count: the smallest number of values.
    """

    def __init__(self, kind: type | None, count: int | None = None, min_count: int = 1):
        super().__init__()
        self.kind, self.count, self.min_count = kind, count, min_count
        self.syntactic_help = f"{count or ''} {LIST_DESCRIPTIONS[kind]}".lstrip()

    def parse(self, argument: str) -> tuple:
        """Returns the values.   Raises: ValueError, TypeError, OverflowError."""
        try:
            values = ast.literal_eval(argument)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = argument.split(",")
        values = values if isinstance(values, tuple | list) else (values,)
        if len(values) < self.min_count or self.count not in (None, len(values)):
            raise ValueError(argument)
        return tuple(map(self._convert, values))

    def _convert(self, value):
        """Returns a value in the type `kind`.   Raises: TypeError for another type."""
        if self.kind is float and type(value) is int:
            return float(value)
        kinds = (int, float) if self.kind is None else (self.kind,)
        if type(value) not in kinds:
            raise TypeError(value)
        return value


class SizeParser(flags.ArgumentParser):
    """Parser for a size in pixels: '256', '256x384', '256,384' or '(256, 384)', height first."""

    syntactic_help = f"a whole number in 1..{ranges.MAX_IMAGE_SIZE}, or two, as 256x384"

    def parse(self, argument: str) -> sizes.Size:
        """Returns the size.   Raises: ValueError for no size, or one out of range."""
        if not re.fullmatch(r"\(?\s*\d+(\s*[x,]\s*\d+)*\s*\)?", argument):
            raise ValueError(argument)
        first, *others = map(int, re.findall(r"\d+", argument))
        size = (first, *others) if others else first
        if not sizes.is_size(size) or not all(map(ranges.IMAGE_SIZE.holds, sizes.sides(size))):
            raise ValueError(argument)
        return sizes.simplify(size)
