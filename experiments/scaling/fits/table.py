"""The table of a study: a CSV file with a row for each run at each of its compute points.

| column | |
|---|---|
| cell, grid | names of the run and of its grid in the sweep |
| model, size, patch_size | 'S/2' is size 'S' with patch size 2 |
| network | dit or unet; a unet has empty block, depth, hidden_size, num_heads, patch_size, tokens |
| block, depth, hidden_size, num_heads | of `config.model` |
| tokens, params, gmacs | as in `dit_jax.flops`; gmacs are 1e9 multiply-adds of a forward pass |
| seed, learning_rate, batch_size | of the run |
| optim.weight_decay, ... | other axes of the sweep, each named by its key |
| step, images_seen, train_gflops | progress of training; train_gflops = 6 gmacs images_seen |
| eval_loss, eval_mse, ... | on held-out images with the EMA weights |
| eval_draws | draws of time and noise per held-out image |
| fd_pixels, label_accuracy, fid, ... | measures of samples, as in `dit_jax.evaluate` |
| sampler, sampling_steps, cfg_scale, num | settings and number of the samples |
| extractor, reference | names of the feature extractor and of the reference images |
| device, jax, git_revision | device, version of JAX, revision of the code |
"""

import csv
import io
import pathlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dit_jax.errors import MissingFileError, UserError
from dit_jax.evaluation import curves, queries
from dit_jax.system import files, json_files

TEXT = ("cell", "grid", "model", "network", "size", "block", "sampler", "extractor", "reference")
TEXT += ("device", "jax", "git_revision")  # the other columns have numbers; axes may have both
REQUIRED = ("cell", "model", "patch_size", "block", "depth", "hidden_size", "tokens", "params")
REQUIRED += ("gmacs", "seed", "batch_size", "step", "train_gflops")
# Columns without empty cells.
NEEDED = ("model", "params", "gmacs", "batch_size", "step", "train_gflops")
POSITIVE = (*NEEDED[1:], "patch_size", "depth", "hidden_size", "num_heads", "tokens", "images_seen")
MOST = 1e30  # limit of POSITIVE columns; of larger numbers, powers and squares overflow


def read(path: pathlib.Path, where: Sequence[str] = (), to_draw: bool = False) -> pd.DataFrame:
    """Reads the rows of a table, as `from_rows` returns them.

    Args:
      where: conditions on the rows, as --where of `dit_jax.plot`.
      to_draw: whether to refuse numbers that matplotlib cannot draw.
    Raises: FileNotFoundError; ValueError for a table without a column of REQUIRED, or with two
      columns of one name; ValueError with the line for a number that is invalid or out of range,
      or for a line with more or fewer cells than there are columns.
    """
    if not path.is_file():
        raise MissingFileError(f"no table {path}: python -m experiments.scaling.collect makes it.")
    # pandas.read_csv would fill up lines that were cut off, and round numbers differently.
    try:
        text = json_files.read_bytes(path).decode("utf-8-sig")
        lines = csv.DictReader(io.StringIO(text, newline=""))
        columns, rows = lines.fieldnames or (), list(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table: {error}.") from error
    if missing := [name for name in REQUIRED if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}.")
    if repeated := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        raise UserError(f"{path} has two columns of one name: {', '.join(repeated)}.")
    if not rows:
        raise UserError(f"{path} has no rows.")
    # Line 1 of the file has the names of the columns.
    rows = [_parse_row(row, f"{path}:{line}") for line, row in enumerate(rows, 2)]
    if to_draw:
        for line, row in enumerate(rows, 2):
            curves.check_drawable(f"{path}:{line}", row)
    for condition in where:
        rows = queries.select(rows, condition)
    return from_rows(rows)


def from_rows(rows: Sequence[dict]) -> pd.DataFrame:
    """Returns rows as a DataFrame of nullable types; its columns are all keys of the rows.

    A value is missing if it is None or if its key is absent. NaN is not missing: a loss of NaN must
    not pass for a loss that was not measured.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame({name: _make_column([row.get(name) for row in rows]) for name in names})


def _make_column(values):
    """Returns the values of a column as a nullable array."""
    # An axis such as model.channel_mult has lists, which a file holds as text.
    values = [str(value) if isinstance(value, list | dict) else value for value in values]
    column = pd.array(values)
    has_floats = any(isinstance(value, float) for value in values)
    if not has_floats or column.dtype not in ("Int64", "Float64"):
        return column
    # pandas.array would make NaN missing too.
    missing = np.array([value is None for value in values])
    return pd.arrays.FloatingArray(np.array(values, np.float64), missing)


def to_rows(table: pd.DataFrame) -> list[dict]:
    """Returns the rows of a table as dicts of Python's types; the inverse of `from_rows`."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def check_quality(rows: pd.DataFrame, name: str) -> None:
    """Raises a ValueError if the column has text instead of numbers in some row."""
    values = rows.get(name, ())
    if text := next((value for value in values if isinstance(value, str)), None):
        raise UserError(f"the column {name} has text, such as {text!r}: a quality is a number.")


def write(path: pathlib.Path, rows: Sequence[dict]) -> None:
    """Writes a table; its columns are all keys of the rows, in the order of their first use."""
    # pandas.to_csv would write NaN as an empty cell.
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, names, lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(path, text.getvalue())


def _parse_row(cells, place):
    """Returns the values of a row.   Raises: ValueError with the place; see `read`."""
    # csv.DictReader uses None as the key of surplus cells and as the value of missing cells.
    if None in cells or None in cells.values():
        raise UserError(f"{place}: more or fewer cells than columns.")
    row = {name: _parse_value(name, text, place) for name, text in cells.items()}
    if empty := [name for name in NEEDED if row[name] is None]:
        raise UserError(f"{place}: {', '.join(empty)} must not be empty.")
    if row.get("network") in (None, "dit") and row["tokens"] is None:
        raise UserError(f"{place}: tokens must not be empty for a DiT.")
    for name in POSITIVE:
        if (value := row.get(name)) is not None and not 0 < value <= MOST:
            raise UserError(f"{place}: {name}={value} must be above 0 and at most {MOST}.")
    return row


def _parse_value(name, text, place):
    """Returns the value of a cell.   Raises: ValueError with the place for an invalid number."""
    if name in TEXT or not text:
        return text or None
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        if "." in name:  # an axis of the sweep may have text
            return text
        raise UserError(f"{place}: {name}={text!r} is no number.") from None
