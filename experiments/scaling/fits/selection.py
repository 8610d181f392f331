"""Selection of the rows of a table: comparable ones, by model, by seeds and by steps."""

from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from dit_jax.evaluation import measures

# Runs with equal values in these columns have the same model; they differ in their seed.
MODEL = ("network", "block", "depth", "hidden_size", "num_heads", "patch_size", "params")
MODEL += ("learning_rate", "batch_size")
# The settings on which measures of samples depend.
SAMPLING = ("sampler", "sampling_steps", "cfg_scale", "num", "extractor", "reference")
HELD_OUT = ("eval_draws",)  # the setting on which held-out losses depend
LOSSES = ("eval_",)  # prefix of the names of held-out losses
RANGE = (1e-30, 1e30)  # of a quality; outside, squares and ratios overflow
# Prefixes of qualities for which higher is better.
HIGHER = tuple(name for name, measure in measures.MEASURES.items() if measure.larger_is_better)


def name_models(rows: pd.DataFrame, ignored: Collection[str] = ()) -> pd.Series:
    """Returns the model of each row as a text, equal for all its seeds and steps.

    The text has the values of MODEL and of a sweep's other axes, such as 'optim.weight_decay'.
    Args: ignored, columns whose values are left out of the text.
    """
    names = [*MODEL, *sorted(name for name in rows if "." in name)]
    names = [name for name in names if name in rows and name not in ignored]
    models = (", ".join(map(str, values)) for values in rows[names].itertuples(index=False))
    return pd.Series(models, rows.index, dtype="string")


def select_fittable(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns the rows of `select_comparable`, if curves can be fitted to their quality.

    Raises: ValueError as `select_comparable`; ValueError for a quality for which higher is better,
      or with values outside RANGE.
    """
    if quality.startswith(HIGHER):
        raise UserError(f"higher {quality} is better: fits need a loss or a distance.")
    rows = select_comparable(rows, quality)
    low, high = RANGE
    outside = rows[~rows[quality].between(low, high)]
    if len(outside):
        points = outside[[quality, "cell", "step"]].itertuples(index=False)
        values = ", ".join(f"{value} of {cell} at step {step}" for value, cell, step in points)
        raise UserError(f"{quality} must be in {low}..{high}, not {values}. Leave them out.")
    return rows


def select_comparable(
    rows: pd.DataFrame, quality: str, across: Collection[str] = ()
) -> pd.DataFrame:
    """Returns the rows with the quality, if they can be compared; a run has each step once.

    Args: across, columns that may differ because they are compared: 'network', 'block'.
    Raises: ValueError if no row has the quality; if rows differ in sampler, reference, network,
      block or batch size; if a model has several learning rates; if a step of a run has two values.
    """
    with_quality = rows[rows[quality].notna()] if quality in rows else rows[:0]
    if with_quality.empty:
        counts = rows.filter(regex="^(eval_|fid|sfid|kid|fd_)").count()
        known = ", ".join(f"{name} in {count}" for name, count in counts.items() if count)
        raise UserError(f"none of {len(rows)} rows has {quality!r}; there is {known or 'none'}.")
    settings = ("network", "block", "batch_size")
    settings += HELD_OUT if quality.startswith(LOSSES) else SAMPLING
    for name in settings:
        if name not in across:
            _check_equal(with_quality, name, quality)
    # Learning rates may differ between models, but not within a model.
    models = name_models(with_quality, ignored=("learning_rate",))
    for _, model in with_quality.groupby(models, sort=False):
        _check_equal(model, "learning_rate", quality)
    # If tables were joined, a run may be in several of them.
    point = ["model_name", "seed", "step"]
    named = with_quality.assign(model_name=name_models(with_quality))
    named = named.drop_duplicates([*point, quality])
    if named.duplicated(point).any():
        duplicates = named[named.duplicated(point, keep=False)].sort_values(point, kind="stable")
        first, second = duplicates[:2].to_dict("records")
        raise UserError(
            f"{quality} is {first[quality]} and {second[quality]} in two rows of one run: "
            f"{first['cell']} and {second['cell']} at step {first['step']}. Remove one of them."
        )
    return named.drop(columns="model_name")


def _check_equal(rows, name, quality):
    """Raises a ValueError unless all rows have the same value in a column."""
    if name not in rows:
        return
    counts = rows[name].astype(object).fillna("none").value_counts(sort=False)
    if len(counts) > 1:
        values = ", ".join(f"{value} in {count} rows" for value, count in counts.items())
        raise UserError(
            f"{quality} cannot be compared across {name}: {values}. Choose one value, for example "
            f"with --where {name}={counts.index[0]}."
        )


def select_complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of each model at the steps that most of its seeds have reached.

    The other steps are left out, because means over different seeds cannot be compared.
    """
    models = name_models(rows)
    # For each row, the number of seeds that its model has at its step.
    seeds = rows.groupby([models, "step"])["step"].transform("size")
    return rows[seeds == seeds.groupby(models).transform("max")]


def average_seeds(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Averages the quality over seeds, at the steps of `select_complete`.

    Returns: a row for each model and step, in this order. A column `seeds` has the number of seeds.
    """
    rows = select_complete(rows)
    # Models in the order of their first rows.
    rows = rows.assign(order=pd.factorize(name_models(rows))[0], seed=pd.NA)
    points = rows.groupby(["order", "step"])
    # Not "mean", which sums in another order and may differ in the last digit.
    rows[quality] = points[quality].transform(np.mean)
    rows["seeds"] = points["step"].transform("size")
    return rows[points.cumcount() == 0].sort_values(["order", "step"]).drop(columns="order")


def split_by_tokens(rows: pd.DataFrame) -> Iterator[tuple[int | None, pd.DataFrame]]:
    """Yields each number of tokens with its rows, ascending; UNets come first, with None."""
    for tokens, group in rows.groupby(rows["tokens"].fillna(0)):
        yield int(tokens) or None, group


def find_last_step(rows: pd.DataFrame) -> int:
    """Returns the step that most models have reached; of several such steps, the largest."""
    models = name_models(rows).groupby(rows["step"]).nunique()
    return int(models[models == models.max()].index.max())


def select_last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the step that most models have reached."""
    return rows[rows["step"] == find_last_step(rows)]
