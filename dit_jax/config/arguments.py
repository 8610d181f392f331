"""The words of a command, read strictly: each is understood, or refused with the way to write it.

Left to absl, words without a flag are dropped, `--raw False` is True, a flag without its value
takes the next flag for one, and of a flag that is given twice the first is forgotten.
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
LEAST_COLUMNS = 40  # of --help: absl fails where its indents fill the line
NUMBER = re.compile(r"-(\d|\.\d)")  # a value that begins so is no flag
# Their flags are no command's: --only_check_args, say, would end it at once, as if it were done.
LIBRARIES = ("absl", "array_record", "grain", "orbax", "tensorflow_datasets")


class PathParser(flags.ArgumentParser):
    """A flag's value as a local path, or as its text."""

    def __init__(self, name: str, text: bool = False):
        super().__init__()
        self.name, self.text = name, text

    def parse(self, argument: str) -> pathlib.Path | str:
        path = files.to_path(argument, f"--{self.name}")
        return str(path) if self.text else path


class NumbersParser(flags.ArgumentParser):
    """Numbers with commas as a tuple of floats, or of ints."""

    def __init__(self, kind: type, count: int | None = None):
        """Args: count, how many; None is any number from one on."""
        super().__init__()
        self.kind, self.count = kind, count
        example = ",".join(["0.1", "0.8", "1"][: count or 3] if kind is float else ["1", "2"])
        many = f"{count} " if count else ""
        whole = "whole " if kind is int else ""
        self.syntactic_help = f"{many}{whole}numbers with commas, such as {example}"

    def parse(self, argument: str) -> tuple:
        parse = overrides.parse_float if self.kind is float else overrides.parse_int
        numbers = tuple(parse(part) for part in argument.split(","))
        if self.count not in (None, len(numbers)):
            raise UserError(self.syntactic_help)
        return numbers


class SizeParser(flags.ArgumentParser):
    """Pixels of a square's side, or HEIGHTxWIDTH."""

    syntactic_help = f"a whole number in 1..{ranges.MOST_IMAGE_SIZE}, or two, as 256x384"

    def parse(self, argument: str) -> sizes.Size:
        size = sizes.parse(argument)
        if not all(map(ranges.IMAGE_SIZE.holds, sizes.height_and_width(size))):
            raise UserError(self.syntactic_help)
        return size


class ConfigFlag(flags.Flag):
    """--config: its value is the config; `spec` and `overrides` are the words that made it."""

    def __init__(self, key: str):
        """Args: key, that a config of this kind has."""
        text = "FILE[:ARG] of the config; --config.KEY=VALUE sets a key of it."
        super().__init__(flags.ArgumentParser(), None, "config", None, text)
        self.key, self.spec, self.overrides = key, "", {}

    def load(self, spec: str) -> None:
        """Raises: as `overrides.load`; ValueError for a config of another kind."""
        config = overrides.load(spec)
        if self.key not in config:
            raise UserError(
                f"--config={spec} has no config.{self.key}: a sweep's has config.grids, a run's "
                "config.model, and each has its commands."
            )
        self.value, self.spec, self.overrides = config, spec, {}
        self.present, self.using_default_value = 1, False

    def override(self, key: str, text: str) -> None:
        """Raises: as `overrides.override`."""
        overrides.override(self.value, key, text)
        self.overrides[key] = text

    def words(self) -> list[str]:
        """The words that make this config again."""
        changes = [f"--config.{key}={text}" for key, text in self.overrides.items()]
        return [f"--config={self.spec}", *changes]


