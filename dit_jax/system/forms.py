"""Schemas of JSON objects: the expected keys, and a test for the value of each key.

JSON files may be damaged on disk or written by strangers. So a reader checks every object with a
schema before other code uses its values. It skips or refuses an object with wrong values.
"""

import sys
from collections.abc import Callable, Collection, Mapping

from dit_jax.errors import UserError

Holds = Callable[[object], bool]  # test of a value


def is_text(value: object) -> bool:
    """Returns whether a value is a string."""
    return isinstance(value, str)


def is_flag(value: object) -> bool:
    """Returns whether a value is True or False."""
    return isinstance(value, bool)


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number in the range of a float; bools are no numbers."""
    # NaN fails the comparison too.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_positive(value: object) -> bool:
    """Returns whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_count(value: object) -> bool:
    """Returns whether a value is a whole number in 0..2**63-1."""
    return type(value) is int and 0 <= value < 2**63


def is_plain(value: object) -> bool:
    """Returns whether a value is None, a bool, a string or a number; NaN and infinity pass too."""
    return value is None or isinstance(value, bool | str | float) or is_number(value)


def is_setting(value: object) -> bool:
    """Returns whether a value is plain, or a list of plain values."""
    return all(map(is_plain, value)) if isinstance(value, list) else is_plain(value)


def is_value(value: object) -> bool:
    """Returns whether a value is a setting, or an object whose values all pass `is_value`."""
    return all(map(is_value, value.values())) if isinstance(value, dict) else is_setting(value)


def optional(holds: Holds) -> Holds:
    """Returns a test that accepts None and all values that pass `holds`."""
    return lambda value: value is None or holds(value)


def list_of(holds: Holds) -> Holds:
    """Returns a test for lists whose values all pass `holds`; empty lists pass."""
    return lambda value: isinstance(value, list) and all(map(holds, value))


def object_of(
    form: Mapping[str, Holds], optional_keys: Collection[str] = (), others: Holds = is_value
) -> Holds:
    """Returns a test for objects.

    Args:
      form: {key: test of its value}.
      optional_keys: the keys of `form` that an object may lack.
      others: the test for the values of all other keys.
    """

    def holds(value):
        if not isinstance(value, dict):
            return False
        # Every key of the object gets a test: its own from the form, or else `others`.
        whole = {**dict.fromkeys(value, others), **form}
        return not invalid_keys(value, whole, optional_keys)

    return holds


def invalid_keys(
    value: Mapping, form: Mapping[str, Holds], optional_keys: Collection[str] = ()
) -> list[str]:
    """Returns the keys of a form that are missing in an object or have a wrong value.

    Args:
      form: {key: test of its value}.
      optional_keys: the keys that the object may lack.
    """
    return [
        key
        for key, holds in form.items()
        if not (key in optional_keys if key not in value else holds(value[key]))
    ]


# The names of types in messages.
TYPES = {str: "a str", bool: "a bool", int: "a whole number", float: "a number"}


def check_type(key: str, value: object, kind: type, many: bool = False) -> None:
    """Raises unless a value has the type `kind`.

    An int may be given for a float and a float for an int; `ranges` checks for whole numbers.

    Args:
      kind: a key of TYPES.
      many: whether the value must be a list or tuple of such values.
    Raises: ValueError with the key, the value and the type.
    """
    types = (int, float) if kind in (int, float) else (kind,)
    if many and isinstance(value, list | tuple) and all(type(one) in types for one in value):
        return
    if many or type(value) not in types:
        expected = "a list of numbers" if many else TYPES[kind]
        raise UserError(f"{key}={shorten(value)} must be {expected}.")


def shorten(value: object) -> str:
    """Returns a value as one line of at most 103 characters, for messages."""
    # A ConfigDict's own repr has several lines.
    value = value.to_dict() if hasattr(value, "to_dict") else value
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# The settings in a row of evaluations.jsonl: how images were sampled, or bits were measured.
SAMPLE: Mapping[str, Holds] = {
    "sampler": is_text,
    "steps": is_count,
    "grid": is_text,
    "cfg_scale": is_number,
    "num": is_count,
    "seed": is_count,
    "labels": is_text,
    "raw": is_flag,
    "vae_digest": is_text,
    "guide": optional(is_text),
    "guide_step": optional(is_count),
}
# A row of evaluations.jsonl, without its measures.
ROW: Mapping[str, Holds] = {
    "step": is_count,
    "sample": object_of(SAMPLE, SAMPLE, others=is_setting),
    "samples": object_of({"num": is_count}),
    "likelihood": object_of(SAMPLE, SAMPLE, others=is_setting),
    "extractor": optional(object_of({})),
    "reference": optional(object_of({})),
    "picture": is_text,
    "params": is_number,
    "gmacs": is_number,
    "images_seen": is_number,
    "train_gflops": is_number,
    "img_per_s": optional(is_number),
    "seconds": optional(is_number),
    "device": is_text,
    "jax": is_text,
    "git_revision": is_text,
}


def invalid_row_keys(row: Mapping) -> list[str]:
    """Returns the keys of a row of evaluations.jsonl that have wrong values.

    A row may lack any key, but with 'likelihood' it needs a 'bits_per_...'. Measures are numbers or
    None; they are the keys after 'picture', and 'bits_per_...'.
    """
    # Measures have no fixed names, so they are recognised by their place in the row.
    names = list(row)
    after_picture = names[names.index("picture") + 1 :] if "picture" in row else []
    bits = [name for name in names if name.startswith("bits_per_")]
    measures = dict.fromkeys([*after_picture, *bits], optional(is_number))
    if "likelihood" in row and not bits:
        measures["bits_per_dim"] = is_number
    others = dict.fromkeys(names, is_value)
    return invalid_keys(row, others | measures | dict(ROW), ROW)
