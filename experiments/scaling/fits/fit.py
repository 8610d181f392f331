"""Fits of quality against compute to a study's table, with their intervals and extrapolations.

Quality is a loss or a distance; lower is better. Fits that need more points than the table has are
left out.
"""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from experiments.scaling.fits import bootstrap, contrasts, laws, selection, table


def fit_study(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Returns all fits of this module and of `contrasts`; {"left_out": reason} for a failed fit.

    Args: rows, as `table.read` returns them.   seed, of the bootstrap.
    Raises: ValueError as `selection.measured`; ValueError with all reasons if every fit fails.
    """
    rows = selection.measured(rows, quality)
    last = selection.at_last_step(rows)
    best = find_frontier(selection.average(rows, quality), quality)
    envelope = find_envelope(rows, quality)
    # The fits are functions, so that one that raises does not prevent the others.
    fits = {
        "line": lambda: fit_lines(rows, quality, seed),
        "law": lambda: {
            "step": selection.last_step(rows),
            **fit_law(last, quality, "gmacs", seed),
        },
        "law_of_frontier": lambda: _fit_law_of_envelope(envelope, quality),
        "largest": lambda: predict_largest(rows, quality, seed),
        "rolling": lambda: predict_larger(rows, quality),
        "within_tokens": lambda: fit_within_tokens(last, quality, seed),
        "iso_flop": lambda: fit_optima(rows, quality),
        **{of: lambda of=of: contrasts.fit_slopes(rows, quality, of) for of in contrasts.VARIED},
        "equal_gmacs": lambda: contrasts.compare_equal_gmacs(rows, quality),
        "equal_params": lambda: contrasts.compare_equal_params(rows, quality),
    }
    results = {name: _or_reason(fit) for name, fit in fits.items()}
    if all("left_out" in fit for fit in results.values()):
        reasons = "\n".join(f"  {name}: {fit['left_out']}" for name, fit in results.items())
        raise UserError(f"nothing can be fitted to {len(rows)} rows with {quality}:\n{reasons}")
    # The file of fits can be read without the table: it says what was measured and how.
    first = table.to_rows(rows[:1])[0]
    return {
        "quality": quality,
        "rows": len(rows),
        "models": selection.name_models(rows).nunique(),
        "seeds": rows["seed"].nunique(dropna=False),
        "steps": sorted(rows["step"].unique().tolist()),
        "level": bootstrap.LEVEL,
        **{name: first[name] for name in selection.SAMPLING if first.get(name) is not None},
        "frontier": table.to_rows(best[["model", "step", "train_gflops", quality]]),
        **results,
    }


def _or_reason(fit):
    """Returns fit(), or {"left_out": reason} if it raises or has values that are not finite."""
    try:
        result = fit()
        json.dumps(result, allow_nan=False)  # raises for values that JSON cannot hold
    except ValueError as error:
        return {"left_out": str(error)}
    return result


def _or_none(interval, *arguments, seed):
    """Returns the interval, or None for too few cells; the fit is valid without it."""
    try:
        return interval(*arguments, seed=seed)
    except ValueError:
        return None


def fit_law(rows: pd.DataFrame, quality: str, x: str, seed: int = 0) -> dict:
    """Fits `laws.fit_power_law` to quality against x, with bootstrap intervals of a and c.

    Returns: x, points, models, a, b, c, a_interval, c_interval. For fewer than 6 models the
      intervals are None, and "no_intervals" has the reason.
    Raises: ValueError as `laws.fit_power_law`.
    """
    columns = _get_columns(rows, x, quality)
    law = laws.fit_power_law(*columns[:2])
    result = dict(x=x, points=len(rows), models=len(set(columns[2])), **dataclasses.asdict(law))
    result |= dict(a_interval=None, c_interval=None)
    try:
        intervals = bootstrap.find_law_intervals(*columns, seed=seed)
    except ValueError as error:
        return result | {"no_intervals": str(error)}
    return result | {f"{name}_interval": interval for name, interval in intervals.items()}


def _get_columns(rows, x, quality):
    """Returns x [n], quality [n] and cells [n], the arguments of `bootstrap`; a cell is a model."""
    cells = selection.name_models(rows).to_numpy()
    return rows[x].to_numpy(float), rows[quality].to_numpy(float), cells


def fit_lines(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Fits `laws.fit_line` to quality against gmacs at each step, over all runs that reached it.

    Returns: x; steps, each with step, points, models, intercept, slope, slope_interval (None for
      fewer than 6 models), correlation, and of_params, the correlation with log params instead.
    Raises: ValueError if no step has models with 3 different gmacs.
    """
    results = []
    for step, part in rows.groupby("step"):
        columns = _get_columns(part, "gmacs", quality)
        gmacs, qualities, cells = columns
        if len(set(gmacs)) < laws.MIN_LINE:  # few models may have reached the step
            continue
        params = np.log(part["params"].to_numpy(float))
        results.append(
            dict(
                step=int(step),
                points=len(part),
                models=len(set(cells)),
                **dataclasses.asdict(laws.fit_line(gmacs, qualities)),
                of_params=laws.get_correlation(params, qualities),
                slope_interval=_or_none(bootstrap.find_slope_interval, *columns, seed=seed),
            )
        )
    if not results:
        raise UserError(f"a line needs {laws.MIN_LINE} models of different gmacs at one step.")
    return dict(x="gmacs", steps=results)


def predict_largest(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Predicts the model with the largest gmacs by a power law of all others at the last step.

    Returns: step, model, gmacs, reach (gmacs over the next largest model's), predicted, interval
      (of one more run; None for fewer than 6 other models), measured (mean over runs), runs,
      relative_error.
    Raises: ValueError if there are no others, or as `laws.fit_power_law` of the others.
    """
    rows = selection.at_last_step(rows)
    # If several models have the largest gmacs, the first is predicted and the others are fitted.
    models, largest = selection.name_models(rows), rows["gmacs"].idxmax()
    held_out, others = rows[models == models[largest]], rows[models != models[largest]]
    if others.empty:
        raise UserError("needs other models than the largest.")
    columns = _get_columns(others, "gmacs", quality)
    most = float(rows["gmacs"].max())
    predicted = float(laws.fit_power_law(*columns[:2])(most))
    measured = float(np.mean(held_out[quality].to_numpy(float)))
    return dict(
        step=selection.last_step(rows),
        model=held_out["model"].iloc[0],
        gmacs=most,
        reach=float(most / others["gmacs"].max()),
        predicted=predicted,
        interval=_or_none(bootstrap.find_prediction_interval, *columns, most, seed=seed),
        measured=measured,
        runs=len(held_out),
        relative_error=predicted / measured - 1,
    )


def predict_larger(rows: pd.DataFrame, quality: str) -> dict:
    """Predicts larger models by power laws of smaller ones, to show how errors grow with distance.

    For each size, a law is fitted to the models up to it at the last step, and predicts all larger
    models.
    Returns: step; predictions, each with fitted_to (gmacs), model, gmacs, reach = gmacs /
      fitted_to, predicted, measured, relative_error.
    Raises: ValueError if no law can be fitted below the largest model.
    """
    step = selection.last_step(rows)
    rows = selection.average(selection.at_last_step(rows), quality)
    sizes = sorted(rows["gmacs"].unique().tolist())
    # A law needs MIN_POWER sizes, and beyond the largest size there is nothing to predict.
    parts = []
    for cut in sizes[laws.MIN_POWER - 1 : -1]:
        below, above = rows[rows["gmacs"] <= cut], rows[rows["gmacs"] > cut]
        try:
            law = laws.fit_power_law(*_get_columns(below, "gmacs", quality)[:2])
        except ValueError:  # over few models, quality may not fall with gmacs
            continue
        above = above.sort_values("gmacs", kind="stable")
        parts.append(
            pd.DataFrame(
                dict(
                    fitted_to=cut,
                    model=above["model"],
                    gmacs=above["gmacs"],
                    reach=above["gmacs"] / cut,
                    predicted=law(above["gmacs"]),
                    measured=above[quality],
                )
            )
        )
    if not parts:
        need = laws.MIN_POWER
        raise UserError(f"needs {need} models that a law fits, and a larger one, at step {step}.")
    predictions = pd.concat(parts)
    predictions["relative_error"] = predictions["predicted"] / predictions["measured"] - 1
    return dict(step=step, predictions=table.to_rows(predictions))


def fit_within_tokens(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Fits and predicts the models with each number of tokens by themselves.

    Args: rows, of one step.
    Returns: groups, each with tokens; line, the single step of `fit_lines`; largest, as
      `predict_largest`; rolling, as `predict_larger`. With too few models, any of the three is
      {"left_out": reason}.
    Raises: ValueError if all models have the same tokens.
    """
    groups = []
    for tokens, alike in selection.split_by_tokens(rows[rows["tokens"].notna()]):
        line = _or_reason(lambda alike=alike: fit_lines(alike, quality, seed)["steps"][0])
        largest = _or_reason(lambda alike=alike: predict_largest(alike, quality, seed))
        rolling = _or_reason(lambda alike=alike: predict_larger(alike, quality))
        groups.append(dict(tokens=tokens, line=line, largest=largest, rolling=rolling))
    if len(groups) < 2:
        raise UserError("needs models of several numbers of tokens.")
    return dict(groups=groups)


def find_frontier(rows: pd.DataFrame, quality: str, x: str = "train_gflops") -> pd.DataFrame:
    """Returns the Pareto frontier in the order of x.

    A row is on it if every other row with less or equal x has a worse quality.
    """
    # Of rows with equal x the best comes first, so the others are not better and are left out.
    rows = rows.sort_values([x, quality])
    return rows[rows[quality] < rows[quality].cummin().shift(fill_value=np.inf)]


def find_envelope(rows: pd.DataFrame, quality: str, points: int = 32) -> pd.DataFrame:
    """Returns the best quality of any model at up to each training compute.

    Qualities are interpolated on each model's curve, as in `find_optima`. An envelope of measured
    points alone would fall in steps at the compute points, and be too high just before each.
    Returns: `points` rows with train_gflops, evenly spaced in log from the least to the most;
      quality, which never gets worse; and model.
    """
    rows = selection.average(rows, quality)
    least, most = rows["train_gflops"].min(), rows["train_gflops"].max()
    # The first and last budgets are moved inwards, so that rounding cannot put them off the curves.
    budgets = np.geomspace(least * (1 + 1e-9), most * (1 - 1e-9), points)
    models, qualities = _interpolate(rows, quality, budgets, beyond=True)
    # A model that has not begun yet is never the best.
    qualities = np.nan_to_num(qualities, nan=np.inf)
    best = pd.DataFrame({"train_gflops": budgets, quality: qualities.min(axis=0)})
    best["model"] = models["model"].to_numpy()[qualities.argmin(axis=0)]
    # Where no model is better than those before, the best of those counts.
    better = best[quality] < best[quality].cummin().shift(fill_value=np.inf)
    best[["model", quality]] = best[["model", quality]].where(better).ffill()
    return best


def _interpolate(rows, quality, budgets, beyond=False):
    """Interpolates the qualities of all models at compute budgets, linearly in log-log.

    Args:
      rows: of `selection.average`.
      beyond: whether a model keeps the quality of its last point beyond it.
    Returns: the first row of each model; qualities [models, budgets], nan outside a model's curve.
    """
    curves = [curve for _, curve in rows.groupby(selection.name_models(rows), sort=False)]
    qualities = []
    for curve in curves:
        compute, values = np.log(curve[["train_gflops", quality]].to_numpy(float).T)
        right = values[-1] if beyond else np.nan
        values = np.interp(np.log(budgets), compute, values, left=np.nan, right=right)
        qualities.append(np.exp(values))
    return pd.concat([curve[:1] for curve in curves]), np.stack(qualities)


def _fit_law_of_envelope(envelope, quality):
    """Fits `laws.fit_power_law` to the envelope, without intervals.

    The bootstrap needs independent cells, but the envelope's points are selected among models.
    """
    law = laws.fit_power_law(envelope["train_gflops"], envelope[quality])
    result = dict(x="train_gflops", points=len(envelope), models=envelope["model"].nunique())
    result |= dict(**dataclasses.asdict(law), a_interval=None, c_interval=None)
    why = "its points are chosen among models, and of a few of them"
    return result | {"no_intervals": why}


def find_optima(
    rows: pd.DataFrame, quality: str, budgets: Iterable[float] | None = None
) -> list[dict]:
    """Finds the best model and the optimal size for each compute budget and number of tokens.

    Quality at a budget is interpolated linearly in log-log on each model's own curve. The optimum
    is the minimum of a parabola in log(gmacs), fitted to the best model and two on either side.
    There is no optimum if the best model is the smallest or the largest.

    Args: budgets, in train_gflops; by default 12 from the least compute to the most.
    Returns: for each budget on the curves of 3 models or more: tokens, budget, models (model,
      gmacs, params, quality), best (a model), bracketed (whether there is an optimum), and gmacs,
      params, quality at the optimum, else None.
    """
    rows = selection.average(rows, quality)
    if budgets is None:
        budgets = np.geomspace(rows["train_gflops"].min(), rows["train_gflops"].max(), 12)
    results = []
    for tokens, alike in selection.split_by_tokens(rows):
        models, qualities = _interpolate(alike, quality, budgets)
        for budget, values in zip(budgets, qualities.T, strict=True):
            points = models[["model", "gmacs", "params"]].assign(quality=values)
            points = points.dropna(subset="quality").sort_values("gmacs", kind="stable")
            if len(points) >= 3:
                at = dict(tokens=tokens, budget=float(budget))
                results.append(at | _find_optimum(table.to_rows(points)))
    return results


def _find_optimum(points):
    """Returns the values of `find_optima` for points ordered by gmacs."""
    i = min(range(len(points)), key=lambda i: points[i]["quality"])
    result = dict(models=points, best=points[i]["model"], bracketed=0 < i < len(points) - 1)
    result |= dict(gmacs=None, params=None, quality=None)
    if not result["bracketed"]:
        return result
    near = points[max(i - 2, 0) : i + 3]
    gmacs, params, value = (
        np.log([point[name] for point in near]) for name in ("gmacs", "params", "quality")
    )
    # About the mean of log gmacs, which keeps the fit well conditioned.
    curvature, slope, level = np.polyfit(gmacs - gmacs.mean(), value, 2)
    # A parabola that opens downwards, or has its minimum beyond the points, shows no optimum.
    if curvature <= 0 or not gmacs[0] < (at := gmacs.mean() - slope / 2 / curvature) < gmacs[-1]:
        return result | dict(bracketed=False)
    optimum = dict(gmacs=at, params=np.interp(at, gmacs, params))
    optimum |= dict(quality=level - slope**2 / 4 / curvature)
    return result | {name: float(np.exp(log)) for name, log in optimum.items()}


def fit_optima(rows: pd.DataFrame, quality: str) -> dict:
    """Returns `find_optima`, and the exponents with which optimal sizes grow with compute.

    Returns: budgets, of `find_optima`; exponents, for each number of tokens with at least 3 optima.
      An exponent has tokens; optima, their number; gmacs and params, p of optimum ~ compute^p;
      by_seed, p of gmacs for each seed that has one by itself.
    Raises: ValueError if no budget lies on the curves of 3 models.
    """
    budgets = find_optima(rows, quality)
    if not budgets:
        raise UserError(
            "needs 3 models of equal tokens with several steps each, so that their curves pass "
            "the same compute."
        )
    # Each seed alone is measured at the budgets of all seeds together.
    same = sorted({budget["budget"] for budget in budgets})
    exponents = []
    for tokens, alike in selection.split_by_tokens(rows):
        if exponent := _fit_exponents(budget for budget in budgets if budget["tokens"] == tokens):
            # The spread between seeds shows how far an exponent can be trusted.
            seeds = (
                _fit_exponents(find_optima(alone, quality, same))
                for _, alone in alike.groupby("seed")
            )
            by_seed = [one["gmacs"] for one in seeds if one]
            exponents.append(dict(tokens=tokens, **exponent, by_seed=by_seed))
    return dict(budgets=budgets, exponents=exponents)


def _fit_exponents(budgets):
    """Fits the exponents to budgets of one number of tokens; None for fewer than 3 optima."""
    points = [budget for budget in budgets if budget["bracketed"]]
    if len(points) < 3:
        return None
    compute, gmacs, params = (np.log([b[n] for b in points]) for n in ("budget", "gmacs", "params"))
    slopes = {
        name: float(np.polyfit(compute, sizes, 1)[0])
        for name, sizes in (("gmacs", gmacs), ("params", params))
    }
    return dict(optima=len(points), **slopes)
