"""The form of what JSON files hold: the keys of an object, and the kind of each value.

Disks damage such files, and strangers write them. A reader names the keys whose values are wrong,
and leaves the object out or refuses it, before any other code meets the values.
"""

import sys
from collections.abc import Callable, Collection, Mapping

from dit_jax.errors import UserError

Holds = Callable[[object], bool]


def is_text(value: object) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_flag(value: object) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float holds; true and false are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 0 that fits 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def is_plain(value: object) -> bool:
    """Whether a value is none, true, false, a text, or a number, which may be NaN or infinite."""
    return value is None or isinstance(value, bool | str | float) or is_number(value)


def is_setting(value: object) -> bool:
    """Whether a value is plain, or a list of plain values."""
    return all(map(is_plain, value)) if isinstance(value, list) else is_plain(value)


def is_value(value: object) -> bool:
    """Whether a value is a setting, or an object of such values."""
    return all(map(is_value, value.values())) if isinstance(value, dict) else is_setting(value)


def optional(holds: Holds) -> Holds:
    """Returns a test that None passes too."""
    return lambda value: value is None or holds(value)


def list_of(holds: Holds) -> Holds:
    """Returns a test for lists, perhaps empty, whose values all pass `holds`."""
    return lambda value: isinstance(value, list) and all(map(holds, value))


def object_of(
    form: Mapping[str, Holds], may_lack: Collection[str] = (), others: Holds = is_value
) -> Holds:
    """Returns a test for objects of a form, whose other values all pass `others`."""

    def holds(value):
        if not isinstance(value, dict):
            return False
        whole = {**dict.fromkeys(value, others), **form}
        return not wrong_keys(value, whole, may_lack)

    return holds


def wrong_keys(
    value: Mapping, form: Mapping[str, Holds], may_lack: Collection[str] = ()
) -> list[str]:
    """The keys of a form that an object lacks, unless it may, or whose values do not pass."""
    return [
        key
        for key, holds in form.items()
        if not (key in may_lack if key not in value else holds(value[key]))
    ]


TYPES = {str: "a str", bool: "a bool", int: "a whole number", float: "a number"}


def check_type(key: str, value: object, kind: type, many: bool = False) -> None:
    """Demands a value of a type of TYPES, or with `many` a list or tuple of such values.

    Any number passes as a whole one: its range says more.
    Raises: ValueError with the key, the value and the type.
    """
    types = (int, float) if kind in (int, float) else (kind,)
    if many and isinstance(value, list | tuple) and all(type(one) in types for one in value):
        return
    if many or type(value) not in types:
        wanted = "a list of numbers" if many else TYPES[kind]
        raise UserError(f"{key}={shorten(value)} must be {wanted}.")


def shorten(value: object) -> str:
    """Returns a value in one line of at most 103 characters, for messages."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


SAMPLE: Mapping[str, Holds] = {  # of a row: how images were sampled, or bits measured
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


def wrong_in_row(row: Mapping) -> list[str]:
    """The wrong keys of a row of evaluations.jsonl, which may lack any but a likelihood's bits.

    Measures, which follow the picture, are numbers or none.
    """
    names = list(row)
    after_picture = names[names.index("picture") + 1 :] if "picture" in row else []
    bits = [name for name in names if name.startswith("bits_per_")]
    measures = dict.fromkeys([*after_picture, *bits], optional(is_number))
    if "likelihood" in row and not bits:
        measures["bits_per_dim"] = is_number
    others = dict.fromkeys(names, is_value)
    return wrong_keys(row, others | measures | dict(ROW), ROW)
