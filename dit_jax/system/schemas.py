"""Schemas of JSON objects: the expected keys, and a check for the value of each key.

JSON files may be damaged on disk or written by strangers. So a reader checks every object with a
schema, and skips or refuses an object with wrong values, before other code uses the values.
"""

import sys
from collections.abc import Callable, Collection, Mapping

Check = Callable[[object], bool]
Schema = Mapping[str, Check]  # {key: check of its value}


def is_string(value: object) -> bool:
    """Returns whether a value is a string."""
    return isinstance(value, str)


def is_bool(value: object) -> bool:
    """Returns whether a value is True or False."""
    return isinstance(value, bool)


def is_number(value: object) -> bool:
    """Returns whether a value is a finite int or float in a float's range, and not a bool."""
    # The comparison is False for NaN.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_positive(value: object) -> bool:
    """Returns whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_count(value: object) -> bool:
    """Returns whether a value is a whole number in 0..2**63-1."""
    return type(value) is int and 0 <= value < 2**63


def is_scalar(value: object) -> bool:
    """Returns whether a value is None, a bool, a string, a float or an int in a float's range."""
    return value is None or isinstance(value, bool | str | float) or is_number(value)


def is_setting(value: object) -> bool:
    """Returns whether a value is a scalar, or a list of scalars."""
    return all(map(is_scalar, value)) if isinstance(value, list) else is_scalar(value)


def is_value(value: object) -> bool:
    """Returns whether a value is a setting, or an object of values at any depth."""
    return all(map(is_value, value.values())) if isinstance(value, dict) else is_setting(value)


def optional(check: Check) -> Check:
    """Returns a check that also accepts None."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """Returns a check for lists whose values all pass `check`; empty lists pass too."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def object_of(
    schema: Schema, optional_keys: Collection[str] = (), check_unknown: Check = is_value
) -> Check:
    """Returns a check for objects; `check_unknown` checks the values of keys outside the schema."""

    def check(value):
        if not isinstance(value, dict):
            return False
        full_schema = {**dict.fromkeys(value, check_unknown), **schema}
        return not list_invalid_keys(value, full_schema, optional_keys)

    return check


def list_invalid_keys(
    value: Mapping, schema: Schema, optional_keys: Collection[str] = ()
) -> list[str]:
    """Lists the keys of a schema that have a wrong value, or are missing and not optional."""

    def is_valid(key, check):
        return check(value[key]) if key in value else key in optional_keys

    return [key for key, check in schema.items() if not is_valid(key, check)]
