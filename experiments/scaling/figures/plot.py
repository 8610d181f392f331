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

    Args: arrays, of samples, as `samples.draw_samples` takes them, or None.
    Raises: ValueError if nothing can be drawn, or as `selection.comparable`; OSError.
    """
    drawn, reasons = [], []
    for quality in qualities:
        missing = rows[quality].isna().sum() if quality in rows else len(rows)
        if missing:
            logger.info("%d of %d rows have no %s: left out.", missing, len(rows), quality)
        if missing < len(rows):  # checked now, so that an error comes before any file is written
            selection.comparable(rows, quality, across=("network", "block"))
    todo = {
        f"{name}_{quality}": functools.partial(draw, rows, quality)
        for quality in qualities
        for name, draw in FIGURES.items()
    }
    if arrays is not None:
        todo["samples"] = functools.partial(samples.draw_samples, rows, arrays)
    for name, draw in todo.items():
        # Few tables have rows for all figures, so one that lacks its rows is only logged.
        try:
            figure = draw()
        except subsets.NoRowsError as error:
            reasons.append(f"{name}: {error}")
            logger.info("no %s: %s.", name, error)
            continue
        for suffix in (".png", ".svg"):
            out = out_dir / (name + suffix)
            cli.check_out(out, (suffix,))
            plot_style.save(figure, out)
            drawn.append(out)
    if not drawn:
        raise UserError("nothing to draw:\n  " + "\n  ".join(reasons))
    return drawn
