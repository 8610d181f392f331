"""Config of a command: loads the file of --config and applies --config.KEY=VALUE."""

import functools
import importlib.util
import inspect
import operator
import pathlib
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict

from dit_jax.config import parsers, sizes
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

# {key of an earlier version: hint that names the new keys}
RENAMED_KEYS = {
    "class_dropout_prob": "model.null_condition (whether the model has a null condition) and "
    "objective.condition_dropout (its share in training) replace model.class_dropout_prob."
}
MODULE_NAME = "dit_jax_config_file"  # of an imported config file


def load(spec: str) -> ConfigDict:
    """Loads a config: calls `get_config` of a config file and locks the result.

    Args:
      spec: FILE or FILE:ARG; ARG is passed to `get_config`.
    Raises: OSError if the file does not exist; ValueError if it is no config file, or if
      `get_config` refuses the argument. Other bugs in the file keep their exceptions.
    """
    files.to_path(spec, "--config")  # refuses gs://..., whose colon precedes no argument
    name, colon, argument = spec.partition(":")
    path = files.to_path(name, "--config")
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "is not there"
        raise MissingFileError(f"cannot load --config={name}: {path.absolute()} {reason}.")
    if path.suffix != ".py":
        raise UserError(
            f"--config={name} must be a Python file with a function get_config, such as "
            "configs/default.py. A run's config.json is no such file: give the file that the run "
            "was trained with."
        )
    try:
        config = _call_get_config(path, [argument] if colon else [])
    # Typical mistakes in a config raise these exceptions; the user sees no traceback of them.
    except (SyntaxError, ImportError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise _explain(error, path, argument) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of --config={spec} returns a {type(config).__name__}; it must return a "
            "ConfigDict, as in configs/default.py."
        )
    expand_paths(config)
    return config.lock()  # so that an unknown key is an error, not a new key


def _call_get_config(path, arguments):
    """Imports a config file as MODULE_NAME; returns the result of `get_config`."""
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config={path} has no function get_config: give a config file.")
    # Checked before the call, because a TypeError in the call may be a bug inside get_config.
    signature = inspect.signature(get_config)
    try:
        signature.bind(*arguments)
    except TypeError:
        if arguments:
            problem = f"takes no argument {arguments[0]!r}: write --config={path}"
        else:
            problem = f"needs an argument: write --config={path}:ARG"
        raise UserError(f"get_config{signature} of {path} {problem}.") from None
    return get_config(*arguments)


def _explain(error, path, argument):
    """Returns the UserError, with file and line, for a typical mistake in a config file.

    Other exceptions are returned unchanged, so that they keep their traceback.
    """
    if isinstance(error, SyntaxError):
        return UserError(f"{error.filename}:{error.lineno}: {error.msg}.")
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost line in the config file: deeper frames belong to libraries.
    line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), 0)
    if isinstance(error, ImportError):
        return UserError(
            f"{path}:{line}: {error}. If the module belongs to this project, install the project: "
            "pip install -e DIRECTORY, where DIRECTORY has the project's pyproject.toml."
        )
    if isinstance(error, ValueError):
        # The message of a `raise` in a config says enough; an error of a library needs the line.
        raised_in = pathlib.Path(frames[-1].filename)
        in_config = raised_in == path or raised_in.parent.name == "configs"
        if isinstance(error, UserError) or (in_config and frames[-1].line.startswith("raise ")):
            return UserError(str(error))
        return UserError(f"{path}:{line}: {error}; --traceback shows where.")
    if isinstance(error, KeyError) and error.args == (argument,):
        return UserError(f"--config={path} does not know the argument {argument!r}.")
    # ml_collections raises for an unknown key, and may wrap this error in further errors.
    if "ml_collections" not in pathlib.Path(frames[-1].filename).parts:
        return error
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    # The message lists all fields, then similar ones. Only the similar ones help.
    message, _, fields = str(error.args[0]).partition(" Other fields present")
    hint = fields.strip().splitlines()[-1:] if "Did you mean" in fields else []
    return UserError("\n".join([f"{path}:{line}: {message}", *hint]))


def expand_paths(config: ConfigDict, prefix: str = "config.") -> None:
    """Expands a leading `~` in all strings of a config, in place.

    Args:
      prefix: written before a key in error messages.
    Raises: ValueError for remote paths, as `files.to_path`.
    """
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            expand_paths(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            config[name] = parsers.expand_path(value, prefix + name)


def get_value(config: ConfigDict, key: str):
    """Returns the value of a key such as 'model.depth'.

    Raises: ValueError for an unknown key, with a similar key as a hint; for a group of keys.
    """
    value = config
    parts = key.split(".")
    for i, part in enumerate(parts):
        try:
            value = value[part]
        except (KeyError, TypeError) as error:  # TypeError: the value is no group of keys
            # If a similar key exists, the last line of ml_collections' message names it.
            hint = RENAMED_KEYS.get(part) or str(error.args[0]).rpartition("\n")[2]
            hint = f" {hint}" if part in RENAMED_KEYS or "Did you mean" in hint else ""
            raise UserError(
                f"unknown config key {'.'.join(parts[: i + 1])!r} in --config.{key}.{hint}\n"
                "All keys are in configs/default.py."
            ) from None
    if isinstance(value, ConfigDict):
        keys = ", ".join(f"--config.{key}.{name}" for name in list(value)[:3])
        raise UserError(f"--config.{key} is a group of keys: set one of them, such as {keys}.")
    return value


def override(config: ConfigDict, key: str, text: str) -> None:
    """Parses a text in the type of a key, and sets the key.   Raises: ValueError."""
    value = parsers.parse(f"config.{key}", text, make_parser(config, key))
    # Works on a locked config, and checks the type once more.
    config.update_from_flattened_dict({key: value})


def make_parser(config: ConfigDict, key: str) -> flags.ArgumentParser:
    """Returns the parser for the type of a key's value.   Raises: ValueError as `get_value`."""
    value = get_value(config, key)
    if key in sizes.KEYS:
        return parsers.SizeParser()
    if isinstance(value, tuple | list):
        return parsers.ListParser(type(value[0]) if value else None, min_count=0)
    # The value of a placeholder is None, but it has a type.
    *groups, name = key.split(".")
    kind = functools.reduce(operator.getitem, groups, config).get_type(name)
    if kind is str:
        return parsers.StringParser(f"config.{key}")
    parser_classes = {bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser}
    if kind not in parser_classes:
        raise UserError(f"--config.{key} is a {kind.__name__}: set it in a config file.")
    return parser_classes[kind]()
