"""What a study's table tells: curves of quality against compute, and what they are worth.

  python -m experiments.scaling.fit --table FILE.csv [--quality eval_mse] [--out fit.json]

Quality is a loss or a distance, lower is better. A model is what differs in more than its seed;
its seeds are averaged. What the table has too few points for is left out and says what it needs.
"""

import collections
import json
import math
import pathlib

import numpy as np
from absl import flags

from dit_jax import cli
from experiments.scaling import laws, table

FLAGS = flags.FLAGS
# What makes a model: runs that have these in common differ by their seed.
MODEL = ("block", "depth", "hidden_size", "num_heads", "patch_size", "learning_rate", "batch_size")
SAMPLING = ("sampler", "sampling_steps", "cfg_scale", "num", "extractor", "reference")


def model_of(row: dict) -> tuple:
    """What two rows have in common that differ in nothing but seed and step."""
    return tuple(row.get(name) for name in MODEL)


def average(rows: list[dict], quality: str) -> list[dict]:
    """One row for each model and step, its quality the mean over seeds; by model, then step.

    A step counts where all of the model's seeds have got to.
    """
    models = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if row.get(quality) is not None:
            models[model_of(row)][row["step"]].append(row)
    return [
        {**points[0], "seed": None, quality: float(np.mean([row[quality] for row in points]))}
        for steps in models.values()
        for _, points in sorted(steps.items())
        if len(points) == max(map(len, steps.values()))
    ]


def last_step(rows: list[dict], quality: str) -> int:
    """The largest of the steps that most models have got to."""
    counts = collections.Counter(row["step"] for row in average(rows, quality))
    return max(step for step, count in counts.items() if count == max(counts.values()))


def frontier(rows: list[dict], quality: str, x: str = "train_gflops") -> list[dict]:
    """The rows that no other row of less or equal x beats or equals, in the order of x."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (row[x], row[quality])):
        if row[quality] < best:
            best = row[quality]
            kept.append(row)
    return kept


def iso_flop(rows: list[dict], quality: str, budgets: list[float] | None = None) -> list[dict]:
    """The best model of each compute budget, for each number of tokens.

    Quality at a budget is read off each model's own curve, straight between its points in log
    and log. A parabola in log(gmacs) through the best model and two on either side has its
    minimum at the optimum; where the best model is the smallest or the largest there is none.

    Args: budgets in train_gflops; by default 12 from the least compute to the most.
    Returns: for budgets that 3 models or more have passed: tokens, budget, models (model, gmacs,
      params, quality), best (a model), bracketed, and with it gmacs, params, quality at the
      optimum, else None.
    """
    rows = average(rows, quality)
    computes = [row["train_gflops"] for row in rows]
    if budgets is None and rows:
        budgets = np.geomspace(min(computes), max(computes), 12)
    found = []
    for tokens in sorted({row["tokens"] for row in rows}):
        curves = collections.defaultdict(list)
        for row in rows:
            if row["tokens"] == tokens:
                curves[model_of(row)].append(row)
        for budget in budgets:
            points = [_at_budget(curve, quality, budget) for curve in curves.values()]
            points = sorted(filter(None, points), key=lambda point: point["gmacs"])
            if len(points) >= 3:
                found.append(dict(tokens=tokens, budget=float(budget), **_optimum(points)))
    return found


def _at_budget(curve, quality, budget):
    compute = np.log([row["train_gflops"] for row in curve])
    if not compute[0] <= np.log(budget) <= compute[-1]:
        return None
    value = np.exp(np.interp(np.log(budget), compute, np.log([row[quality] for row in curve])))
    kept = {name: curve[0][name] for name in ("model", "gmacs", "params")}
    return {**kept, "quality": float(value)}


def _optimum(points):
    i = min(range(len(points)), key=lambda i: points[i]["quality"])
    result = dict(models=points, best=points[i]["model"], bracketed=0 < i < len(points) - 1)
    result |= dict(gmacs=None, params=None, quality=None)
    if not result["bracketed"]:
        return result
    near = points[max(i - 2, 0) : i + 3]
    gmacs, params, value = (
        np.log([point[name] for point in near]) for name in ("gmacs", "params", "quality")
    )
    curvature, slope, level = np.polyfit(gmacs - gmacs.mean(), value, 2)
    if curvature <= 0 or not gmacs[0] < (at := gmacs.mean() - slope / 2 / curvature) < gmacs[-1]:
        return result | dict(bracketed=False)
    optimum = dict(gmacs=at, params=np.interp(at, gmacs, params))
    optimum |= dict(quality=level - slope**2 / 4 / curvature)
    return result | {name: float(np.exp(log)) for name, log in optimum.items()}
