"""What one thing does with the others held: tokens, depth, width; pairs that cost the same.

All at equal steps, and so at equal images seen. Rows are those of `selection.measured`.
"""

import collections
import itertools

import numpy as np

from dit_jax.errors import UserError
from experiments.scaling.fits import selection

# What changes with each: the rest of a model is held.
VARIED = {
    "tokens": ("patch_size",),
    "depth": ("depth",),
    "hidden_size": ("hidden_size", "num_heads"),
}


def slopes(rows: list[dict], quality: str, of: str) -> dict:
    """The slope of log quality against the log of tokens, depth or hidden_size, all else held.

    Returns: step, the last; groups, of two models or more that differ in it, so in gmacs, and in
      nothing else (models, values, slope, and per_gmacs, the slope against log gmacs instead), by
      gmacs; mean and mean_per_gmacs of their slopes, which need not be alike; by_step, that mean
      at every step (step, mean).
    Raises: ValueError if no two models differ in it alone.
    """
    step = selection.last_step(rows)
    groups = _groups(selection.at_step(rows, step), quality, of)
    if not groups:
        raise UserError(
            f"needs 2 models or more that differ in {of} alone; at step {step} there are none."
        )
    by_step = []
    for at in sorted({row["step"] for row in rows}):
        if there := _groups(selection.at_step(rows, at), quality, of):
            by_step.append(dict(step=at, mean=_mean(there, "slope")))
    means = dict(mean=_mean(groups, "slope"), mean_per_gmacs=_mean(groups, "per_gmacs"))
    return dict(step=step, groups=groups, **means, by_step=by_step)


def _groups(rows, quality, of):
    groups = collections.defaultdict(list)
    for row in selection.average(rows, quality):
        if row[of] is None:  # a UNet has none
            continue
        groups[selection.model_of(row | dict.fromkeys((*VARIED[of], "params")))].append(row)
    found = []
    for group in sorted(groups.values(), key=lambda rows: min(row["gmacs"] for row in rows)):
        group = sorted(group, key=lambda row: row[of])
        values = [row[of] for row in group]
        if len(set(values)) > 1 and len({row["gmacs"] for row in group}) > 1:
            logs = np.log([row[quality] for row in group])
            slope, per_gmacs = (
                float(np.polyfit(np.log([row[x] for row in group]), logs, 1)[0])
                for x in (of, "gmacs")
            )
            names = [row["model"] for row in group]
            found.append(dict(models=names, values=values, slope=slope, per_gmacs=per_gmacs))
    return found


def _mean(groups, name):
    return float(np.mean([group[name] for group in groups]))


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

    Raises: as `pairs` and `selection.comparable`.
    """
    rows = selection.comparable(rows, quality, across=("network", "block"))
    return pairs(rows, quality, "gmacs", within, lambda a, b: a["network"] != b["network"])


def pairs(rows: list[dict], quality: str, cost: str, within: float, differ) -> dict:
    """Which of two models is better, of those whose costs differ by at most a share `within`.

    Returns: step; cost; noise, the deviations of log quality between seeds of a model, pooled over
      the models of each number of tokens (tokens, deviation), without those that have one seed;
      pairs, each of two (model, depth, hidden_size, tokens, cost, quality), ratio of the second's
      cost to the first's, its better one's name, log_ratio of the second's quality to the first's,
      and that in deviations of a difference between the two models' means, None without noise.
    Raises: ValueError if there are none.
    """
    step = selection.last_step(rows)
    rows = selection.at_step(rows, step)
    seeds = collections.Counter(map(selection.model_of, rows))
    noise = _noise(rows, quality)
    found = []
    ordered = sorted(selection.average(rows, quality), key=_order)
    for pair in itertools.combinations(ordered, 2):
        low, high = sorted(row[cost] for row in pair)
        if high > (1 + within) * low or not differ(*pair):
            continue
        log_ratio = float(np.log(pair[1][quality] / pair[0][quality]))
        deviations = None
        if all(row["tokens"] in noise for row in pair):
            squares = (noise[row["tokens"]] ** 2 / seeds[selection.model_of(row)] for row in pair)
            deviations = float(log_ratio / np.sqrt(sum(squares)))
        names = ("model", "depth", "hidden_size", "tokens", cost, quality)
        found.append(
            dict(
                pair=[{name: row[name] for name in names} for row in pair],
                ratio=pair[1][cost] / pair[0][cost],
                better=pair[log_ratio < 0]["model"],
                log_ratio=log_ratio,
                deviations=deviations,
            )
        )
    if not found:
        raise UserError(
            f"needs 2 models whose {cost} are within {within:.0%} of each other and that differ "
            f"otherwise; at step {step} there are none."
        )
    told = [dict(tokens=tokens, deviation=value) for tokens, value in noise.items()]
    return dict(step=step, cost=cost, noise=told, pairs=found)


def _noise(rows, quality):
    """{tokens: deviation of log quality between seeds}; of UNets, tokens is None."""
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        values[row["tokens"]][selection.model_of(row)].append(np.log(row[quality]))
    found = {}
    for tokens in sorted(values, key=lambda tokens: tokens or 0):
        of_models = values[tokens].values()
        freedom = sum(len(logs) - 1 for logs in of_models)
        squares = sum(np.var(logs) * len(logs) for logs in of_models)
        if freedom and squares:
            found[tokens] = float(np.sqrt(squares / freedom))
    return found


def _order(row):
    """DiTs by tokens and depth, then UNets, which have neither."""
    return str(row.get("network")), row["tokens"] or 0, row["depth"] or 0
