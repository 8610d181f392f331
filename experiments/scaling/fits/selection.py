"""Selection of a table's rows: by model, with its seeds and steps, and comparable to each other."""

from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from dit_jax.evaluation import measures

# Runs with equal values in these columns are of one model and differ in their seed.
MODEL = ("network", "block", "depth", "hidden_size", "num_heads", "patch_size", "params")
MODEL += ("learning_rate", "batch_size")
# Settings, besides the weights, on which measures of samples depend.
SAMPLING = ("sampler", "sampling_steps", "cfg_scale", "num", "extractor", "reference")
HELD_OUT = ("eval_draws",)  # the settings on which held-out losses depend
LOSSES = ("eval_",)  # prefix of the names of held-out losses
RANGE = (1e-30, 1e30)  # of a quality: beyond it squares and ratios overflow
# Prefixes of qualities for which higher is better.
HIGHER = tuple(name for name, m in measures.MEASURES.items() if m.larger_is_better)


def name_models(rows: pd.DataFrame, but_for: Collection[str] = ()) -> pd.Series:
    """Returns a text for each row: equal for rows that differ in nothing but seed and step.

    It has the values of MODEL and of the other axes of a sweep, such as 'optim.weight_decay'.
    Args: but_for, columns in which rows of one text may differ too.
    """
    names = [*MODEL, *sorted(name for name in rows if "." in name)]
    names = [name for name in names if name in rows and name not in but_for]
    models = (", ".join(map(str, values)) for values in rows[names].itertuples(index=False))
    return pd.Series(models, rows.index, dtype="string")


def measured(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns the `comparable` rows with a quality that can be fitted, a loss or a distance.

    Raises: ValueError as `comparable`; ValueError for a quality for which higher is better, or
      with values outside RANGE.
    """
    if quality.startswith(HIGHER):
        raise UserError(f"of {quality} more is better: the fits are of losses and distances.")
    rows = comparable(rows, quality)
    low, high = RANGE
    bad = rows[~rows[quality].between(low, high)]
    if len(bad):
        bad = bad[[quality, "cell", "step"]].itertuples(index=False)
        values = ", ".join(f"{value} of {cell} at step {step}" for value, cell, step in bad)
        raise UserError(f"{quality} must be in {low}..{high}, not {values}: leave them out.")
    return rows


def comparable(rows: pd.DataFrame, quality: str, across: Collection[str] = ()) -> pd.DataFrame:
    """Returns the rows that have the quality, each run and step once, if they can be compared.

    Args: across, columns that may differ because they are compared: 'network', 'block'.
    Raises: ValueError if no row has the quality; if rows differ in sampler, reference, network,
      block or batch size; if a model has several learning rates; if a step of a run has two values.
    """
    kept = rows[rows[quality].notna()] if quality in rows else rows[:0]
    if kept.empty:
        names = [name for name in rows if name.startswith(LOSSES) or measures.find(name)]
        counts = rows[names].count()
        known = ", ".join(f"{name} in {count}" for name, count in counts.items() if count)
        raise UserError(f"none of {len(rows)} rows has {quality!r}; there is {known or 'none'}.")
    alike = ("network", "block", "batch_size")
    alike += HELD_OUT if quality.startswith(LOSSES) else SAMPLING
    for name in alike:
        if name not in across:
            _check_one(kept, name, quality)
    # Learning rates may differ between models, but not within one.
    for _, model in kept.groupby(name_models(kept, but_for=("learning_rate",)), sort=False):
        _check_one(model, "learning_rate", quality)
    # A table that was joined from several may have a run twice.
    run = ["run", "seed", "step"]
    kept = kept.assign(run=name_models(kept)).drop_duplicates([*run, quality])
    if kept.duplicated(run).any():
        several = kept[kept.duplicated(run, keep=False)].sort_values(run, kind="stable")
        one, other = several[:2].to_dict("records")
        raise UserError(
            f"{quality} is {one[quality]} and {other[quality]} in two rows of one run: "
            f"{one['cell']} and {other['cell']} at step {one['step']}."
        )
    return kept.drop(columns="run")


def _check_one(rows, name, quality):
    """Raises: ValueError unless all rows have the same value in a column."""
    if name not in rows:
        return
    counts = rows[name].astype(object).fillna("none").value_counts(sort=False)
    if len(counts) > 1:
        values = ", ".join(f"{value} in {count} rows" for value, count in counts.items())
        raise UserError(
            f"{quality} cannot be compared across {name}: {values}. Keep the rows of one, such as "
            f"--where {name}={counts.index[0]}."
        )


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of each model at the steps that most of its seeds have reached.

    Means of different seeds do not compare, so the other steps are left out.
    """
    models = name_models(rows)
    # Of each row, how many seeds its model has at its step.
    seeds = rows.groupby([models, "step"])["step"].transform("size")
    return rows[seeds == seeds.groupby(models).transform("max")]


def average(rows: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Returns a row for each model and step of `complete` with the quality's mean over seeds.

    The rows are ordered by model, then step; a column `seeds` has the number of seeds.
    """
    rows = complete(rows)
    # Models in the order of their first rows.
    rows = rows.assign(order=pd.factorize(name_models(rows))[0], seed=pd.NA)
    points = rows.groupby(["order", "step"])
    # Not "mean", which sums in another way and may differ in the last digit.
    rows[quality] = points[quality].transform(np.mean)
    rows["seeds"] = points["step"].transform("size")
    return rows[points.cumcount() == 0].sort_values(["order", "step"]).drop(columns="order")


def split_by_tokens(rows: pd.DataFrame) -> Iterator[tuple[int | None, pd.DataFrame]]:
    """Yields each number of tokens with its rows, ascending; UNets, without tokens, have None."""
    for tokens, part in rows.groupby(rows["tokens"].fillna(0)):
        yield int(tokens) or None, part


def last_step(rows: pd.DataFrame) -> int:
    """Returns the step that most models have reached; the largest of several."""
    models = name_models(rows).groupby(rows["step"]).nunique()
    return int(models[models == models.max()].index.max())


def at_last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the step that most models have reached."""
    return rows[rows["step"] == last_step(rows)]
