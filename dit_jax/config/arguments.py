"""Strict command-line parser: a word that is not understood is an error with the right syntax.

absl alone is too lenient. It drops words without a flag, reads `--raw False` as True, and lets a
flag without a value take the next flag as its value. If a flag is given twice, it ignores the
first.
"""

import collections
import difflib
import os
import re
import shutil
from collections.abc import Sequence

from absl import flags

from dit_jax.config import keys, overrides, parsers
from dit_jax.errors import UserError

HELP = ("help", "helpshort", "helpfull", "helpxml", "h", "?")
MIN_COLUMNS = 40  # of --help: absl fails if its indents fill the line
NUMBER = re.compile(r"-(\d|\.\d)")  # the beginning of a negative number, which is no flag
# Libraries whose flags no command accepts. absl's --only_check_args, for example, would end a
# command at once, with success.
LIBRARIES = ("absl", "array_record", "grain", "orbax", "tensorflow_datasets")


class ConfigFlag(flags.Flag):
    """The flag --config. Its value is the loaded config.

    Args:
      key: a top-level key that tells configs of the right kind apart, such as 'model'.

    Attributes:
      spec: the text of --config, FILE or FILE:ARG.
      overrides: {key: text} of the --config.KEY=VALUE flags.
    """

    def __init__(self, key: str):
        text = "FILE[:ARG] of the config; --config.KEY=VALUE sets a key of it."
        super().__init__(flags.ArgumentParser(), None, "config", None, text)
        self.key, self.spec, self.overrides = key, "", {}

    def load(self, spec: str) -> None:
        """Loads the flag's value.   Raises: as `overrides.load`; ValueError for another kind."""
        config = overrides.load(spec)
        if self.key not in config:
            raise UserError(
                f"--config={spec} has no config.{self.key}: a sweep's has config.grids, a run's "
                "config.model, and each has its commands."
            )
        self.value, self.spec = config, spec
        self.present, self.using_default_value = 1, False

    def override(self, key: str, text: str) -> None:
        """Sets a key of the config, as `overrides.override`."""
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
            os.environ["COLUMNS"] = str(max(MIN_COLUMNS, columns))  # absl reads this variable
            values([argv[0], "--help" if name == "h" else word])
    # The config comes first: the types of its keys tell how to parse the other words.
    spec = _find_spec(words) if "config" in values else None
    if spec is not None:
        values["config"].load(spec)
    given, others = _split(words, values)
    _check_positionals(others, positionals, values)
    # Each text is checked here, before absl parses it, for errors that say what the flag takes.
    checked = []
    for name, texts in given.items():
        may_repeat = name in values and isinstance(values[name], flags.MultiFlag)
        if len(set(texts)) > 1 and not may_repeat:
            raise UserError(
                f"--{name} is given {len(texts)} times, as {' and '.join(texts)}: leave one of "
                "them. A list is one word with commas."
            )
        if name.startswith("config."):
            values["config"].override(name.removeprefix("config."), texts[0])
        elif name != "config":
            for text in texts:
                parsers.parse(name, text, values[name].parser)
                checked.append(f"--{name}={text}")
    # After all overrides, because the file alone may be out of range.
    if spec is not None:
        keys.check(values["config"].value)
    _parse_checked([argv[0], *checked], values)
    return [word for word, _ in others]


def _split(words, values):
    """Splits a command line into ({flag name: texts}, [(positional word, flag before it)]).

    Boolean texts are in lower case. The flag before a positional word is for a hint in its error.
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


def _find_spec(words):
    """Returns the value of --config, or None without one.

    It is searched before the other words are parsed, because they need the config's types.
    """
    for i, word in enumerate(words):
        if word.startswith(("-config=", "--config=")):
            return word.partition("=")[2]
        if word in ("-config", "--config") and words[i + 1 :] and words[i + 1][:1] != "-":
            return words[i + 1]
    return None


def _is_boolean(name, values):
    """Returns whether a flag or config key is boolean, or None if the flag does not exist."""
    if name.startswith("config.") and "config" in values:
        if values["config"].value is None:
            raise UserError(f"--{name} sets a key of --config, which is missing.")
        value = overrides.get_value(values["config"].value, name.removeprefix("config."))
        return isinstance(value, bool)
    return bool(values[name].boolean) if _is_defined(name, values) else None


def _is_defined(name, values):
    """Returns whether the command accepts a flag; flags of LIBRARIES are refused, except HELP."""
    module = str(values.find_module_defining_flag(name))
    return name in values and (name in HELP or module.partition(".")[0] not in LIBRARIES)


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
    """Raises a ValueError, with a hint, if there are more positional words than their names."""
    most = len(others) if names.endswith("...") else len(names.split())
    if len(others) <= most:
        return
    word, before = others[most]  # the first word too many
    flag, _, text = before.partition("=")
    name = word.partition("=")[0]
    # The typical causes: a flag without its dashes, and a value or a list written with spaces.
    if name != word and (name in values or name.startswith("config.")):
        hint = f" Write --{word}."
    elif text.lower() in ("true", "false"):
        hint = f" It stands after {before}: write {flag}=true or {flag}=false."
    elif before:
        hint = (
            f" It stands after {before}: write {before},{word} for a list, {flag}='{text} {word}' "
            "for a text with spaces."
        )
    else:
        hint = ""
    takes = names or "no words"
    raise UserError(f"{word!r} is not understood: the command takes {takes} without a flag.{hint}")


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
