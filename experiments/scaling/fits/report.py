"""The page of a study: a template that is filled with tables, fits, figures and cost.

A template names the fields of `make_fields` in braces, so that no number is typed by hand. The
syntax is that of str.format without attributes; a width has at most three digits.
"""

import os
import pathlib
import re
import string

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from dit_jax.system import json_files, schemas
from experiments.scaling.fits import contrasts, fit, selection, summary, table

MOST_PAGE_BYTES = 16 * 2**20  # bytes of a template; also characters of the filled page
COST = {  # keys that `collect.sum_costs` returns, and checks of their values
    "cells": schemas.is_count,
    "hours": schemas.is_number,
    "devices": schemas.list_of(schemas.is_string),
}


def make_fields(
    table_path: pathlib.Path, qualities: list[str], out: pathlib.Path, used_names: set[str]
) -> dict:
    """Returns the fields that a template may name.

    Args: out, path of the page.   used_names, of the template: only their fits are made.
    Returns:
      table: the models at the last step.
      figures: images of all figures in figures/ beside the table, by name.
      cost: text, from the table's .cost.json.
      rows, cells, models, seeds: how many.   steps: text.
      range: the largest gmacs over the smallest.
      at: {model: row at the last step}, as `average_last_step`.
      <quality>: `fit.fit_study`.   <quality>_summary: the same as text.
      <quality>_networks: `contrasts.compare_networks` as text.
    Raises: FileNotFoundError; ValueError as `fit.fit_study` and `contrasts.compare_networks`.
    """
    rows = table.read(table_path)
    for quality in qualities:
        table.check_quality(rows, quality)
    measured = [name for name in qualities if name in rows and rows[name].notna().any()]
    models = average_last_step(rows, measured)
    fields = {
        "table": format_models(models, measured),
        "figures": link_figures(table_path.parent / "figures", out.parent),
        "cost": describe_cost(table_path.with_suffix(".cost.json")),
        "rows": len(rows),
        "cells": rows["cell"].nunique(),
        "models": len(models),
        "seeds": rows["seed"].nunique(dropna=False),
        "steps": ", ".join(f"{step:,}" for step in sorted(rows["step"].unique())),
        "range": rows["gmacs"].max() / rows["gmacs"].min(),
        "at": models,
    }
    for name in measured:
        # Only fits that the template uses: for a table of several networks, a fit would raise.
        if {name, f"{name}_summary"} & used_names:
            fields[name] = fit.fit_study(rows, name)
            fields[f"{name}_summary"] = f"```\n{summary.format_study(fields[name])}\n```"
        if f"{name}_networks" in used_names:
            pairs = summary.format_networks(contrasts.compare_networks(rows, name), name)
            fields[f"{name}_networks"] = f"```\n{pairs}\n```"
    return fields


def average_last_step(rows: pd.DataFrame, qualities: list[str]) -> dict[str, dict]:
    """Returns {model: row} at the last step, the model with the least gmacs first.

    Each quality is the mean over seeds. <quality>_std is the standard deviation between seeds, if
    there are several. A model's name includes its settings that differ in the table, as in
    'M/1 in-context learning_rate=0.001'.
    """
    rows = selection.select_last_step(rows).sort_values("gmacs", kind="stable")
    settings = ["learning_rate", "batch_size", *(name for name in rows if "." in name)]
    varied = [name for name in settings if name in rows and rows[name].nunique(dropna=False) > 1]
    results = {}
    for _, seeds in rows.groupby(selection.name_models(rows), sort=False):
        row = table.to_rows(seeds[:1])[0]
        words = [row["model"]]
        words += [row["block"]] if row["block"] not in ("adaLN-Zero", None) else []
        words += [f"{column.rpartition('.')[2]}={row[column]}" for column in varied]
        name = " ".join(words)
        if name in results:  # tables joined by hand may use one name for two sizes
            name += f" {row['hidden_size']}x{row['depth']}"
        results[name] = dict(row, seeds=len(seeds))
        for quality in qualities:
            if seeds[quality].isna().any():
                raise UserError(f"the column {quality} is empty at the last step of {name}.")
            values = seeds[quality].to_numpy(float)
            results[name][quality] = float(np.mean(values))
            if len(values) > 1:
                results[name][f"{quality}_std"] = float(np.std(values, ddof=1))
    return results


