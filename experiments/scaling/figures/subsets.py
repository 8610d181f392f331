"""The rows of a table that a figure draws, and how it arranges them."""

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from dit_jax.evaluation import curves
from experiments.scaling.fits import selection

UNITS = ("GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs", "YFLOPs")


class NoRowsError(UserError):
    """An error for a figure that the table has no rows for."""


def require(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Returns the rows with a value in all these columns.   Raises: NoRowsError for none."""
    absent = [name for name in names if name not in rows or rows[name].isna().all()]
    if not absent and len(whole := rows.dropna(subset=names)):
        return whole
    raise NoRowsError(f"no row has {' and '.join(absent) or ' with '.join(names)}")


def select_standard(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Returns the rows of the standard models, one model per size and patch size.

    They have the most common block, and the most common depth and width of their size. Other
    variants are in the table only for comparison with them.
    Args: names, columns in which the rows must have a value.
    Raises: NoRowsError for rows without a size, or of several networks, or without such a value.
    """
    if "network" in rows and (count := rows["network"].nunique(dropna=False)) > 1:
        raise NoRowsError(f"the rows are of {count} networks, which networks_ compares")
    rows = select_block(require(rows, "size", "patch_size"))
    # Numbers of (depth, hidden_size), because these may be missing.
    shapes = rows.groupby(["depth", "hidden_size"], dropna=False).ngroup()
    rows = rows[shapes == shapes.groupby(rows["size"]).transform(_find_most_common)]
    return require(rows, *names)


def select_block(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows with the most common block."""
    blocks = rows.groupby("block", dropna=False).ngroup()
    return rows[blocks == _find_most_common(blocks)]


def _find_most_common(values):
    """Returns the most common value of a Series, the first of several."""
    return values.value_counts(sort=False).idxmax()


def get_size_names(rows: pd.DataFrame) -> list[str]:
    """Returns the names of the sizes, fewest parameters first; [] if rows have no size."""
    try:
        rows = select_standard(rows).sort_values("params", kind="stable")
    except NoRowsError:
        return []
    return rows["size"].unique().tolist()


def select_complete(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns the comparable rows of `selection.complete`.   Raises: NoRowsError."""
    return selection.complete(selection.comparable(require(rows, quality, "step"), quality))


def select_last_step(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns the comparable rows at the last step that most models have.

    Raises: NoRowsError if no row has the quality.
    """
    rows = selection.comparable(require(rows, quality, "step"), quality)
    return selection.at_last_step(rows)


def make_curve(rows: pd.DataFrame, x: str, y: str) -> curves.Curve:
    """Returns a curve with a point for each x, from all seeds, in the order of x."""
    points = rows.groupby(x)[[x, y]]
    return curves.Curve("", {at: list(map(tuple, seeds.to_numpy(float))) for at, seeds in points})


def choose_unit(gflops: pd.Series) -> tuple[float, str]:
    """Returns (GFLOPs per unit, name) of the unit in which the geometric middle is 1 to 1000."""
    # As floats, since the product of two whole numbers may overflow.
    middle = np.sqrt(float(gflops.min()) * float(gflops.max()))
    power = int(np.clip(np.log10(middle) // 3, 0, len(UNITS) - 1))
    return 1000.0**power, UNITS[power]
