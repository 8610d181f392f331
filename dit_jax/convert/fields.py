"""Checks of the JSON files beside weights, whose fields may have values of any type and size."""

import pathlib
from collections.abc import Collection, Mapping, Sequence

from dit_jax.errors import UserError
from dit_jax.system import files, json_files

CONFIG_DESCRIPTION = "the config.json that {} writes beside the weights"
MAX_SIZE = 2**20  # of a size of a model, such as its width
MAX_LAYERS = 1000
MAX_NUMBER = 1e30
MAX_LISTED = 20  # unsupported fields in a message
MAX_CHARACTERS = 300  # of a value in a message


def read(path: pathlib.Path, description: str) -> dict:
    """Returns the fields of a JSON file.

    Args:
      description: what the file must be, to complete "It must be ..." in messages.
    Raises: FileNotFoundError if there is no file; OSError if it cannot be read; ValueError if it is
      damaged, or if it holds no object.
    """
    config = json_files.read_json(path, description)
    if not isinstance(config, dict):
        raise UserError(
            f"cannot read {files.printable(path)}: it holds a {type(config).__name__} instead of "
            f"fields with names. It must be {description}."
        )
    return config


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
    """Returns the config with all fields: a missing one has its default, or its first choice."""
    first_choices = {name: values[0] for name, values in choices.items()}
    return {**defaults, **first_choices, **config}


def list_unsupported(
    config: Mapping, counts: Mapping[str, int], choices: Mapping[str, Collection]
) -> dict[str, str]:
    """Returns {field: supported values, as a text} of the fields with an unsupported value.

    Args:
      counts: field -> its largest value; the smallest is 1.
      choices: field -> its supported values.
    """
    return {
        name: f"a whole number above 0, up to {limit:,}"
        for name, limit in counts.items()
        if not is_count(config.get(name), limit)
    } | {
        name: ", ".join(map(str, values))
        for name, values in choices.items()
        if not any(_is_same(config.get(name), supported) for supported in values)
    }


def _is_same(value, supported):
    # In JSON, unlike in Python, 1 and true differ.
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)


def check_class(path: pathlib.Path, class_name: object, supported: Collection[str]) -> None:
    """Raises ValueError unless the class that a JSON file describes is supported."""
    if class_name not in list(supported):  # a list, since the name may be of any type
        raise UserError(
            f"{files.printable(path)} describes the class {show(class_name)}, but only "
            f"{', '.join(supported)} can be converted. docs/weights.md lists weights to choose "
            "from."
        )


def check_supported(path: pathlib.Path, model: str, config: Mapping, unsupported: Mapping) -> None:
    """Raises ValueError if there are unsupported fields, with a line for each of them.

    Args:
      model: name of the model that the file describes, for messages.
      unsupported: result of `list_unsupported`.
    """
    lines = [
        f"\n  {show(name)}={show(repr(config.get(name)))}; supported: {supported}"
        for name, supported in unsupported.items()
    ]
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"\n  and {len(lines) - MAX_LISTED:,} more"]
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
    """Returns a value as a text for messages, at most MAX_CHARACTERS long.

    A string is shown without quotes, any other value as its repr. Control characters are escaped.
    """
    text = files.printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."
