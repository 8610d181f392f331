"""Config of a command: loads the file that --config names and applies --config.KEY=VALUE."""

import ast
import functools
import importlib.util
import inspect
import math
import operator
import pathlib
import sys
import traceback
from importlib.machinery import SourceFileLoader

from ml_collections import ConfigDict

from dit_jax.config import sizes
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

# Keys of earlier versions, with what replaces them.
RENAMED = {
    "class_dropout_prob": "model.null_condition (whether the model has a null condition) and "
    "objective.condition_dropout (its share in training) replace model.class_dropout_prob."
}
MODULE = "dit_jax_config_file"  # the module name under which a config file is imported


def load(spec: str) -> ConfigDict:
    """Loads a config: calls `get_config` of a config file and locks the result.

    Args:
      spec: FILE or FILE:ARG; ARG is passed to `get_config`.
    Raises: OSError if the file does not exist; ValueError if it is no config or does not take the
      argument, or as `get_config`. Other bugs in the file keep their exceptions.
    """
    # Refuses remote paths; it takes the whole spec because "gs://..." has a colon too.
    files.to_path(spec, "--config")
    name, colon, argument = spec.partition(":")
    path = files.to_path(name, "--config")
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "is not there"
        raise MissingFileError(f"cannot load --config={name}: {path.absolute()} {reason}.")
    if path.suffix != ".py":
        raise UserError(
            f"--config={name} must be a Python file with a function get_config, such as "
            "configs/default.py. A run's config.json is none: its command has the config."
        )
    # Typical mistakes in a config raise these exceptions; they get an error without a traceback.
    try:
        get_config = _import(path).get_config
        arguments = [argument] * bool(colon)
        _check_signature(name, get_config, arguments)
        config = get_config(*arguments)
    except (SyntaxError, ImportError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise _explained(error, path, argument) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of --config={spec} returns a {type(config).__name__}; it must return a "
            "ConfigDict, such as that of configs/default.py."
        )
    expand_paths(config)
    return config.lock()  # so that an unknown key is an error, not a new key


def _import(path):
    """Imports a config file as MODULE.   Raises: ValueError if it has no get_config."""
    spec = importlib.util.spec_from_file_location(
        MODULE, path, loader=SourceFileLoader(MODULE, str(path))
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={path} has no function get_config: is it a config?")
    return module


def _check_signature(name, get_config, arguments):
    """Raises a ValueError if get_config does not take these arguments.

    Args:
      name: the config file, for the message.
      arguments: the text after the colon in --config, or nothing.
    """
    # Checked before the call, because a TypeError of the call may be a bug inside get_config.
    signature = inspect.signature(get_config)
    try:
        signature.bind(*arguments)
    except TypeError:
        given = f"takes no argument {arguments[0]!r}" if arguments else "needs an argument"
        way_out = f"--config={name}" + ("" if arguments else ":ARG")
        raise UserError(f"get_config{signature} of {name} {given}: write {way_out}.") from None


def _explained(error, path, argument):
    """Returns the UserError, with file and line, for an exception raised by a config file.

    Other bugs are returned unchanged, so that they keep their traceback.

    Args:
      argument: the text after the colon in --config.
    """
    if isinstance(error, SyntaxError):
        return UserError(f"{error.filename}:{error.lineno}: {error.msg}.")
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost line in the config itself: the frames below it belong to libraries.
    line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), 0)
    if isinstance(error, ImportError):
        return UserError(
            f"{path}:{line}: {error}. If that is a part of this project, install it: pip install "
            "-e DIRECTORY, where DIRECTORY has its pyproject.toml."
        )
    if isinstance(error, ValueError):
        # A config refuses an argument by `raise`; an error of a library needs its place.
        raised_in = pathlib.Path(frames[-1].filename)
        in_config = raised_in == path or raised_in.parent.name == "configs"
        if isinstance(error, UserError) or (in_config and frames[-1].line.startswith("raise ")):
            return UserError(str(error))
        return UserError(f"{path}:{line}: {error}; --traceback shows where.")
    if isinstance(error, KeyError) and error.args == (argument,):
        return UserError(f"--config={path} does not know the argument {argument!r}.")
    # ml_collections raises for an unknown key; its errors may be wrapped in each other.
    if "ml_collections" not in pathlib.Path(frames[-1].filename).parts:
        return error
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    # The message lists all fields, then similar ones. Only the similar ones help.
    first, _, rest = str(error.args[0]).partition(" Other fields present")
    hint = rest.strip().splitlines()[-1:] if "Did you mean" in rest else []
    return UserError("\n".join([f"{path}:{line}: {first}", *hint]))


