"""The page of a study, from its table: a template's prose around tables, fits, figures and cost.

  python -m experiments.scaling.report --table experiments/scaling/results/digits.csv \
      --page experiments/scaling/page.md --out experiments/scaling/README.md

A template takes the fields of `fields` in braces, as str.format does, so that no number of the
prose is typed: {eval_mse[largest][relative_error]:+.1%} is of the fits to eval_mse.
"""

import collections
import os
import pathlib
import re
import string

import numpy as np
from absl import flags

from dit_jax import cli, files, forms
from experiments.scaling import contrasts, fit, models, summary, table

FLAGS = flags.FLAGS
COST = {  # as `collect.cost` returns it
    "cells": forms.is_count,
    "hours": forms.is_number,
    "devices": forms.list_of(forms.is_text),
}


def fields(
    table_path: pathlib.Path, qualities: list[str], out: pathlib.Path, named: set[str]
) -> dict:
    """What a template may name.

    Args: named, by the template: fits are made of these qualities alone.
    Returns: table, at the last step; figures, all that lie in figures/ beside the table, linked
      from the page `out`; cost, of the table's .cost.json; rows, cells, models, seeds and steps;
      range, largest gmacs over smallest; of each quality its fits, `fit.study`, and under
      '<quality>_summary' their text, under '<quality>_networks' that of `contrasts.networks`; of
      each model at the last step `at[model][quality]`.
    Raises: FileNotFoundError; ValueError as `fit.study` and `contrasts.networks`.
    """
    rows = table.read(table_path)
    shown = [name for name in qualities if any(row.get(name) is not None for row in rows)]
    at = at_last_step(rows, shown)
    fits = {name: fit.study(rows, name) for name in shown if {name, f"{name}_summary"} & named}
    gmacs = [row["gmacs"] for row in rows]
    return {
        "table": model_table(at, shown),
        "figures": figure_list(table_path.parent / "figures", out.parent),
        "cost": cost(table_path.with_suffix(".cost.json")),
        "rows": len(rows),
        "cells": len({row["cell"] for row in rows}),
        "models": len(at),
        "seeds": len({row["seed"] for row in rows}),
        "steps": ", ".join(f"{step:,}" for step in sorted({row["step"] for row in rows})),
        "range": max(gmacs) / min(gmacs),
        "at": at,
        **fits,
        **{f"{name}_summary": _verbatim(summary.of(found)) for name, found in fits.items()},
        **{
            f"{name}_networks": _verbatim(summary.of_networks(contrasts.networks(rows, name), name))
            for name in shown
            if f"{name}_networks" in named
        },
    }


def _verbatim(text):
    return f"```\n{text}\n```"


def at_last_step(rows: list[dict], qualities: list[str]) -> dict[str, dict]:
    """By model, of the least gmacs first: its row's values, the seeds' mean and deviation.

    A model bears in its name what else differs in the table: 'M/1 in-context learning_rate=0.001'.
    """
    rows = models.at_step(rows, models.last_step(rows))
    other = ["learning_rate", "batch_size", *(name for name in rows[0] if "." in name)]
    other = [name for name in other if len({row[name] for row in rows}) > 1]
    of_models = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row["gmacs"]):
        of_models[models.model_of(row)].append(row)
    found = {}
    for alike in of_models.values():
        row = alike[0]
        parts = [row["model"]]
        parts += [row["block"]] if row["block"] not in ("adaLN-Zero", None) else []
        name = " ".join([*parts, *(f"{n.rpartition('.')[2]}={row[n]}" for n in other)])
        if name in found:  # sizes of one name in tables joined by hand
            name += f" {row['hidden_size']}x{row['depth']}"
        found[name] = dict(row, seeds=len(alike))
        for quality in qualities:
            values = [row[quality] for row in alike]
            found[name][quality] = float(np.mean(values))
            if len(values) > 1:
                found[name][f"{quality}_std"] = float(np.std(values, ddof=1))
    return found


def model_table(at: dict[str, dict], qualities: list[str]) -> str:
    """Markdown: a row for each model, each quality with its deviation between seeds."""
    names = ["model", "hidden", "depth", "tokens", "params", "gmacs", *qualities]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row in at.items():
        sizes = (row["hidden_size"], row["depth"], row["tokens"])  # None of a UNet
        cells = [name, *("" if size is None else size for size in sizes)]
        cells += [f"{row['params']:,}", f"{row['gmacs']:.3g}"]
        for quality in qualities:
            deviation = row.get(f"{quality}_std")
            more = "" if deviation is None else f" ± {deviation:.2g}"
            cells.append(f"{row[quality]:.4g}{more}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def figure_list(directory: pathlib.Path, page_directory: pathlib.Path) -> dict[str, str]:
    """Markdown of each PNG by its name, relative to the page."""
    return {
        path.stem: f"![{path.stem}]({os.path.relpath(path, page_directory)})"
        for path in sorted(directory.glob("*.png"))
    }


def cost(path: pathlib.Path) -> str:
    """'12 cells, 1.5 hours added up, each on 1 x cpu', or that it is not known."""
    if not path.is_file():
        return "not measured"
    found = files.read_json(path, "the cost of a sweep")
    if not isinstance(found, dict) or forms.wrong_keys(found, COST):
        raise ValueError(f"{path} is damaged: experiments.scaling.collect writes it again.")
    devices = " or ".join(found["devices"])
    return f"{found['cells']} cells, {found['hours']:.1f} hours added up, each on {devices}"


def main(_):
    page, out = FLAGS.page, FLAGS.out
    cli.check_out(out, (".md",))
    template = page.read_text(encoding="utf-8-sig")
    parts = string.Formatter().parse(template)
    named = {re.split(r"[.\[]", name)[0] for _, name, _, _ in parts if name}
    values = fields(FLAGS.table, FLAGS.qualities, out, named)
    try:
        text = template.format(**values)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{page} asks for {error}, which {FLAGS.table} does not give; there are "
            f"{', '.join(values)}."
        ) from error
    files.replace_text(out, text)
    print(out)


if __name__ == "__main__":
    cli.define_path("table", None, "CSV file of the study.", required=True)
    cli.define_path("page", None, "Template of the page.", required=True)
    cli.define_path("out", None, "The .md to write.", required=True)
    flags.DEFINE_list("qualities", "eval_mse,fd_pixels,label_accuracy", "Columns of the table.")
    cli.run(main)
