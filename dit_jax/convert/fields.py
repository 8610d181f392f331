"""Checks of fields in the JSON files beside weights. Their values may have any type and size."""

import pathlib
from collections.abc import Collection, Mapping, Sequence

from dit_jax.errors import UserError
from dit_jax.system import files, json_files

BESIDE_WEIGHTS = "the config.json that {} writes beside the weights"
MAX = 2**20  # the largest size of a model, such as a width
MAX_LAYERS = 1000
MAX_NUMBER = 1e30
MAX_LINES = 20  # of a message about wrong fields


def read(path: pathlib.Path, what: str) -> dict:
    """Returns the fields of a JSON file.

    Args:
      what: completes "It must be ..." in messages.
    Raises: FileNotFoundError; OSError; ValueError as `json_files.read_json`, or if it is no object.
    """
    value = json_files.read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(
            f"cannot read {files.printable(path)}: it holds a {type(value).__name__} instead of "
            f"fields with names. It must be {what}."
        )
    return value


def is_count(value: object, most: int = MAX) -> bool:
    """Returns whether a value is a whole number from 1 to `most`."""
    # Not isinstance: True is an int too.
    return type(value) is int and 0 < value <= most


def is_number(value: object) -> bool:
    """Returns whether a value is a number of a magnitude below MAX_NUMBER.

    So it is finite, and a whole number can be converted to a float.
    """
    return type(value) in (int, float) and abs(value) < MAX_NUMBER


def complete(
    config: Mapping, defaults: Mapping[str, object], choices: Mapping[str, Sequence]
) -> dict:
    """Returns the config with the fields that it leaves out: defaults, and first choices."""
    return {**defaults, **{name: values[0] for name, values in choices.items()}, **config}


def list_unsupported(
    config: Mapping, counts: Mapping[str, int], choices: Mapping[str, Collection]
) -> dict[str, str]:
    """Returns {field: what is supported} of the fields with other values.

    Args:
      counts: field with a whole number above 0 -> its largest value.
      choices: field -> its supported values.
    """
    return {
        name: f"a whole number above 0, up to {most:,}"
        for name, most in counts.items()
        if not is_count(config.get(name), most)
    } | {
        name: ", ".join(map(str, values))
        for name, values in choices.items()
        if not any(_is_same(config.get(name), value) for value in values)
    }


def _is_same(value, other):
    # In JSON, unlike in Python, 1 and true differ.
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def check_class(path: pathlib.Path, name: object, known: Collection[str]) -> None:
    """Raises ValueError unless the class that a JSON file names is a known one."""
    if name not in list(known):  # a list, since the name may be of any type
        raise UserError(
            f"{files.printable(path)} describes the class {show(name)}, but only "
            f"{', '.join(known)} can be converted; docs/weights.md lists some."
        )


def check_supported(path: pathlib.Path, model: str, config: Mapping, unsupported: Mapping) -> None:
    """Raises unless no field is unsupported.

    Args:
      model: what the file describes, for messages.
      unsupported: as `list_unsupported` returns it.
    Raises: ValueError with a line for each field: its value, and what is supported.
    """
    lines = [
        f"\n  {show(name)}={show(repr(config.get(name)))}; supported: {what}"
        for name, what in unsupported.items()
    ]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"\n  and {len(lines) - MAX_LINES:,} more"]
    if lines:
        shown = files.printable(path)
        raise UserError(f"{shown} describes {model} of another kind:{''.join(lines)}")


def refuse_pipeline(directory: pathlib.Path, command: str, part: str) -> None:
    """Raises ValueError if a directory is a whole pipeline of diffusers.

    Args:
      command: the one that converts a part.
      part: the name of that part's subdirectory.
    """
    if (directory / "model_index.json").is_file():
        shown = files.printable(directory)
        raise UserError(
            f"{shown} is a whole pipeline: `convert {command} {shown}/{part} DST` takes its {part} "
            f"alone, `convert sd {shown} DST` all of a Stable Diffusion."
        )


def show(value: object, most: int = 300) -> str:
    """Returns a value for messages, cut after `most` characters.

    A string is shown as it is, any other value as Python's repr.
    """
    text = files.printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= most else f"{text[:most]}..."
