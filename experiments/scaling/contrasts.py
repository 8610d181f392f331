"""What one thing does with the others held: tokens, depth, width; pairs that cost the same.

All at equal steps, and so at equal images seen. Rows are those of `models.measured`.
"""

import collections
import itertools

import numpy as np

from experiments.scaling import models

# What changes with each: the rest of a model is held.
VARIED = {
    "tokens": ("patch_size",),
    "depth": ("depth",),
    "hidden_size": ("hidden_size", "num_heads"),
}


def slopes(rows: list[dict], quality: str, of: str) -> dict:
    """The slope of log quality against the log of tokens, depth or hidden_size, all else held.

    Returns: step; groups, of two models or more that differ in it alone (models, values, slope),
      by gmacs; mean of their slopes, which need not be alike.
    Raises: ValueError if no two models differ in it alone.
    """
    step = models.last_step(rows)
    groups = collections.defaultdict(list)
    for row in models.average(models.at_step(rows, step), quality):
        if row[of] is None:  # a UNet has none
            continue
        groups[models.model_of(row | dict.fromkeys((*VARIED[of], "params")))].append(row)
    found = []
    for group in sorted(groups.values(), key=lambda rows: min(row["gmacs"] for row in rows)):
        group = sorted(group, key=lambda row: row[of])
        values = [row[of] for row in group]
        if len(set(values)) > 1:
            slope = np.polyfit(np.log(values), np.log([row[quality] for row in group]), 1)[0]
            names = [row["model"] for row in group]
            found.append(dict(models=names, values=values, slope=float(slope)))
    if not found:
        raise ValueError(
            f"needs 2 models or more that differ in {of} alone; at step {step} there are none."
        )
    return dict(step=step, groups=found, mean=float(np.mean([group["slope"] for group in found])))


def equal_gmacs(rows: list[dict], quality: str, within: float = 0.1) -> dict:
    """`pairs` of models of about equal gmacs that differ in tokens: depth or width against them."""
    return pairs(rows, quality, "gmacs", within, lambda a, b: a["tokens"] != b["tokens"])


def equal_params(rows: list[dict], quality: str, within: float = 0.1) -> dict:
    """`pairs` of about equal parameters and equal tokens: deep and narrow or shallow and wide."""

    def differ(a, b):
        return a["tokens"] == b["tokens"] and a["depth"] != b["depth"]

    return pairs(rows, quality, "params", within, differ)


def networks(rows: list[dict], quality: str, within: float = 0.1) -> dict:
    """`pairs` of a DiT and a UNet of about equal gmacs, of the rows of a whole table.

    Raises: as `pairs` and `models.comparable`.
    """
    rows = models.comparable(rows, quality, across=("network", "block"))
    return pairs(rows, quality, "gmacs", within, lambda a, b: a["network"] != b["network"])


def pairs(rows: list[dict], quality: str, cost: str, within: float, differ) -> dict:
    """Which of two models is better, of those whose costs differ by at most a share `within`.

    Returns: step; noise, the deviation of log quality between seeds of a model, pooled, None
      without seeds; pairs, each of two (model, depth, hidden_size, tokens, cost, quality), ratio
      of the second's cost to the first's, its better one's name, log_ratio of the second's
      quality to the first's, and that in deviations of a difference between the two models'
      means, None without noise.
    Raises: ValueError if there are none.
    """
    step = models.last_step(rows)
    rows = models.at_step(rows, step)
    seeds = collections.defaultdict(list)
    for row in rows:
        seeds[models.model_of(row)].append(np.log(row[quality]))
    freedom = sum(len(values) - 1 for values in seeds.values())
    squares = sum(np.var(values) * len(values) for values in seeds.values())
    noise = float(np.sqrt(squares / freedom)) if freedom else None
    found = []
    ordered = sorted(models.average(rows, quality), key=_order)
    for pair in itertools.combinations(ordered, 2):
        low, high = sorted(row[cost] for row in pair)
        if high > (1 + within) * low or not differ(*pair):
            continue
        log_ratio = float(np.log(pair[1][quality] / pair[0][quality]))
        spread = noise and noise * np.sqrt(sum(1 / len(seeds[models.model_of(r)]) for r in pair))
        names = ("model", "depth", "hidden_size", "tokens", cost, quality)
        found.append(
            dict(
                pair=[{name: row[name] for name in names} for row in pair],
                ratio=pair[1][cost] / pair[0][cost],
                better=pair[log_ratio < 0]["model"],
                log_ratio=log_ratio,
                deviations=float(log_ratio / spread) if spread else None,
            )
        )
    if not found:
        raise ValueError(
            f"needs 2 models whose {cost} are within {within:.0%} of each other and that differ "
            f"otherwise; at step {step} there are none."
        )
    return dict(step=step, noise=noise, pairs=found)


def _order(row):
    """DiTs by tokens and depth, then UNets, which have neither."""
    return str(row.get("network")), row["tokens"] or 0, row["depth"] or 0
