"""The record of a cell, cell.json in its directory: its identity, its state and its cost."""

import pathlib

from dit_jax.errors import UserError
from dit_jax.system import files, forms, json_files
from experiments.scaling.fits import table

FILE = "cell.json"
STATES = ("begun", "failed", "done")
COLUMNS = (*table.TEXT, *table.REQUIRED)


def _is_name(value):
    return forms.is_text(value) and bool(value) and value == pathlib.PurePath(value).name


def _are_axes(value):
    # An axis with the name of a fixed column would overwrite that column in the table.
    return isinstance(value, dict) and forms.is_value(value) and value.keys().isdisjoint(COLUMNS)


FORM = {
    "name": _is_name,
    "grid": forms.is_text,
    "size": forms.is_text,
    "steps": forms.list_of(forms.is_count),
    "axes": _are_axes,
    "digest": forms.is_text,
    "state": lambda value: value in list(STATES),
    "pictures": forms.list_of(forms.is_text),
    "error": forms.is_text,
    "traceback": forms.is_text,
    "wall_seconds": forms.is_number,
    "devices": forms.is_count,
    "device": forms.is_text,
    "jax": forms.is_text,
    "git_revision": forms.is_text,
}
COST_KEYS = ("wall_seconds", "devices", "device")  # absent if a cell's process died at once
OPTIONAL_KEYS = {"pictures", "error", "traceback", "jax", "git_revision", *COST_KEYS}


def read(directory: pathlib.Path) -> dict:
    """Reads the record of a cell.

    Raises: FileNotFoundError; OSError; ValueError for a damaged record, with the wrong keys.
    """
    path = directory / FILE
    record = json_files.read_json(path, "the record of a cell")
    if not isinstance(record, dict):
        raise UserError(f"{files.printable(path)} is damaged: it is no record of a cell")
    # A finished cell has run to its end, so the keys of COST_KEYS must be there.
    done = record.get("state") == "done"
    if wrong := forms.invalid_keys(
        record, FORM, OPTIONAL_KEYS - {*COST_KEYS} if done else OPTIONAL_KEYS
    ):
        raise UserError(
            f"{files.printable(path)} is damaged: it is no record of a cell, with a wrong "
            f"{files.list_some(wrong)}"
        )
    return record
