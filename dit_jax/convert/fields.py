"""Checks of fields in JSON files that accompany weights. A value may have any type and size."""

import pathlib
from collections.abc import Collection, Mapping, Sequence

from dit_jax.errors import UserError
from dit_jax.system import files, json_files

CONFIG_DESCRIPTION = "the config.json that {} writes beside the weights"
MAX_SIZE = 2**20  # of a model, such as its width
MAX_LAYERS = 1000
MAX_NUMBER = 1e30
MAX_LINES = 20  # in a message about unsupported fields
MAX_SHOWN = 300  # characters of a value in a message


def read(path: pathlib.Path, description: str) -> dict:
    """Returns the fields of a JSON file.

    Args:
      description: completes "It must be ..." in messages.
    Raises: FileNotFoundError if there is no file; OSError if it cannot be read; ValueError if it is
      damaged, or if it holds no object.
    """
    value = json_files.read_json(path, description)
    if not isinstance(value, dict):
        raise UserError(
            f"cannot read {files.printable(path)}: it holds a {type(value).__name__} instead of "
            f"fields with names. It must be {description}."
        )
    return value


def is_count(value: object, limit: int = MAX_SIZE) -> bool:
    """Returns whether a value is a whole number from 1 to `limit`."""
    # isinstance would accept True, which is an int too.
    return type(value) is int and 0 < value <= limit


def is_number(value: object) -> bool:
    """Returns whether a value is a number whose magnitude is below MAX_NUMBER.

    Such a number is finite. If it is a whole number, it can be converted to a float.
    """
    return type(value) in (int, float) and abs(value) < MAX_NUMBER


def complete(
    config: Mapping, defaults: Mapping[str, object], choices: Mapping[str, Sequence]
) -> dict:
    """Returns the config; missing fields get their default or the first of their choices."""
    first_choices = {name: values[0] for name, values in choices.items()}
    return {**defaults, **first_choices, **config}


def list_unsupported(
    config: Mapping, counts: Mapping[str, int], choices: Mapping[str, Collection]
) -> dict[str, str]:
    """Returns {field: description of its supported values} for fields with an unsupported value.

    Args:
      counts: field that must be a whole number above 0 -> its largest value.
      choices: field -> its supported values.
    """
    return {
        name: f"a whole number above 0, up to {limit:,}"
        for name, limit in counts.items()
        if not is_count(config.get(name), limit)
    } | {
        name: ", ".join(map(str, values))
        for name, values in choices.items()
        if not any(_is_same(config.get(name), value) for value in values)
    }


def _is_same(value, other):
    # In JSON, unlike in Python, 1 and true differ.
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def check_class(path: pathlib.Path, name: object, known: Collection[str]) -> None:
    """Raises ValueError unless `name`, the class that a JSON file describes, is known."""
    if name not in list(known):  # a list, since the name may be of any type
        raise UserError(
            f"{files.printable(path)} describes the class {show(name)}, but only "
            f"{', '.join(known)} can be converted. docs/weights.md lists weights to choose from."
        )


def check_supported(path: pathlib.Path, model: str, config: Mapping, unsupported: Mapping) -> None:
    """Raises ValueError if there are unsupported fields.

    The message has a line for each field: its value and its supported values.
    Args:
      model: name of the model that the file describes, for messages.
      unsupported: result of `list_unsupported`.
    """
    lines = [
        f"\n  {show(name)}={show(repr(config.get(name)))}; supported: {supported}"
        for name, supported in unsupported.items()
    ]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"\n  and {len(lines) - MAX_LINES:,} more"]
    if lines:
        shown = files.printable(path)
        raise UserError(f"{shown} describes {model} of another kind:{''.join(lines)}")


def refuse_pipeline(directory: pathlib.Path, command: str, part: str) -> None:
    """Raises ValueError if a directory holds a complete pipeline of diffusers.

    Args:
      command: subcommand of `convert` for one part of the pipeline.
      part: the subdirectory that holds this part.
    """
    if (directory / "model_index.json").is_file():
        shown = files.printable(directory)
        raise UserError(
            f"{shown} holds a complete pipeline. To convert its {part} alone, run "
            f"`convert {command} {shown}/{part} DST`. To convert all of a Stable Diffusion, run "
            f"`convert sd {shown} DST`."
        )


def show(value: object) -> str:
    """Returns a value for messages: a string itself, else its repr; cut after MAX_SHOWN characters.

    Control characters are escaped.
    """
    text = files.printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
