"""Selection of a table's rows: by model, with its seeds and steps, and comparable to each other."""

import collections

import numpy as np

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


def get_model_key(row: dict) -> tuple:
    """Returns a row's model as a key: equal for rows that differ in nothing but seed and step.

    The key includes the other axes of a sweep, which are columns such as 'optim.weight_decay'.
    """
    axes = sorted(name for name in row if "." in name)
    return (*(row.get(name) for name in MODEL), *((name, row[name]) for name in axes))


def measured(rows: list[dict], quality: str) -> list[dict]:
    """Returns the `comparable` rows with a quality that can be fitted, a loss or a distance.

    Raises: ValueError as `comparable`; ValueError for a quality for which higher is better, or
      with values outside RANGE.
    """
    if quality.startswith(HIGHER):
        raise UserError(f"of {quality} more is better: the fits are of losses and distances.")
    kept = comparable(rows, quality)
    low, high = RANGE
    bad = [row for row in kept if not low <= row[quality] <= high]
    if bad:
        values = ", ".join(f"{row[quality]} of {row['cell']} at step {row['step']}" for row in bad)
        raise UserError(f"{quality} must be in {low}..{high}, not {values}: leave them out.")
    return kept


def comparable(rows: list[dict], quality: str, across: tuple[str, ...] = ()) -> list[dict]:
    """Returns the rows that have the quality, each run and step once, if they can be compared.

    Args: across, columns that may differ because they are compared: 'network', 'block'.
    Raises: ValueError if no row has the quality; if rows differ in sampler, reference, network,
      block or batch size; if a model has several learning rates; if a step of a run has two values.
    """
    kept = [row for row in rows if row.get(quality) is not None]
    if not kept:
        numbers = collections.Counter(
            name for row in rows for name in row if _is_quality(row, name)
        )
        known = ", ".join(f"{name} in {count}" for name, count in numbers.items())
        raise UserError(f"none of {len(rows)} rows has {quality!r}; there is {known or 'none'}.")
    alike = ("network", "block", "batch_size")
    alike += HELD_OUT if quality.startswith(LOSSES) else SAMPLING
    for name in alike:
        if name not in across:
            _check_one(kept, name, quality)
    # Learning rates may differ between models, but not within one.
    rates = collections.defaultdict(list)
    for row in kept:
        rates[get_model_key({**row, "learning_rate": None})].append(row)
    for several in rates.values():
        _check_one(several, "learning_rate", quality)
    # A table that was joined from several may have a run twice.
    runs = {}
    for row in kept:
        key = (*get_model_key(row), row.get("seed"), row["step"])
        first = runs.setdefault(key, row)
        if first is not row and first[quality] != row[quality]:  # nan does not equal itself
            raise UserError(
                f"{quality} is {first[quality]} and {row[quality]} in two rows of one run: "
                f"{first['cell']} and {row['cell']} at step {row['step']}."
            )
    return list(runs.values())


def _is_quality(row, name):
    """Returns whether a row has a value in a column with a quality's name."""
    starts = ("eval_", "fid", "sfid", "kid", "fd_")
    return name.startswith(starts) and row[name] is not None


def _check_one(rows, name, quality):
    """Raises: ValueError unless all rows have the same value in a column."""
    counts = collections.Counter(row.get(name) for row in rows)
    if len(counts) > 1:
        values = ", ".join(f"{value} in {count} rows" for value, count in counts.items())
        raise UserError(
            f"{quality} cannot be compared across {name}: {values}. Keep the rows of one, such as "
            f"--where {name}={next(iter(counts))}."
        )


def average(rows: list[dict], quality: str) -> list[dict]:
    """Returns a row for each model and step with the quality's mean over seeds.

    The rows are ordered by model, then step. A model's step is left out if fewer seeds have reached
    it than some other step: means of different seeds do not compare.
    """
    models = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        models[get_model_key(row)][row["step"]].append(row)
    return [
        {**points[0], "seed": None, quality: float(np.mean([row[quality] for row in points]))}
        for steps in models.values()
        for _, points in sorted(steps.items())
        if len(points) == max(map(len, steps.values()))
    ]


def last_step(rows: list[dict]) -> int:
    """Returns the step that most models have reached; the largest of several."""
    models = collections.defaultdict(set)
    for row in rows:
        models[row["step"]].add(get_model_key(row))
    most = max(map(len, models.values()))
    return max(step for step, reached in models.items() if len(reached) == most)


def at_step(rows: list[dict], step: int) -> list[dict]:
    """Returns the rows of one step."""
    return [row for row in rows if row["step"] == step]
