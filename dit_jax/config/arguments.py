"""Strict command-line parser: a word that is not understood is an error with the right syntax.

absl alone is too lenient. It drops words without a flag, reads `--raw False` as True, and lets a
flag without a value take the next flag as its value. If a flag is given twice, it ignores the
first.
"""

import collections
import difflib
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

from absl import flags

from dit_jax.config import overrides, ranges, sizes
from dit_jax.errors import UserError
from dit_jax.system import files

HELP = ("help", "helpshort", "helpfull", "helpxml", "h", "?")
LEAST_COLUMNS = 40  # the least width of --help: absl fails if its indents fill the line
NUMBER = re.compile(r"-(\d|\.\d)")  # the beginning of a negative number, which is no flag
# Libraries whose flags no command accepts. absl's --only_check_args, for example, would end a
# command at once, with success.
LIBRARIES = ("absl", "array_record", "grain", "orbax", "tensorflow_datasets")


class PathParser(flags.ArgumentParser):
    """Parser of a flag whose value is a local path."""

    def __init__(self, name: str, text: bool = False):
        """Creates the parser.

        Args:
          name: the name of the flag, for errors.
          text: whether `parse` returns a string instead of a pathlib.Path.
        """
        super().__init__()
        self.name, self.text = name, text

    def parse(self, argument: str) -> pathlib.Path | str:
        """Returns the path, with `~` expanded.   Raises: ValueError as `files.to_path`."""
        path = files.to_path(argument, f"--{self.name}")
        return str(path) if self.text else path


class NumbersParser(flags.ArgumentParser):
    """Parser of comma-separated numbers."""

    def __init__(self, kind: type, count: int | None = None):
        """Creates the parser.

        Args:
          kind: float or int.
          count: the number of values; None for one or more.
        """
        super().__init__()
        self.kind, self.count = kind, count
        example = ",".join(["0.1", "0.8", "1"][: count or 3] if kind is float else ["1", "2"])
        many = f"{count} " if count else ""
        whole = "whole " if kind is int else ""
        self.syntactic_help = f"{many}{whole}numbers with commas, such as {example}"

    def parse(self, argument: str) -> tuple:
        """Returns a tuple of ints or floats.   Raises: ValueError."""
        parse = overrides.parse_float if self.kind is float else overrides.parse_int
        numbers = tuple(parse(part) for part in argument.split(","))
        if self.count not in (None, len(numbers)):
            raise UserError(self.syntactic_help)
        return numbers


class SizeParser(flags.ArgumentParser):
    """Parser of an image size in pixels: the side of a square, or HEIGHTxWIDTH."""

    syntactic_help = f"a whole number in 1..{ranges.MOST_IMAGE_SIZE}, or two, as 256x384"

    def parse(self, argument: str) -> sizes.Size:
        """Returns the size.   Raises: ValueError for no size, or one out of range."""
        size = sizes.parse(argument)
        if not all(map(ranges.IMAGE_SIZE.holds, sizes.height_and_width(size))):
            raise UserError(self.syntactic_help)
        return size


class ConfigFlag(flags.Flag):
    """The flag --config. Its value is the loaded config.

    Attributes:
      spec: the text of --config, FILE or FILE:ARG.
      overrides: {key: text} of the --config.KEY=VALUE flags.
    """

    def __init__(self, key: str):
        """Creates the flag.

        Args:
          key: a top-level key that tells configs of the right kind apart, such as 'model'.
        """
        text = "FILE[:ARG] of the config; --config.KEY=VALUE sets a key of it."
        super().__init__(flags.ArgumentParser(), None, "config", None, text)
        self.key, self.spec, self.overrides = key, "", {}

    def load(self, spec: str) -> None:
        """Loads the config that a spec names, and makes it the value of the flag.

        Raises: as `overrides.load`; ValueError for a config of another kind.
        """
        config = overrides.load(spec)
        if self.key not in config:
            raise UserError(
                f"--config={spec} has no config.{self.key}: a sweep's has config.grids, a run's "
                "config.model, and each has its commands."
            )
        self.value, self.spec, self.overrides = config, spec, {}
        self.present, self.using_default_value = 1, False

    def override(self, key: str, text: str) -> None:
        """Sets a key of the config to the value of a text.   Raises: as `overrides.override`."""
        overrides.override(self.value, key, text)
        self.overrides[key] = text

    def words(self) -> list[str]:
        """Returns the command-line words that produce the same config."""
        changes = [f"--config.{key}={text}" for key, text in self.overrides.items()]
        return [f"--config={self.spec}", *changes]


