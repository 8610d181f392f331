"""The record of a cell: the file cell.json in its directory, with its identity, state and cost."""

import pathlib

from dit_jax.errors import UserError
from dit_jax.system import files, json_files, schemas
from experiments.scaling.fits import table

FILE = "cell.json"
STATES = ("begun", "failed", "done")
COLUMNS = (*table.TEXT, *table.REQUIRED)


def _is_name(value):
    return schemas.is_string(value) and bool(value) and value == pathlib.PurePath(value).name


def _are_axes(value):
    # An axis with the name of a fixed column would overwrite that column in the table.
    return isinstance(value, dict) and schemas.is_value(value) and value.keys().isdisjoint(COLUMNS)


FORM = {  # keys of the record, and checks of their values
    "name": _is_name,
    "grid": schemas.is_string,
    "size": schemas.is_string,
    "steps": schemas.list_of(schemas.is_count),
    "axes": _are_axes,
    "digest": schemas.is_string,
    "state": lambda value: value in list(STATES),
    "pictures": schemas.list_of(schemas.is_string),
    "error": schemas.is_string,
    "traceback": schemas.is_string,
    "wall_seconds": schemas.is_number,
    "devices": schemas.is_count,
    "device": schemas.is_string,
    "jax": schemas.is_string,
    "git_revision": schemas.is_string,
}
COST_KEYS = ("wall_seconds", "devices", "device")  # absent if a cell's process died at once
OPTIONAL_KEYS = {"pictures", "error", "traceback", "jax", "git_revision", *COST_KEYS}


def read(directory: pathlib.Path) -> dict:
    """Reads the record of a cell.

    Raises: FileNotFoundError; OSError; ValueError with the invalid keys of a damaged record.
    """
    path = directory / FILE
    record = json_files.read_json(path, "the record of a cell")
    if not isinstance(record, dict):
        raise UserError(f"{files.printable(path)} is damaged: it is no record of a cell")
    # A finished cell has run to its end, so the keys of COST_KEYS must be there.
    done = record.get("state") == "done"
    optional = OPTIONAL_KEYS - {*COST_KEYS} if done else OPTIONAL_KEYS
    if invalid_keys := schemas.list_invalid_keys(record, FORM, optional):
        raise UserError(
            f"{files.printable(path)} is damaged: it is no record of a cell, with a wrong "
            f"{files.list_some(invalid_keys)}"
        )
    return record
