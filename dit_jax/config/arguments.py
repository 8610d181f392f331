"""Strict command-line parser: a wrong word raises an error that shows the right syntax.

absl alone is too lenient. It drops words without a flag, reads `--raw False` as True, and lets a
flag without a value take the next flag as its value. Of a flag that is given twice, absl ignores
the first value.
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
MIN_COLUMNS = 40  # width of --help: absl fails if its indents fill the line
NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d)")  # begins like a flag, but is a value
# Libraries that define flags which no command accepts. absl's --only_check_args, for example, would
# end a command at once, with success.
LIBRARIES = ("absl", "array_record", "grain", "orbax", "tensorflow_datasets")


class ConfigFlag(flags.Flag):
    """The flag --config, whose value is the loaded config.

    Args:
      key: a top-level key that the config must have, such as 'model'.

    Attributes:
      spec: the text of --config, FILE or FILE:ARG.
      overrides: {key: text} of the --config.KEY=VALUE flags.
    """

    def __init__(self, key: str):
        text = "FILE[:ARG] of the config; --config.KEY=VALUE sets a key of it."
        super().__init__(flags.ArgumentParser(), None, "config", None, text)
        self.key, self.spec, self.overrides = key, "", {}

    def load(self, spec: str) -> None:
        """Loads the config.   Raises: as `overrides.load`; ValueError if it lacks `self.key`."""
        config = overrides.load(spec)
        if self.key not in config:
            raise UserError(
                f"--config={spec} has no config.{self.key}: it is the config of another command. "
                "A run's config has config.model, a sweep's has config.grids."
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
    Raises: ValueError for a wrong word, or a config value out of its range; SystemExit after
      --help.
    """
    words = argv[1:]
    # --help must work even if other words are wrong; absl prints the help and exits.
    for word in words:
        if word.startswith("-") and (name := word.lstrip("-")) in HELP:
            columns = shutil.get_terminal_size().columns
            os.environ["COLUMNS"] = str(max(MIN_COLUMNS, columns))  # absl reads this variable
            values([argv[0], "--help" if name == "h" else word])
    # The config is loaded first: the types of its keys decide how the other words are parsed.
    spec = _find_config_spec(words) if "config" in values else None
    if spec is not None:
        values["config"].load(spec)
    flag_texts, unflagged = _split(words, values)
    _check_positionals(unflagged, positionals, values)
    # Each text is checked before absl parses it, for an error that says what the flag takes.
    checked = []
    for name, texts in flag_texts.items():
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
    # After all overrides, which may replace values of the file that are out of range.
    if spec is not None:
        keys.check(values["config"].value)
    _parse_checked([argv[0], *checked], values)
    return [word for word, _ in unflagged]


def _split(words, values):
    """Splits a command line into ({flag name: texts}, [(positional word, flag before it)]).

    Boolean texts are in lower case. The flag before a positional word is for a hint in an error.
    """
    flag_texts, unflagged, previous_flag = {}, [], ""
    queue = collections.deque(words)
    while queue:
        word = queue.popleft()
        if word == "--":  # by convention, no flags follow
            return flag_texts, [*unflagged, *((word, "") for word in queue)]
        if not word.startswith("-") or word == "-":
            unflagged.append((word, previous_flag))
            continue
        name, equals, text = word[2 if word.startswith("--") else 1 :].partition("=")
        boolean = _is_boolean(name, values)
        # --noNAME is absl's second way to write --NAME=false.
        if boolean is None and name.startswith("no") and _is_boolean(name[2:], values):
            if equals:
                raise UserError(f"{word} is given a value: write --{name[2:]}={text}.")
            name, text = name[2:], "false"
        elif boolean is None:
            hint = _suggest_flag(name, values)
            raise UserError(f"unknown flag --{name}.{hint} --help lists the flags.")
        elif boolean and not equals:
            # absl would take the next word for a positional word.
            has_text = queue and queue[0].lower() in ("true", "false")
            text = queue.popleft() if has_text else "true"
        elif not equals:
            # A word that begins with "-" is the next flag, so the value was forgotten.
            if not queue or (queue[0].startswith("-") and not NEGATIVE_NUMBER.match(queue[0])):
                hint = f"; if {queue[0]} is its value, write --{name}={queue[0]}" if queue else ""
                raise UserError(f"--{name} has no value{hint}.")
            text = queue.popleft()
        previous_flag = f"--{name}={text}"
        flag_texts.setdefault(name, []).append(text.lower() if boolean else text)
    return flag_texts, unflagged


def _find_config_spec(words):
    """Returns the value of --config, or None if that flag is not given."""
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
    return bool(values[name].boolean) if _is_accepted(name, values) else None


def _is_accepted(name, values):
    """Returns whether the command accepts a flag; flags of LIBRARIES are refused, except HELP."""
    module = str(values.find_module_defining_flag(name))
    return name in values and (name in HELP or module.partition(".")[0] not in LIBRARIES)


def _suggest_flag(name, values):
    """Returns a hint for an unknown flag, such as ' Did you mean --seed?', or ''."""
    # The prefix is often forgotten: --model instead of --config.model.
    config = values["config"].value if "config" in values else None
    if config is not None and name in config:
        return f" Did you mean --config.{name}?"
    accepted = [flag for flag in values if _is_accepted(flag, values)]
    similar = difflib.get_close_matches(name, accepted, n=1, cutoff=0.7)
    return f" Did you mean --{similar[0]}?" if similar else ""


def _check_positionals(unflagged, names, values):
    """Raises a ValueError, with a hint, if there are more positional words than names."""
    max_words = len(unflagged) if names.endswith("...") else len(names.split())
    if len(unflagged) <= max_words:
        return
    word, previous_flag = unflagged[max_words]  # the first word too many
    name, equals, _ = word.partition("=")
    # The typical causes: a flag without its dashes, and a value or a list written with spaces.
    if equals and (name in values or name.startswith("config.")):
        hint = f" Write --{word}."
    elif previous_flag:
        hint = f" It stands after {previous_flag}{_suggest_value(word, previous_flag, values)}."
    else:
        hint = ""
    takes = f"the command takes {names or 'no words'} without a flag."
    raise UserError(f"{word!r} is not understood: {takes}{hint}")


def _suggest_value(word, previous_flag, values):
    """Returns a hint: how a flag and its value are written so that a stray word belongs to them."""
    flag, _, text = previous_flag.partition("=")
    name = flag.removeprefix("--")
    if name in values:
        parser = values[name].parser
    else:
        parser = overrides.make_parser(values["config"].value, name.removeprefix("config."))
    if isinstance(parser, flags.BooleanParser):
        return f": write {flag}=true or {flag}=false"
    # A plain string may be a list, such as --labels=3,9, but --config is a file.
    is_string = type(parser) in (flags.ArgumentParser, parsers.StringParser) and name != "config"
    ways = []
    if name in values and isinstance(values[name], flags.MultiFlag):
        ways.append(f"{previous_flag} {flag}={word} for two values")
    elif is_string or isinstance(parser, parsers.ListParser | parsers.SizeParser):
        ways.append(f"{previous_flag},{word} for a list")
    if is_string or isinstance(parser, parsers.PathParser):
        ways.append(f"{flag}='{text} {word}' for a text with spaces")
    return f": write {', or '.join(ways)}" if ways else ", which takes one value: leave it out"


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
