"""Effects of single properties (tokens, depth, width), and pairs of models with equal cost.

All comparisons are at equal steps, and so at equal numbers of images seen. Rows come from
`selection.select_fittable`.
"""

import itertools

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from experiments.scaling.fits import selection, table

# The columns that change with each property. Compared models are equal in all other columns.
VARIED = {
    "tokens": ("patch_size",),
    "depth": ("depth",),
    "hidden_size": ("hidden_size", "num_heads"),
}


def fit_slopes(rows: pd.DataFrame, quality: str, varied: str) -> dict:
    """Fits slopes of log quality against the log of one property, with all others equal.

    Args: varied, the property, a key of VARIED.
    Returns:
      step: the last one.
      groups: one for each set of two or more models that differ only in the property, and so in
        gmacs. A group has models, values, slope, and per_gmacs, the slope against log gmacs
        instead. Groups are ordered by gmacs.
      mean, mean_per_gmacs: the means over groups. The slopes of groups may differ widely.
      by_step: the mean slope at every step (step, mean).
    Raises: ValueError if no two models differ in the property alone.
    """
    by_step = {
        int(step): _fit_groups(at_step, quality, varied) for step, at_step in rows.groupby("step")
    }
    last_step = selection.find_last_step(rows)
    if not (groups := by_step[last_step]):
        raise UserError(
            f"needs 2 models or more that differ in {varied} alone; at step {last_step} there are "
            "none."
        )
    return dict(
        step=last_step,
        groups=groups,
        mean=_average(groups, "slope"),
        mean_per_gmacs=_average(groups, "per_gmacs"),
        by_step=[
            dict(step=step, mean=_average(at_step, "slope"))
            for step, at_step in by_step.items()
            if at_step
        ],
    )


def _fit_groups(rows, quality, varied):
    """Returns the groups of `fit_slopes` among rows of one step."""
    # A UNet has no tokens, depth or hidden_size.
    rows = selection.average_seeds(rows, quality).dropna(subset=varied)
    # params change with every property.
    otherwise_equal = selection.name_models(rows, ignored=(*VARIED[varied], "params"))
    results, groups = [], [group for _, group in rows.groupby(otherwise_equal, sort=False)]
    for group in sorted(groups, key=lambda group: group["gmacs"].min()):
        if group[varied].nunique() > 1 and group["gmacs"].nunique() > 1:
            group = group.sort_values(varied, kind="stable")
            logs = np.log(group[[quality, varied, "gmacs"]].to_numpy(float)).T
            slope, per_gmacs = (float(np.polyfit(x, logs[0], 1)[0]) for x in logs[1:])
            models, values = group["model"].tolist(), group[varied].tolist()
            results.append(dict(models=models, values=values, slope=slope, per_gmacs=per_gmacs))
    return results


def _average(groups, name):
    """Returns the mean of a value over groups."""
    return float(np.mean([group[name] for group in groups]))


def compare_equal_gmacs(rows: pd.DataFrame, quality: str, within: float = 0.1) -> dict:
    """Compares models with about equal gmacs and different tokens.

    The question is whether to spend gmacs on tokens, or on depth and width.
    Returns and raises: as `compare_pairs`.
    """
    return compare_pairs(rows, quality, "gmacs", within, differ="tokens")


def compare_equal_params(rows: pd.DataFrame, quality: str, within: float = 0.1) -> dict:
    """Compares deep, narrow models with shallow, wide ones of about equal parameters.

    Returns and raises: as `compare_pairs`.
    """
    return compare_pairs(rows, quality, "params", within, differ="depth", agree=("tokens",))


def compare_networks(rows: pd.DataFrame, quality: str, within: float = 0.1) -> dict:
    """Compares DiTs and UNets with about equal gmacs.

    Args: rows, of a whole table; `selection.select_fittable` would refuse several networks.
    Returns and raises: as `compare_pairs`; raises as `selection.select_comparable`.
    """
    rows = selection.select_comparable(rows, quality, across=("network", "block"))
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

    Args: cost, differ: columns; two models must differ in `differ`.   agree: equal columns.
    Returns:
      step, cost.
      noise: for each number of tokens, the standard deviation of log quality between seeds, pooled
        over its models (tokens, deviation). Models with one seed do not count.
      pairs: a list. Each has pair, the two models (model, depth, hidden_size, tokens, cost,
        quality); ratio, the second model's cost over the first's; better, the name of the better
        model; log_ratio, the log of the second quality over the first; deviations, log_ratio in
        standard deviations of the difference between two means over seeds, None without noise.
    Raises: ValueError if there are no pairs.
    """
    # The noise between seeds is measured before the seeds are averaged.
    step = selection.find_last_step(rows)
    rows = selection.select_last_step(rows)
    noise = _measure_noise(rows, quality)
    # In this order the first of a pair is the DiT, or has fewer tokens or less depth.
    order = [name for name in ("network", "tokens", "depth") if name in rows]
    means = selection.average_seeds(rows, quality).sort_values(order, na_position="first")
    results = []
    for pair in itertools.combinations(table.to_rows(means), 2):
        first, second = pair
        low, high = sorted((first[cost], second[cost]))
        agrees = all(first[name] == second[name] for name in agree)
        if high > (1 + within) * low or first[differ] == second[differ] or not agrees:
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
                # Quality is a loss or a distance, so the lower one is better.
                better=second["model"] if log_ratio < 0 else first["model"],
                log_ratio=log_ratio,
                deviations=deviations,
            )
        )
    if not results:
        raise UserError(
            f"needs 2 models that differ in {differ} and whose {cost} are within {within:.0%} of "
            f"each other; at step {step} there are none."
        )
    # A dict with numbers as keys cannot be JSON.
    noise_list = [dict(tokens=tokens, deviation=value) for tokens, value in noise.items()]
    return dict(step=step, cost=cost, noise=noise_list, pairs=results)


def _measure_noise(rows, quality):
    """Returns {tokens: standard deviation of log quality between seeds}; UNets have tokens None."""
    deviations = {}
    for tokens, group in selection.split_by_tokens(rows):
        models = group.groupby(selection.name_models(group), sort=False)[quality]
        freedom = len(group) - models.ngroups
        squares = sum(np.var(np.log(seeds.to_numpy(float))) * len(seeds) for _, seeds in models)
        if freedom and squares:
            deviations[tokens] = float(np.sqrt(squares / freedom))
    return deviations
