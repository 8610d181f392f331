"""The table of a study: a CSV file with a row for each run at each of its compute points.

| column | |
|---|---|
| cell, grid | the run's name in its sweep, and which of the sweep's grids it is of |
| model, size, patch_size | 'S/2' is size 'S' with patch size 2 |
| network | dit or unet, of which the next columns and patch_size and tokens are empty |
| block, depth, hidden_size, num_heads | of `config.model` |
| tokens, params, gmacs | `dit_jax.flops`: patches of an image, multiply-adds of one pass in 1e9 |
| seed, learning_rate, batch_size | of the run |
| optim.weight_decay, ... | other axes of the sweep, by their keys |
| step, images_seen, train_gflops | how far it is; 6 gmacs images_seen |
| eval_loss, eval_mse, ... | of held-out images, by the EMA weights, eval_draws times |
| fd_pixels, label_accuracy, fid, ... | of samples, as `dit_jax.evaluate` names them |
| sampler, sampling_steps, cfg_scale, num | how they were drawn, and how many |
| extractor, reference, device, jax, git_revision | by what, against what, on what, by which code |
"""

import csv
import io
import pathlib

from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, json_files

TEXT = ("cell", "grid", "model", "network", "size", "block", "sampler", "extractor", "reference")
TEXT += ("device", "jax", "git_revision")  # all else are numbers, but for a sweep's other axes
REQUIRED = ("cell", "model", "patch_size", "block", "depth", "hidden_size", "tokens", "params")
REQUIRED += ("gmacs", "seed", "batch_size", "step", "train_gflops")
NEEDED = ("params", "gmacs", "batch_size", "step", "train_gflops")  # in no row empty
POSITIVE = (*NEEDED, "patch_size", "depth", "hidden_size", "num_heads", "tokens", "images_seen")
MOST = 1e30  # of these; beyond it, powers and squares of them overflow


def read(path: pathlib.Path) -> list[dict]:
    """The rows: text, int or float; None where a cell is empty.

    Raises: FileNotFoundError; ValueError for a table without columns that all need, or with two of
      one name; and, with the line, for a number that is none or out of range, or more cells or
      fewer than columns.
    """
    if not path.is_file():
        raise MissingFileError(f"no table {path}: python -m experiments.scaling.collect makes it.")
    try:
        lines = csv.DictReader(
            io.StringIO(json_files.read_bytes(path).decode("utf-8-sig"), newline="")
        )
        columns, rows = lines.fieldnames or (), list(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table: {error}.") from error
    if missing := [name for name in REQUIRED if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}.")
    if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        raise UserError(f"{path} has two columns of one name: {', '.join(twice)}.")
    return [_row(line, f"{path}:{number}") for number, line in enumerate(rows, 2)]


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """All rows, with the names of all of them as columns in the order of their first use."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, names, lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(path, text.getvalue())


def _row(line, place):
    if None in line or None in line.values():
        raise UserError(f"{place}: more cells or fewer than there are columns.")
    row = {name: _value(name, text, place) for name, text in line.items()}
    if empty := [name for name in NEEDED if row[name] is None]:
        raise UserError(f"{place}: {', '.join(empty)} must not be empty.")
    for name in POSITIVE:
        if (value := row.get(name)) is not None and not 0 < value <= MOST:
            raise UserError(f"{place}: {name}={value} must be above 0 and at most {MOST}.")
    return row


def _value(name, text, place):
    if name in TEXT or not text:
        return text or None
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        if "." in name:
            return text
        raise UserError(f"{place}: {name}={text!r} is no number.") from None