def parse(
    argv: Sequence[str], positionals: str = "", values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """Parses the flags of a command's words, and returns the words that belong to no flag.

    Args: argv, with the program's name first.   positionals: names of the words without a flag that
      the command takes, such as 'KIND SRC DST'; 'MODEL ...' is any number of them.
      values: the flags that are defined, which get their values.
    Raises: ValueError for anything that is not understood, or for a number of the config that is
      out of its range; SystemExit after --help.
    """
    words = argv[1:]
    for word in words:
        if word.startswith("-") and (name := word.lstrip("-")) in HELP:
            columns = shutil.get_terminal_size().columns
            os.environ["COLUMNS"] = str(max(LEAST_COLUMNS, columns))  # which absl takes
            values([argv[0], "--help" if name == "h" else word])
    spec = _spec(words) if "config" in values else None
    if spec is not None:
        values["config"].load(spec)
    given, others = _split(words, values)
    _check_positionals(others, positionals, values)
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
    if spec is not None:
        ranges.check(values["config"].value)
    _parse_checked([argv[0], *checked], values)
    return [word for word, _ in others]


def _split(words, values):
    """({flag's name: its texts}, [(word without a flag, the flag before it)]).

    Raises: ValueError for a flag that is unknown, lacks its value or takes none.
    """
    given, others, before = {}, [], ""
    left = collections.deque(words)
    while left:
        word = left.popleft()
        if word == "--":
            return given, [*others, *((other, "") for other in left)]
        if not word.startswith("-") or word == "-":
            others.append((word, before))
            continue
        name, equals, text = word[1 + word.startswith("--") :].partition("=")
        boolean = _is_boolean(name, values)
        if boolean is None and name.startswith("no") and _is_boolean(name[2:], values):
            if equals:
                raise UserError(f"{word} is given a value: write --{name[2:]}={text}.")
            name, text = name[2:], "false"
        elif boolean is None:
            raise UserError(f"unknown flag --{name}.{_near(name, values)} --help lists them.")
        elif boolean and not equals:
            follows = left and left[0].lower() in ("true", "false")
            text = left.popleft() if follows else "true"
        elif not equals:
            if not left or (left[0].startswith("-") and not NUMBER.match(left[0])):
                hint = f"; if {left[0]} is its value, write --{name}={left[0]}" if left else ""
                raise UserError(f"--{name} has no value{hint}.")
            text = left.popleft()
        before = f"--{name}={text}"
        given.setdefault(name, []).append(text.lower() if boolean else text)
    return given, others


def _spec(words):
    """The value of --config among the words, or None; its keys' types are needed to read others."""
    for i, word in enumerate(words):
        if match := re.fullmatch(r"--?config(=(.*))?", word, re.DOTALL):
            follows = [word for word in words[i + 1 : i + 2] if not word.startswith("-")]
            return match[2] if match[1] else next(iter(follows), None)
    return None


def _is_boolean(name, values):
    """Whether a flag or a key of the config is true or false; None if there is no such flag."""
    if name.startswith("config.") and "config" in values:
        config = values["config"].value
        if config is None:
            raise UserError(f"--{name} sets a key of --config, which is missing.")
        return isinstance(overrides.get_value(config, name.removeprefix("config.")), bool)
    return bool(values[name].boolean) if _is_defined(name, values) else None


def _is_defined(name, values):
    """Whether the command has such a flag: those of libraries are none, but for --help."""
    module = str(values.find_module_defining_flag(name))
    return name in values and (name in HELP or module.partition(".")[0] not in LIBRARIES)


def _may_repeat(name, values):
    return name in values and isinstance(values[name], flags.MultiFlag)


def _near(name, values):
    """A hint for an unknown flag."""
    config = values["config"].value if "config" in values else None
    if config is not None and name in config:
        return f" Did you mean --config.{name}?"
    defined = [flag for flag in values if _is_defined(flag, values)]
    near = difflib.get_close_matches(name, defined, n=1, cutoff=0.7)
    return f" Did you mean --{near[0]}?" if near else ""


def _check_positionals(others, names, values):
    """Raises: ValueError for more words without a flag than the command has names for."""
    most = len(others) if names.endswith("...") else len(names.split())
    if len(others) <= most:
        return
    word, before = others[most]
    takes = f"takes {names} without a flag" if names else "takes no words without a flag"
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
    """The flag and its text as one word.   Raises: ValueError for a text that it does not take."""
    try:
        value = parser.parse(text)
        if isinstance(value, float):
            overrides.parse_float(text)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(parser, PathParser):
            raise
        kind = parser.syntactic_help
        if isinstance(parser, flags.BooleanParser):
            kind = "true or false"
        elif isinstance(parser, flags.EnumParser):
            kind = f"one of {', '.join(parser.enum_values)}"
        raise UserError(f"--{name}={text} must be {kind or error}.") from None
    return f"--{name}={text}"


def _parse_checked(argv, values):
    """Gives the flags their values.   Raises: ValueError that names those that are missing."""
    try:
        values(argv)
    except flags.IllegalFlagValueError as error:
        missing = re.findall(r"Flag (--\S+) must have a value other than None", str(error))
        if not missing:
            raise
        names, verb = " and ".join(missing), "is" if len(missing) == 1 else "are"
        raise UserError(f"{names} {verb} missing; --help lists the flags.") from None