def expand_paths(config: ConfigDict, prefix: str = "config.") -> None:
    """Expands a leading `~` in all strings of a config, in place; only paths begin with `~`.

    Args:
      prefix: what precedes a key in errors.
    Raises: ValueError for remote paths, as `files.to_path`.
    """
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            expand_paths(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            config[name] = _local(value, prefix + name)


def _local(text, name):
    """Returns a string, with `~` expanded if it begins with one.

    Raises: ValueError for a remote path.
    """
    if text.startswith("~") or "://" in text:
        return str(files.to_path(text, name))
    return text


def get_value(config: ConfigDict, key: str):
    """Returns the value of a key such as 'model.depth'.

    Raises: ValueError for an unknown key, with a similar one as a hint; for a group of keys.
    """
    value = config
    for i, part in enumerate(key.split(".")):
        try:
            value = value[part]
        except (KeyError, TypeError) as error:  # TypeError: the value is no group of keys
            # ml_collections ends its message with a line that names a similar key, if it has one.
            hint = str(error.args[0]).rpartition("\n")[2]
            hint = f" {hint}" if "Did you mean" in hint else ""
            hint = f" {RENAMED[part]}" if part in RENAMED else hint
            raise UserError(
                f"unknown config key {'.'.join(key.split('.')[: i + 1])!r} in --config.{key}."
                f"{hint}\nAll keys are in configs/default.py."
            ) from None
    if isinstance(value, ConfigDict):
        keys = ", ".join(f"--config.{key}.{name}" for name in list(value)[:3])
        raise UserError(f"--config.{key} is a group of keys: set one of them, such as {keys}.")
    return value


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a key to the value of a text, parsed in the type of the current value.

    Raises: ValueError for an unknown key, or a text of another type.
    """
    before = _example(config, key)
    if isinstance(before, str):  # a string needs no quotes and is not parsed
        value = _local(text, f"--config.{key}")
    else:
        try:
            value = sizes.parse(text) if key in sizes.KEYS else _parse(text, before)
        except ValueError as error:
            raise UserError(f"--config.{key}={text} must be {error}.") from None
    # Works on a locked config, and checks the type once more.
    config.update_from_flattened_dict({key: value})


def _example(config, key):
    """Returns the value of a key; for a placeholder, whose value is None, any value of its type."""
    if (value := get_value(config, key)) is not None:
        return value
    *groups, name = key.split(".")
    return functools.reduce(operator.getitem, groups, config).get_type(name)()


def _parse(text, example):
    """Returns the value of a text in the type of `example`.

    Raises: ValueError whose message completes "KEY=TEXT must be ...".
    """
    if isinstance(example, bool):  # before int: True is an int
        return parse_bool(text)
    if isinstance(example, int):
        return parse_int(text)
    if isinstance(example, float):
        return parse_float(text)
    if isinstance(example, tuple | list):
        return _parse_list(text, example)
    raise UserError(f"set in a file: it is a {type(example).__name__}")


def parse_bool(text: str) -> bool:
    """Returns True or False.   Raises: ValueError for a text that is neither true nor false."""
    if text.lower() not in ("true", "t", "1", "false", "f", "0"):
        raise UserError("true or false")
    return text.lower() in ("true", "t", "1")


def parse_int(text: str) -> int:
    """Returns an int.   Raises: ValueError for a text that is no whole number."""
    try:
        return int(text)
    except ValueError:
        raise UserError("a whole number, such as 1000") from None


def parse_float(text: str) -> float:
    """Returns a finite float.   Raises: ValueError for any other text, such as 'nan'."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError("a number, such as 0.5 or 1e-4")
    return number


def _parse_list(text, example):
    """Returns a tuple or list whose values have the type of the example's first value.

    An empty example takes numbers.
    Raises: ValueError whose message completes "KEY=TEXT must be ...".
    """
    first = example[0] if len(example) else 0.0
    shown = "('a', 'b')" if isinstance(first, str) else "(1, 2)"
    # "(1, 2)" and "1,2" are both Python; unquoted names such as "a,b" are not, so they are split.
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        values = text.split(",") if isinstance(first, str) else None
    values = values if isinstance(values, tuple | list) else (values,)
    try:
        return type(example)(_like(value, first, bool(example)) for value in values)
    except ValueError:
        kind = {str: "texts", int: "whole numbers", bool: "true or false"}
        raise UserError(f"{kind.get(type(first), 'values')} like {shown}") from None


def _like(value, example, strict):
    """Returns a value converted to the type of `example`.

    Args:
      strict: whether an int becomes a float like the example. False for an empty example, whose
        type is only a guess, so ints stay ints.
    Raises: ValueError, without a message, for a value of another type.
    """
    if isinstance(example, tuple | list):
        if not isinstance(value, tuple | list):
            raise UserError  # `_parse_list` writes the message
        return tuple(_like(v, example[0] if example else 0.0, bool(example)) for v in value)
    if isinstance(example, float) and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise UserError
        return float(value) if strict else value
    if type(value) is not type(example) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError
    return value