def format_models(models: dict[str, dict], qualities: list[str]) -> str:
    """Returns a Markdown table with a row per model; qualities have the deviation between seeds.

    Args: models, as `average_last_step` returns them.
    """
    names = ["model", "hidden", "depth", "tokens", "params", "gmacs", *qualities]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row in models.items():
        sizes = (row["hidden_size"], row["depth"], row["tokens"])  # None for a UNet
        cells = [name, *("" if size is None else size for size in sizes)]
        cells += [f"{row['params']:,}", f"{row['gmacs']:.3g}"]
        for quality in qualities:
            deviation = row.get(f"{quality}_std")
            suffix = "" if deviation is None else f" ± {deviation:.2g}"
            cells.append(f"{row[quality]:.4g}{suffix}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def link_figures(directory: pathlib.Path, page_directory: pathlib.Path) -> dict[str, str]:
    """Returns {name: image in Markdown} for the PNGs of a directory, relative to the page."""
    return {
        path.stem: f"![{path.stem}]({os.path.relpath(path, page_directory)})"
        for path in sorted(directory.glob("*.png"))
    }


def describe_cost(path: pathlib.Path) -> str:
    """Returns '12 cells, 1.5 hours added up, each on 1 x cpu', or 'not measured' without a file.

    Raises: ValueError for a damaged file.
    """
    if not path.is_file():
        return "not measured"
    cost = json_files.read_json(path, "the cost of a sweep")
    if not isinstance(cost, dict) or schemas.list_invalid_keys(cost, COST):
        raise UserError(f"{path} is damaged: experiments.scaling.collect writes it again.")
    devices = " or ".join(cost["devices"])
    return f"{cost['cells']} cells, {cost['hours']:.1f} hours added up, each on {devices}"


class _Formatter(string.Formatter):
    """A formatter for templates that a stranger may have written.

    It refuses attributes, which could reach any object of the program, and huge widths, which could
    fill the memory.
    """

    def __init__(self):
        self._remaining = MOST_PAGE_BYTES

    def get_field(self, field_name, args, kwargs):
        if "." in re.sub(r"\[[^\]]*\]", "", field_name):
            raise UserError(
                f"{field_name!r} is an attribute; write [KEY] to take a value of a field"
            )
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value, format_spec):
        if re.search(r"\d{4}", format_spec):
            raise UserError(f"the format {format_spec!r} is wider than 999")
        text = super().format_field(value, format_spec)
        self._remaining -= len(text)
        if self._remaining < 0:
            raise UserError(f"its fields have more than {MOST_PAGE_BYTES:,} characters")
        return text


def fill_template(template: str, values: dict) -> str:
    """Returns the template with the values in place of their names in braces.

    Raises: KeyError, IndexError, TypeError or ValueError for a field that cannot be filled.
    """
    return _Formatter().vformat(template, (), values)


def read_page(path: pathlib.Path) -> tuple[str, set[str]]:
    """Reads a template; returns its text and the names of the fields that it uses.

    Raises: OSError; ValueError for a file that is too large, not in UTF-8, or not a template.
    """
    contents = json_files.read_bytes(path, MOST_PAGE_BYTES + 1)
    if len(contents) > MOST_PAGE_BYTES:
        raise UserError(f"{path} has more than {MOST_PAGE_BYTES:,} bytes, the most of a page.")
    try:
        text = contents.decode("utf-8-sig").replace("\r\n", "\n")
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8: {error}. Save it as UTF-8.") from error
    except ValueError as error:
        raise UserError(f"{path} is no template: {error}.") from error
    return text, {re.split(r"[.\[]", name)[0] for name in names}
