"""Effects of single properties (tokens, depth, width), and pairs of models with equal cost.

All comparisons are at equal steps, and so at equal numbers of images seen. Rows come from
`selection.measured`.
"""

import itertools

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from experiments.scaling.fits import selection, table

# The columns that change with each property. Models that are compared are equal in all others.
VARIED = {
    "tokens": ("patch_size",),
    "depth": ("depth",),
    "hidden_size": ("hidden_size", "num_heads"),
}


def fit_slopes(rows: pd.DataFrame, quality: str, of: str) -> dict:
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
    by_step = {int(at): _fit_groups(part, quality, of) for at, part in rows.groupby("step")}
    step = selection.last_step(rows)
    if not (groups := by_step[step]):
        raise UserError(
            f"needs 2 models or more that differ in {of} alone; at step {step} there are none."
        )
    return dict(
        step=step,
        groups=groups,
        mean=_mean(groups, "slope"),
        mean_per_gmacs=_mean(groups, "per_gmacs"),
        by_step=[
            dict(step=at, mean=_mean(found, "slope")) for at, found in by_step.items() if found
        ],
    )


def _fit_groups(rows, quality, of):
    """Returns the groups of `fit_slopes` among rows of one step."""
    # A UNet has no tokens, depth or hidden_size.
    rows = selection.average(rows, quality).dropna(subset=of)
    # params follow the property.
    alike = selection.name_models(rows, but_for=(*VARIED[of], "params"))
    results = []
    groups = [group for _, group in rows.groupby(alike, sort=False)]
    for group in sorted(groups, key=lambda group: group["gmacs"].min()):
        if group[of].nunique() > 1 and group["gmacs"].nunique() > 1:
            group = group.sort_values(of, kind="stable")
            logs = np.log(group[[quality, of, "gmacs"]].to_numpy(float)).T
            slope, per_gmacs = (float(np.polyfit(x, logs[0], 1)[0]) for x in logs[1:])
            models, values = group["model"].tolist(), group[of].tolist()
            results.append(dict(models=models, values=values, slope=slope, per_gmacs=per_gmacs))
    return results


def _mean(groups, name):
    """Returns the mean of a value over groups."""
    return float(np.mean([group[name] for group in groups]))


def compare_equal_gmacs(rows: pd.DataFrame, quality: str, within: float = 0.1) -> dict:
    """Returns `compare_pairs` of models with about equal gmacs and different tokens.

    They compare spending gmacs on tokens with spending them on depth or width.
    """
    return compare_pairs(rows, quality, "gmacs", within, differ="tokens")


def compare_equal_params(rows: pd.DataFrame, quality: str, within: float = 0.1) -> dict:
    """Returns `compare_pairs` with about equal parameters, equal tokens and different depths.

    They compare deep and narrow models with shallow and wide ones.
    """
    return compare_pairs(rows, quality, "params", within, differ="depth", agree=("tokens",))


def compare_networks(rows: pd.DataFrame, quality: str, within: float = 0.1) -> dict:
    """Returns `compare_pairs` of a DiT and a UNet with about equal gmacs.

    Args: rows, of a whole table; `selection.measured` would refuse several networks.
    Raises: as `compare_pairs` and `selection.comparable`.
    """
    rows = selection.comparable(rows, quality, across=("network", "block"))
    return compare_pairs(rows, quality, "gmacs", within, differ="network")


def compare_pairs(
    rows: pd.DataFrame,
    quality: str,
    cost: str,
    within: float,
    differ: str,
    agree: tuple[str, ...] = (),
) -> dict:
    """Compares every two models at the last step whose costs differ by at most a share `within`.

    Args: cost, a column.   differ: a column in which the two differ.   agree: in which they do not.
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
    rows = selection.at_last_step(rows)
    noise = _measure_noise(rows, quality)
    # In this order the first of a pair is the DiT, or has fewer tokens or less depth.
    order = [name for name in ("network", "tokens", "depth") if name in rows]
    means = selection.average(rows, quality).sort_values(order, na_position="first")
    results = []
    for pair in itertools.combinations(table.to_rows(means), 2):
        first, second = pair
        low, high = sorted((first[cost], second[cost]))
        alike = all(first[name] == second[name] for name in agree)
        if high > (1 + within) * low or first[differ] == second[differ] or not alike:
            continue
        log_ratio = float(np.log(second[quality] / first[quality]))
        deviations = None
        if all(row["tokens"] in noise for row in pair):
            # The variance of a mean over n seeds is the variance between seeds / n.
            variances = (noise[row["tokens"]] ** 2 / row["seeds"] for row in pair)
            deviations = float(log_ratio / np.sqrt(sum(variances)))
        names = ("model", "depth", "hidden_size", "tokens", cost, quality)
        results.append(
            dict(
                pair=[{name: row[name] for name in names} for row in pair],
                ratio=second[cost] / first[cost],
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


def _measure_noise(rows, quality):
    """Returns {tokens: standard deviation of log quality between seeds}; UNets have tokens None."""
    deviations = {}
    for tokens, part in selection.split_by_tokens(rows):
        models = part.groupby(selection.name_models(part), sort=False)[quality]
        freedom = len(part) - models.ngroups
        squares = sum(np.var(np.log(seeds.to_numpy(float))) * len(seeds) for _, seeds in models)
        if freedom and squares:
            deviations[tokens] = float(np.sqrt(squares / freedom))
    return deviations
