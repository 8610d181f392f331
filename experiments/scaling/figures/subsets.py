"""The rows of a table that a figure draws."""

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from dit_jax.evaluation import curves
from experiments.scaling.fits import selection

UNITS = ("GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs", "YFLOPs")


class NoRowsError(UserError):
    """The table has no rows for a figure."""


def require(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Returns the rows with a value in all these columns.   Raises: NoRowsError for none."""
    if absent := [name for name in names if name not in rows or rows[name].isna().all()]:
        raise NoRowsError(f"no row has {' and '.join(absent)}")
    with_values = rows.dropna(subset=names)
    if with_values.empty:
        raise NoRowsError(f"no row has {' with '.join(names)}")
    return with_values


def select_standard(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Returns the rows of the standard models, one model per size and patch size.

    They have the most common block, and the most common depth and width of their size. A table has
    other variants only for comparison with the standard ones.
    Args: names, columns in which the rows must have a value.
    Raises: NoRowsError for rows without a size, of several networks, or without such a value.
    """
    if "network" in rows and (count := rows["network"].nunique(dropna=False)) > 1:
        raise NoRowsError(f"the rows have {count} networks, which the figure networks_ compares")
    rows = select_common_block(require(rows, "size", "patch_size"))
    # Group numbers stand for (depth, hidden_size), because these values may be missing.
    shapes = rows.groupby(["depth", "hidden_size"], dropna=False).ngroup()
    rows = rows[shapes == shapes.groupby(rows["size"]).transform(_find_most_common)]
    return require(rows, *names)


def select_common_block(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows with the most common block."""
    blocks = rows.groupby("block", dropna=False).ngroup()
    return rows[blocks == _find_most_common(blocks)]


def _find_most_common(values):
    """Returns the most common value of a Series; of several such values, the first."""
    return values.value_counts(sort=False).idxmax()


def get_size_names(rows: pd.DataFrame) -> list[str]:
    """Returns the names of the sizes, fewest parameters first; [] if rows have no size."""
    try:
        rows = select_standard(rows).sort_values("params", kind="stable")
    except NoRowsError:
        return []
    return rows["size"].unique().tolist()


def require_complete(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns the rows of `selection.select_complete`.   Raises: as `require`."""
    rows = selection.select_comparable(require(rows, quality, "step"), quality)
    return selection.select_complete(rows)


def require_last_step(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns the rows of `selection.select_last_step`.   Raises: as `require`."""
    rows = selection.select_comparable(require(rows, quality, "step"), quality)
    return selection.select_last_step(rows)


def make_curve(rows: pd.DataFrame, x: str, y: str) -> curves.Curve:
    """Returns a curve with the points of all seeds at each x, in the order of x."""
    groups = rows.groupby(x)[[x, y]]
    points = {value: list(map(tuple, seeds.to_numpy(float))) for value, seeds in groups}
    return curves.Curve("", points)


def choose_unit(gflops: pd.Series) -> tuple[float, str]:
    """Returns (GFLOPs per unit, name) of the unit in which the geometric middle is 1 to 1000."""
    # As floats, since the product of two whole numbers may overflow.
    middle = np.sqrt(float(gflops.min()) * float(gflops.max()))
    power = int(np.clip(np.log10(middle) // 3, 0, len(UNITS) - 1))
    return 1000.0**power, UNITS[power]
