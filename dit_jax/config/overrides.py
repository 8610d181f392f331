"""Config of a command: loads the file that --config names and applies --config.KEY=VALUE."""

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
    files.to_path(spec, "--config")  # refuses gs://..., whose colon precedes no argument
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
    try:
        config = _call_get_config(path, [argument] * bool(colon))
    # Typical mistakes in a config raise these exceptions; they get an error without a traceback.
    except (SyntaxError, ImportError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise _explain(error, path, argument) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of --config={spec} returns a {type(config).__name__}; it must return a "
            "ConfigDict, such as that of configs/default.py."
        )
    expand_paths(config)
    return config.lock()  # so that an unknown key is an error, not a new key


def _call_get_config(path, arguments):
    """Imports a config file as MODULE; returns the result of its `get_config`."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config={path} has no function get_config: is it a config?")
    # Checked before the call, because a TypeError of the call may be a bug inside get_config.
    signature = inspect.signature(get_config)
    try:
        signature.bind(*arguments)
    except TypeError:
        problem = f"takes no argument {arguments[0]!r}" if arguments else "needs an argument"
        way_out = f"--config={path}" + ("" if arguments else ":ARG")
        raise UserError(f"get_config{signature} of {path} {problem}: write {way_out}.") from None
    return get_config(*arguments)


def _explain(error, path, argument):
    """Returns the UserError, with file and line, for an exception raised by a config file.

    Other bugs are returned unchanged, so that they keep their traceback.
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
    """Expands a leading `~` in all strings of a config, in place.

    Args:
      prefix: what precedes a key in errors.
    Raises: ValueError for remote paths, as `files.to_path`.
    """
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            expand_paths(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            config[name] = parsers.expand_path(value, prefix + name)


def get_value(config: ConfigDict, key: str):
    """Returns the value of a key such as 'model.depth'.

    Raises: ValueError for an unknown key, with a similar one as a hint; for a group of keys.
    """
    value = config
    parts = key.split(".")
    for i, part in enumerate(parts):
        try:
            value = value[part]
        except (KeyError, TypeError) as error:  # TypeError: the value is no group of keys
            # ml_collections ends its message with a line that names a similar key, if it has one.
            hint = RENAMED.get(part) or str(error.args[0]).rpartition("\n")[2]
            hint = f" {hint}" if part in RENAMED or "Did you mean" in hint else ""
            raise UserError(
                f"unknown config key {'.'.join(parts[: i + 1])!r} in --config.{key}.{hint}\n"
                "All keys are in configs/default.py."
            ) from None
    if isinstance(value, ConfigDict):
        keys = ", ".join(f"--config.{key}.{name}" for name in list(value)[:3])
        raise UserError(f"--config.{key} is a group of keys: set one of them, such as {keys}.")
    return value


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a key to a text, parsed in the key's type.   Raises: ValueError for a wrong one."""
    value = parsers.parse(f"config.{key}", text, _make_parser(config, key))
    # Works on a locked config, and checks the type once more.
    config.update_from_flattened_dict({key: value})


def _make_parser(config, key):
    """Returns the parser of texts for the type of a key's value."""
    value = get_value(config, key)
    if key in sizes.KEYS:
        return parsers.SizeParser()
    if isinstance(value, tuple | list):
        return parsers.ListParser(type(value[0]) if value else None, least=0)
    # The value of a placeholder is None, but it has a type.
    *groups, name = key.split(".")
    kind = functools.reduce(operator.getitem, groups, config).get_type(name)
    if kind is str:
        return parsers.StringParser(f"config.{key}")
    known = {bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser}
    if kind not in known:
        raise UserError(f"--config.{key} is a {kind.__name__}: set it in a file.")
    return known[kind]()
