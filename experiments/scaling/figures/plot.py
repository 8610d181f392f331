"""The list of a study's figures, and the function that writes all of them."""

import functools
import logging
import pathlib

import pandas as pd

from dit_jax import cli
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from experiments.scaling.figures import comparisons, curves, samples, subsets
from experiments.scaling.fits import selection

logger = logging.getLogger("dit_jax")

FIGURES = {
    "gflops": curves.draw_gflops,
    "compute": curves.draw_compute,
    "isoflop": curves.draw_isoflop,
    "tokens_depth": comparisons.draw_tokens_depth,
    "extrapolation": curves.draw_extrapolation,
    "extrapolation_tokens": curves.draw_extrapolation_tokens,
    "blocks": comparisons.draw_blocks,
    "networks": comparisons.draw_networks,
}


def write(rows: pd.DataFrame, qualities: list[str], arrays: dict | None, out_dir: pathlib.Path):
    """Writes all figures that the table has rows for, as .png and .svg; returns their paths.

    Args: arrays, the samples that `samples.draw_samples` takes, or None.
    Raises: ValueError if nothing can be drawn, or as `selection.select_comparable`; OSError.
    """
    paths, reasons = [], []
    for quality in qualities:
        missing = rows[quality].isna().sum() if quality in rows else len(rows)
        if missing:
            logger.info("%d of %d rows have no %s: left out.", missing, len(rows), quality)
        if missing < len(rows):  # checked now, so that an error comes before any file is written
            selection.select_comparable(rows, quality, across=("network", "block"))
    figures = {
        f"{name}_{quality}": functools.partial(draw, rows, quality)
        for quality in qualities
        for name, draw in FIGURES.items()
    }
    if arrays is not None:
        figures["samples"] = functools.partial(samples.draw_samples, rows, arrays)
    for name, draw in figures.items():
        # Few tables have rows for all figures, so a figure without rows is only logged.
        try:
            figure = draw()
        except subsets.NoRowsError as error:
            reasons.append(f"{name}: {error}")
            logger.info("no %s: %s.", name, error)
            continue
        for suffix in (".png", ".svg"):
            path = out_dir / (name + suffix)
            cli.check_out(path, (suffix,))
            plot_style.save(figure, path)
            paths.append(path)
    if not paths:
        raise UserError("nothing to draw:\n  " + "\n  ".join(reasons))
    return paths