def parse(
    argv: Sequence[str], positionals: str = "", values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """Parses the command line: sets the flags, and returns the positional words.

    Args:
      argv: the words of the command line, beginning with the program name.
      positionals: the names of the command's positional words, such as 'KIND SRC DST'; 'MODEL ...'
        allows any number.
      values: the defined flags, which receive their values.
    Raises: ValueError for a word that is not understood, or a config value out of its range;
      SystemExit after --help.
    """
    words = argv[1:]
    # --help must work even if other words are wrong; absl prints it and exits.
    for word in words:
        if word.startswith("-") and (name := word.lstrip("-")) in HELP:
            columns = shutil.get_terminal_size().columns
            os.environ["COLUMNS"] = str(max(LEAST_COLUMNS, columns))  # absl reads this variable
            values([argv[0], "--help" if name == "h" else word])
    # The config comes first: the types of its keys tell how to parse the other words.
    spec = _spec(words) if "config" in values else None
    if spec is not None:
        values["config"].load(spec)
    given, others = _split(words, values)
    _check_positionals(others, positionals, values)
    # Each text is checked here, before absl parses it, for errors that say what the flag takes.
    checked = []
    for name, texts in given.items():
        if len(set(texts)) > 1 and not _may_repeat(name, values):
            raise UserError(
                f"--{name} is given {len(texts)} times, as {' and '.join(texts)}: leave one of "
                "them. A list is one word with commas."
            )
        if name.startswith("config."):
            values["config"].override(name.removeprefix("config."), texts[0])
        elif name != "config":
            checked += [_check(name, text, values[name].parser) for text in texts]
    # After all overrides, because the file alone may be out of range.
    if spec is not None:
        ranges.check(values["config"].value)
    _parse_checked([argv[0], *checked], values)
    return [word for word, _ in others]


def _split(words, values):
    """Splits a command line into ({flag name: texts}, [(positional word, flag before it)]).

    Boolean texts are in lower case. The flag before a positional word is for a hint in its error.
    Raises: ValueError for a flag that is unknown, lacks a value, or has one but takes none.
    """
    given, others, before = {}, [], ""
    left = collections.deque(words)
    while left:
        word = left.popleft()
        if word == "--":  # by convention, no flags follow
            return given, [*others, *((other, "") for other in left)]
        if not word.startswith("-") or word == "-":
            others.append((word, before))
            continue
        name, equals, text = word[1 + word.startswith("--") :].partition("=")
        boolean = _is_boolean(name, values)
        # --noNAME is absl's second way to write --NAME=false.
        if boolean is None and name.startswith("no") and _is_boolean(name[2:], values):
            if equals:
                raise UserError(f"{word} is given a value: write --{name[2:]}={text}.")
            name, text = name[2:], "false"
        elif boolean is None:
            raise UserError(f"unknown flag --{name}.{_near(name, values)} --help lists them.")
        elif boolean and not equals:
            # absl would take the next word for a positional one.
            follows = left and left[0].lower() in ("true", "false")
            text = left.popleft() if follows else "true"
        elif not equals:
            # A word that begins with "-" is the next flag, so the value was forgotten.
            if not left or (left[0].startswith("-") and not NUMBER.match(left[0])):
                hint = f"; if {left[0]} is its value, write --{name}={left[0]}" if left else ""
                raise UserError(f"--{name} has no value{hint}.")
            text = left.popleft()
        before = f"--{name}={text}"
        given.setdefault(name, []).append(text.lower() if boolean else text)
    return given, others


def _spec(words):
    """Returns the value of --config, or None without one.

    It is searched before the other words are parsed, because they need the config's types.
    """
    for i, word in enumerate(words):
        if match := re.fullmatch(r"--?config(=(.*))?", word, re.DOTALL):
            follows = [word for word in words[i + 1 : i + 2] if not word.startswith("-")]
            return match[2] if match[1] else next(iter(follows), None)
    return None


def _is_boolean(name, values):
    """Returns whether a flag or config key is boolean, or None if the flag does not exist.

    Raises: ValueError for an unknown config key, or one without --config.
    """
    if name.startswith("config.") and "config" in values:
        config = values["config"].value
        if config is None:
            raise UserError(f"--{name} sets a key of --config, which is missing.")
        return isinstance(overrides.get_value(config, name.removeprefix("config.")), bool)
    return bool(values[name].boolean) if _is_defined(name, values) else None


def _is_defined(name, values):
    """Returns whether the command accepts a flag; flags of LIBRARIES are refused, except HELP."""
    module = str(values.find_module_defining_flag(name))
    return name in values and (name in HELP or module.partition(".")[0] not in LIBRARIES)


def _may_repeat(name, values):
    """Returns whether a flag may be given several times with different values."""
    return name in values and isinstance(values[name], flags.MultiFlag)


def _near(name, values):
    """Returns a hint for an unknown flag, such as ' Did you mean --seed?', or ''."""
    # The prefix is often forgotten: --model instead of --config.model.
    config = values["config"].value if "config" in values else None
    if config is not None and name in config:
        return f" Did you mean --config.{name}?"
    defined = [flag for flag in values if _is_defined(flag, values)]
    near = difflib.get_close_matches(name, defined, n=1, cutoff=0.7)
    return f" Did you mean --{near[0]}?" if near else ""


def _check_positionals(others, names, values):
    """Raises a ValueError, with a hint, if there are more positional words than names.

    Args:
      others: [(positional word, flag before it)].
      names: the names of the positional words; see `parse`.
    """
    most = len(others) if names.endswith("...") else len(names.split())
    if len(others) <= most:
        return
    word, before = others[most]  # the first word too many
    takes = f"takes {names} without a flag" if names else "takes no words without a flag"
    # The two typical causes: a flag without its dashes, and a list written with spaces.
    name = word.partition("=")[0]
    if name != word and (name in values or name.startswith("config.")):
        hint = f" Write --{word}."
    elif before:
        flag, _, text = before.partition("=")
        boolean = text.lower() in ("true", "false")
        kinds = f"{flag}=true or {flag}=false" if boolean else f"{before},{word} for a list"
        hint = f" It stands after {before}: write {kinds}"
        hint += "." if boolean else f", {flag}='{text} {word}' for a text with spaces."
    else:
        hint = ""
    raise UserError(f"{word!r} is not understood: the command {takes}.{hint}")


def _check(name, text, parser):
    """Returns the word --name=text.   Raises: ValueError if the flag's parser refuses the text."""
    try:
        value = parser.parse(text)
        if isinstance(value, float):  # absl accepts nan and inf
            overrides.parse_float(text)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(parser, PathParser):  # its error already names the flag
            raise
        kind = parser.syntactic_help
        if isinstance(parser, flags.BooleanParser):
            kind = "true or false"
        elif isinstance(parser, flags.EnumParser):
            kind = f"one of {', '.join(parser.enum_values)}"
        raise UserError(f"--{name}={text} must be {kind or error}.") from None
    return f"--{name}={text}"


def _parse_checked(argv, values):
    """Sets the flags from checked words.   Raises: ValueError that names missing required flags."""
    try:
        values(argv)
    except flags.IllegalFlagValueError as error:
        missing = re.findall(r"Flag (--\S+) must have a value other than None", str(error))
        if not missing:
            raise
        names, verb = " and ".join(missing), "is" if len(missing) == 1 else "are"
        raise UserError(f"{names} {verb} missing; --help lists the flags.") from None
