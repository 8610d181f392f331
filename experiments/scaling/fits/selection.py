"""The rows of a table as models, each with its seeds and steps, and whether they compare."""

import collections

import numpy as np

from dit_jax.errors import UserError

# Runs that have these in common are of one model: they differ by their seed.
MODEL = ("network", "block", "depth", "hidden_size", "num_heads", "patch_size", "params")
MODEL += ("learning_rate", "batch_size")
# What a measure of samples depends on besides the weights.
SAMPLING = ("sampler", "sampling_steps", "cfg_scale", "num", "extractor", "reference")
HELD_OUT = ("eval_draws",)  # and a held-out loss
LOSSES = ("eval_",)  # names of held-out losses begin so
RANGE = (1e-30, 1e30)  # of a quality: beyond it squares and ratios overflow
HIGHER = ("label_accuracy", "inception_score", "precision", "recall", "density", "coverage")


def model_of(row: dict) -> tuple:
    """What two rows have in common that differ in nothing but seed and step.

    That are also the sweep's other axes, columns such as 'optim.weight_decay'.
    """
    axes = sorted(name for name in row if "." in name)
    return (*(row.get(name) for name in MODEL), *((name, row[name]) for name in axes))


def measured(rows: list[dict], quality: str) -> list[dict]:
    """The `comparable` rows, of a loss or a distance that can be fitted.

    Raises: ValueError as `comparable`; for a quality of which more is better, or that is not
      in RANGE.
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
    """The rows that have the quality, each run and step once, if they can be compared.

    Args: across, 'network' or 'block', where these are what is compared.
    Raises: ValueError if there are none; for rows of several samplers, references, networks, blocks
      or batch sizes, or of one model's several learning rates; for two values at one step of a run.
    """
    kept = [row for row in rows if row.get(quality) is not None]
    if not kept:
        numbers = collections.Counter(
            name for row in rows for name in row if _is_quality(row, name)
        )
        there = ", ".join(f"{name} in {count}" for name, count in numbers.items())
        raise UserError(f"none of {len(rows)} rows has {quality!r}; there is {there or 'none'}.")
    alike = ("network", "block", "batch_size")
    alike += HELD_OUT if quality.startswith(LOSSES) else SAMPLING
    for name in alike:
        if name not in across:
            _check_one(kept, name, quality)
    rates = collections.defaultdict(list)
    for row in kept:
        rates[model_of({**row, "learning_rate": None})].append(row)
    for several in rates.values():
        _check_one(several, "learning_rate", quality)
    runs = {}
    for row in kept:
        key = (*model_of(row), row.get("seed"), row["step"])
        first = runs.setdefault(key, row)
        if first is not row and first[quality] != row[quality]:  # nan is not itself
            raise UserError(
                f"{quality} is {first[quality]} and {row[quality]} in two rows of one run: "
                f"{first['cell']} and {row['cell']} at step {row['step']}."
            )
    return list(runs.values())


def _is_quality(row, name):
    starts = ("eval_", "fid", "sfid", "kid", "fd_")
    return name.startswith(starts) and row[name] is not None


def _check_one(rows, name, quality):
    counts = collections.Counter(row.get(name) for row in rows)
    if len(counts) > 1:
        found = ", ".join(f"{value} in {count} rows" for value, count in counts.items())
        raise UserError(
            f"{quality} cannot be compared across {name}: {found}. Keep the rows of one, such as "
            f"--where {name}={next(iter(counts))}."
        )


def average(rows: list[dict], quality: str) -> list[dict]:
    """One row for each model and step, its quality the mean over seeds; by model, then step.

    A step counts where as many of the model's seeds have got to as to any.
    """
    models = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        models[model_of(row)][row["step"]].append(row)
    return [
        {**points[0], "seed": None, quality: float(np.mean([row[quality] for row in points]))}
        for steps in models.values()
        for _, points in sorted(steps.items())
        if len(points) == max(map(len, steps.values()))
    ]


def last_step(rows: list[dict]) -> int:
    """The largest of the steps that most models have got to."""
    models = collections.defaultdict(set)
    for row in rows:
        models[row["step"]].add(model_of(row))
    most = max(map(len, models.values()))
    return max(step for step, found in models.items() if len(found) == most)


def at_step(rows: list[dict], step: int) -> list[dict]:
    """The rows of one step."""
    return [row for row in rows if row["step"] == step]
