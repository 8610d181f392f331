"""Effects of single properties (tokens, depth, width), and pairs of models with equal cost.

All comparisons are at equal steps, and so at equal numbers of images seen. Rows come from
`selection.measured`.
"""

import collections
import itertools

import numpy as np

from dit_jax.errors import UserError
from experiments.scaling.fits import selection

# The columns that change with each property. Models that are compared are equal in all others.
VARIED = {
    "tokens": ("patch_size",),
    "depth": ("depth",),
    "hidden_size": ("hidden_size", "num_heads"),
}


def slopes(rows: list[dict], quality: str, of: str) -> dict:
    """Fits slopes of log quality against the log of one property, with all others equal.

    Args: of, the property, a key of VARIED.
    Returns:
      step: the last one.
      groups: one for each set of two or more models that differ in the property, so in gmacs, and
        in nothing else. A group has models, values, slope, and per_gmacs, the slope against log
        gmacs instead. Groups are ordered by gmacs.
      mean, mean_per_gmacs: the means over groups; the slopes of groups may differ widely.
      by_step: that mean at every step (step, mean).
    Raises: ValueError if no two models differ in the property alone.
    """
    step = selection.last_step(rows)
    groups = _groups(selection.at_step(rows, step), quality, of)
    if not groups:
        raise UserError(
            f"needs 2 models or more that differ in {of} alone; at step {step} there are none."
        )
    by_step = []
    for at in sorted({row["step"] for row in rows}):
        if groups_at := _groups(selection.at_step(rows, at), quality, of):
            by_step.append(dict(step=at, mean=_mean(groups_at, "slope")))
    means = dict(mean=_mean(groups, "slope"), mean_per_gmacs=_mean(groups, "per_gmacs"))
    return dict(step=step, groups=groups, **means, by_step=by_step)


def _groups(rows, quality, of):
    """Returns the groups of `slopes` among rows of one step."""
    # Models have the same key if they differ only in the property and in params, which follows it.
    groups = collections.defaultdict(list)
    for row in selection.average(rows, quality):
        if row[of] is None:  # a UNet has no tokens, depth or hidden_size
            continue
        groups[selection.get_model_key(row | dict.fromkeys((*VARIED[of], "params")))].append(row)
    results = []
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
            results.append(dict(models=names, values=values, slope=slope, per_gmacs=per_gmacs))
    return results


def _mean(groups, name):
    """Returns the mean of a value over groups."""
    return float(np.mean([group[name] for group in groups]))


def equal_gmacs(rows: list[dict], quality: str, within: float = 0.1) -> dict:
    """Returns `pairs` of models with about equal gmacs and different tokens.

    They compare spending gmacs on tokens with spending them on depth or width.
    """
    return pairs(rows, quality, "gmacs", within, lambda a, b: a["tokens"] != b["tokens"])


def equal_params(rows: list[dict], quality: str, within: float = 0.1) -> dict:
    """Returns `pairs` with about equal parameters, equal tokens and different depths.

    They compare deep and narrow models with shallow and wide ones.
    """

    def differ(a, b):
        return a["tokens"] == b["tokens"] and a["depth"] != b["depth"]

    return pairs(rows, quality, "params", within, differ)


def networks(rows: list[dict], quality: str, within: float = 0.1) -> dict:
    """Returns `pairs` of a DiT and a UNet with about equal gmacs.

    Args: rows, of a whole table; `selection.measured` would refuse several networks.
    Raises: as `pairs` and `selection.comparable`.
    """
    rows = selection.comparable(rows, quality, across=("network", "block"))
    return pairs(rows, quality, "gmacs", within, lambda a, b: a["network"] != b["network"])


def pairs(rows: list[dict], quality: str, cost: str, within: float, differ) -> dict:
    """Compares every two models at the last step whose costs differ by at most a share `within`.

    Args: cost, a column.   differ: a function of two rows; only pairs for which it is true count.
    Returns:
      step, cost.
      noise: the standard deviation of log quality between seeds of a model, pooled over the models
        with each number of tokens (tokens, deviation). Models with one seed do not count.
      pairs: a list. Each has pair, two of (model, depth, hidden_size, tokens, cost, quality);
        ratio, the second's cost over the first's; better, the name of the better model; log_ratio,
        the log of the second's quality over the first's; deviations, log_ratio in standard
        deviations of the difference between the two means over seeds, None without noise.
    Raises: ValueError if there are no pairs.
    """
    # The noise between seeds is measured before the seeds are averaged away.
    step = selection.last_step(rows)
    rows = selection.at_step(rows, step)
    seeds = collections.Counter(map(selection.get_model_key, rows))
    noise = _noise(rows, quality)
    results = []
    # In this order the first of a pair is the DiT, or has fewer tokens or less depth.
    ordered = sorted(selection.average(rows, quality), key=_order)
    for pair in itertools.combinations(ordered, 2):
        low, high = sorted(row[cost] for row in pair)
        if high > (1 + within) * low or not differ(*pair):
            continue
        # The variance of a mean over n seeds is the variance between seeds / n.
        log_ratio = float(np.log(pair[1][quality] / pair[0][quality]))
        deviations = None
        if all(row["tokens"] in noise for row in pair):
            squares = (
                noise[row["tokens"]] ** 2 / seeds[selection.get_model_key(row)] for row in pair
            )
            deviations = float(log_ratio / np.sqrt(sum(squares)))
        names = ("model", "depth", "hidden_size", "tokens", cost, quality)
        results.append(
            dict(
                pair=[{name: row[name] for name in names} for row in pair],
                ratio=pair[1][cost] / pair[0][cost],
                better=pair[log_ratio < 0]["model"],  # lower quality is better: a loss or distance
                log_ratio=log_ratio,
                deviations=deviations,
            )
        )
    if not results:
        raise UserError(
            f"needs 2 models whose {cost} are within {within:.0%} of each other and that differ "
            f"otherwise; at step {step} there are none."
        )
    # JSON has only text as keys, so the noise is a list instead of {tokens: deviation}.
    noise_list = [dict(tokens=tokens, deviation=value) for tokens, value in noise.items()]
    return dict(step=step, cost=cost, noise=noise_list, pairs=results)


def _noise(rows, quality):
    """Returns {tokens: standard deviation of log quality between seeds}; UNets have tokens None."""
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        values[row["tokens"]][selection.get_model_key(row)].append(np.log(row[quality]))
    deviations = {}
    for tokens in sorted(values, key=lambda tokens: tokens or 0):
        models = values[tokens].values()
        freedom = sum(len(logs) - 1 for logs in models)
        squares = sum(np.var(logs) * len(logs) for logs in models)
        if freedom and squares:
            deviations[tokens] = float(np.sqrt(squares / freedom))
    return deviations


def _order(row):
    """Returns a sort key: DiTs by tokens and depth, then UNets, which have neither."""
    return str(row.get("network")), row["tokens"] or 0, row["depth"] or 0
