"""Fits of quality against compute to a study's table, with their intervals and extrapolations.

Quality is a loss or a distance; lower is better.
"""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from dit_jax.errors import UserError
from experiments.scaling.fits import bootstrap, contrasts, laws, selection, table


def fit_study(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Makes all fits of this module and of `contrasts`; a failed fit is {"left_out": reason}.

    Args: rows, as `table.read` returns them.   seed, of the bootstrap.
    Raises: ValueError as `selection.select_fittable`; ValueError with all reasons if every fit
      fails.
    """
    rows = selection.select_fittable(rows, quality)
    last = selection.select_last_step(rows)
    frontier = find_frontier(selection.average_seeds(rows, quality), quality)
    envelope = find_envelope(rows, quality)
    # The fits are functions, so that one that raises does not prevent the others.
    fits = {
        "line": lambda: fit_lines(rows, quality, seed),
        "law": lambda: {
            "step": selection.find_last_step(rows),
            **fit_law(last, quality, "gmacs", seed),
        },
        "law_of_frontier": lambda: _fit_law_of_envelope(envelope, quality),
        "largest": lambda: predict_largest(rows, quality, seed),
        "rolling": lambda: predict_larger(rows, quality),
        "within_tokens": lambda: fit_within_tokens(last, quality, seed),
        "iso_flop": lambda: fit_optima(rows, quality),
        **{
            name: lambda varied=name: contrasts.fit_slopes(rows, quality, varied)
            for name in contrasts.VARIED
        },
        "equal_gmacs": lambda: contrasts.compare_equal_gmacs(rows, quality),
        "equal_params": lambda: contrasts.compare_equal_params(rows, quality),
    }
    results = {name: _try_fit(fit) for name, fit in fits.items()}
    if all("left_out" in fit for fit in results.values()):
        reasons = "\n".join(f"  {name}: {fit['left_out']}" for name, fit in results.items())
        raise UserError(f"nothing can be fitted to {len(rows)} rows with {quality}:\n{reasons}")
    # The fits are also read without the table, so the result says what was measured and how.
    first = table.to_rows(rows[:1])[0]
    return {
        "quality": quality,
        "rows": len(rows),
        "models": selection.name_models(rows).nunique(),
        "seeds": rows["seed"].nunique(dropna=False),
        "steps": sorted(rows["step"].unique().tolist()),
        "level": bootstrap.LEVEL,
        **{name: first[name] for name in selection.SAMPLING if first.get(name) is not None},
        "frontier": table.to_rows(frontier[["model", "step", "train_gflops", quality]]),
        **results,
    }


def _try_fit(fit):
    """Returns fit(), or {"left_out": reason} if that raises or has values that are not finite."""
    try:
        result = fit()
        json.dumps(result, allow_nan=False)  # raises for values that JSON cannot hold
    except ValueError as error:
        return {"left_out": str(error)}
    return result


def _try_interval(find_interval, *arguments, seed):
    """Returns the interval, or None for too few cells. The fit is valid without an interval."""
    try:
        return find_interval(*arguments, seed=seed)
    except ValueError:
        return None


def fit_law(rows: pd.DataFrame, quality: str, x: str, seed: int = 0) -> dict:
    """Fits `laws.fit_power_law` to quality against x, with bootstrap intervals of a and c.

    Returns: x, points, models, a, b, c, a_interval, c_interval. For fewer than 6 models the
      intervals are None, and "no_intervals" has the reason.
    Raises: ValueError as `laws.fit_power_law`.
    """
    x_values, qualities, cells = _get_columns(rows, x, quality)
    law = laws.fit_power_law(x_values, qualities)
    result = dict(x=x, points=len(rows), models=len(set(cells)), **dataclasses.asdict(law))
    result |= dict(a_interval=None, c_interval=None)
    try:
        intervals = bootstrap.find_law_intervals(x_values, qualities, cells, seed=seed)
    except ValueError as error:
        return result | {"no_intervals": str(error)}
    return result | {f"{name}_interval": interval for name, interval in intervals.items()}


def _get_columns(rows, x, quality):
    """Returns the arguments of `bootstrap`: x [n], quality [n], cells [n]; a cell is a model."""
    cells = selection.name_models(rows).to_numpy()
    return rows[x].to_numpy(float), rows[quality].to_numpy(float), cells


def fit_lines(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Fits `laws.fit_line` to quality against gmacs at each step.

    Returns: x; steps, each with step, points, models, intercept, slope, slope_interval (None for
      fewer than 6 models), correlation, and of_params, the correlation with log params instead.
    Raises: ValueError if no step has models with 3 different gmacs.
    """
    results = []
    for step, at_step in rows.groupby("step"):
        gmacs, qualities, cells = columns = _get_columns(at_step, "gmacs", quality)
        if len(set(gmacs)) < laws.MIN_LINE:  # few models may have reached the step
            continue
        log_params = np.log(at_step["params"].to_numpy(float))
        results.append(
            dict(
                step=int(step),
                points=len(at_step),
                models=len(set(cells)),
                **dataclasses.asdict(laws.fit_line(gmacs, qualities)),
                of_params=laws.get_correlation(log_params, qualities),
                slope_interval=_try_interval(bootstrap.find_slope_interval, *columns, seed=seed),
            )
        )
    if not results:
        raise UserError(f"a line needs {laws.MIN_LINE} models of different gmacs at one step.")
    return dict(x="gmacs", steps=results)


def predict_largest(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Predicts the model with the largest gmacs at the last step, by a power law of all others.

    Returns: step; model; gmacs; reach, its gmacs over those of the next largest model; predicted;
      interval, of one more run (None for fewer than 6 other models); measured, the mean over runs;
      runs, their number; relative_error.
    Raises: ValueError if there are no others, or as `laws.fit_power_law` for the others.
    """
    rows = selection.select_last_step(rows)
    # If several models have the largest gmacs, the first is predicted and the others are fitted.
    models, largest = selection.name_models(rows), rows["gmacs"].idxmax()
    held_out, others = rows[models == models[largest]], rows[models != models[largest]]
    if others.empty:
        raise UserError("needs other models than the largest.")
    gmacs, qualities, _ = columns = _get_columns(others, "gmacs", quality)
    most = float(rows["gmacs"].max())
    predicted = float(laws.fit_power_law(gmacs, qualities)(most))
    measured = float(np.mean(held_out[quality].to_numpy(float)))
    return dict(
        step=selection.find_last_step(rows),
        model=held_out["model"].iloc[0],
        gmacs=most,
        reach=float(most / others["gmacs"].max()),
        predicted=predicted,
        interval=_try_interval(bootstrap.find_prediction_interval, *columns, most, seed=seed),
        measured=measured,
        runs=len(held_out),
        relative_error=predicted / measured - 1,
    )


def predict_larger(rows: pd.DataFrame, quality: str) -> dict:
    """Predicts larger models by power laws of smaller ones, to show how errors grow with distance.

    For each model size, a law is fitted to the models up to that size at the last step. It predicts
    all larger models.
    Returns: step; predictions, each with fitted_to (gmacs), model, gmacs, reach = gmacs /
      fitted_to, predicted, measured, relative_error.
    Raises: ValueError if no law can be fitted below the largest model.
    """
    step = selection.find_last_step(rows)
    rows = selection.average_seeds(selection.select_last_step(rows), quality)
    sizes = sorted(rows["gmacs"].unique().tolist())
    # A law needs MIN_POWER sizes, and beyond the largest size there is nothing to predict.
    groups = []
    for limit in sizes[laws.MIN_POWER - 1 : -1]:
        smaller, larger = rows[rows["gmacs"] <= limit], rows[rows["gmacs"] > limit]
        gmacs, qualities, _ = _get_columns(smaller, "gmacs", quality)
        try:
            law = laws.fit_power_law(gmacs, qualities)
        except ValueError:  # over few models, quality may not fall with gmacs
            continue
        larger = larger.sort_values("gmacs", kind="stable")
        groups.append(
            pd.DataFrame(
                dict(
                    fitted_to=limit,
                    model=larger["model"],
                    gmacs=larger["gmacs"],
                    reach=larger["gmacs"] / limit,
                    predicted=law(larger["gmacs"]),
                    measured=larger[quality],
                )
            )
        )
    if not groups:
        least = laws.MIN_POWER
        raise UserError(f"needs {least} models that a law fits, and a larger one, at step {step}.")
    predictions = pd.concat(groups)
    predictions["relative_error"] = predictions["predicted"] / predictions["measured"] - 1
    return dict(step=step, predictions=table.to_rows(predictions))


def fit_within_tokens(rows: pd.DataFrame, quality: str, seed: int = 0) -> dict:
    """Makes separate fits and predictions for the models with each number of tokens.

    Args: rows, of one step.
    Returns: groups, each with tokens; line, the single step of `fit_lines`; largest, as
      `predict_largest`; rolling, as `predict_larger`. With too few models, any of the three is
      {"left_out": reason}.
    Raises: ValueError if all models have the same tokens.
    """
    groups = []
    for tokens, group in selection.split_by_tokens(rows[rows["tokens"].notna()]):
        line = _try_fit(lambda group=group: fit_lines(group, quality, seed)["steps"][0])
        largest = _try_fit(lambda group=group: predict_largest(group, quality, seed))
        rolling = _try_fit(lambda group=group: predict_larger(group, quality))
        groups.append(dict(tokens=tokens, line=line, largest=largest, rolling=rolling))
    if len(groups) < 2:
        raise UserError("needs models of several numbers of tokens.")
    return dict(groups=groups)


def find_frontier(rows: pd.DataFrame, quality: str, x: str = "train_gflops") -> pd.DataFrame:
    """Returns the Pareto frontier in the order of x.

    A row is on the frontier if every other row with less or equal x has a worse quality.
    """
    # Of rows with equal x, the best comes first, so the others do not improve on it.
    rows = rows.sort_values([x, quality])
    return rows[rows[quality] < rows[quality].cummin().shift(fill_value=np.inf)]


def find_envelope(rows: pd.DataFrame, quality: str, points: int = 32) -> pd.DataFrame:
    """Finds the best quality that any model has reached with each training compute.

    Qualities are interpolated on each model's curve, as in `find_optima`. An envelope of measured
    points alone would fall in steps at the compute points, and be too high just before each.
    Returns: `points` rows with train_gflops, evenly spaced in log from the least to the most;
      quality, which never gets worse; and model.
    """
    rows = selection.average_seeds(rows, quality)
    least, most = rows["train_gflops"].min(), rows["train_gflops"].max()
    # The first and last budgets are moved inwards, so that rounding cannot put them off the curves.
    budgets = np.geomspace(least * (1 + 1e-9), most * (1 - 1e-9), points)
    models, qualities = _interpolate(rows, quality, budgets, extend=True)
    # A model that has not begun at a budget is never the best.
    qualities = np.nan_to_num(qualities, nan=np.inf)
    best = pd.DataFrame({"train_gflops": budgets, quality: qualities.min(axis=0)})
    best["model"] = models["model"].to_numpy()[qualities.argmin(axis=0)]
    # A budget at which no model improves on the smaller budgets keeps their best.
    better = best[quality] < best[quality].cummin().shift(fill_value=np.inf)
    best[["model", quality]] = best[["model", quality]].where(better).ffill()
    return best


def _interpolate(rows, quality, budgets, extend=False):
    """Interpolates the qualities of all models at compute budgets, linearly in log-log.

    Args:
      rows: from `selection.average_seeds`.
      extend: whether a model keeps the quality of its last point at larger budgets.
    Returns: the first row of each model; qualities [models, budgets], nan outside a model's curve.
    """
    curves = [curve for _, curve in rows.groupby(selection.name_models(rows), sort=False)]
    qualities = []
    for curve in curves:
        compute, values = np.log(curve[["train_gflops", quality]].to_numpy(float).T)
        right = values[-1] if extend else np.nan
        values = np.interp(np.log(budgets), compute, values, left=np.nan, right=right)
        qualities.append(np.exp(values))
    return pd.concat([curve[:1] for curve in curves]), np.stack(qualities)


def _fit_law_of_envelope(envelope, quality):
    """Fits `laws.fit_power_law` to the envelope, without intervals."""
    law = laws.fit_power_law(envelope["train_gflops"], envelope[quality])
    result = dict(x="train_gflops", points=len(envelope), models=envelope["model"].nunique())
    result |= dict(**dataclasses.asdict(law), a_interval=None, c_interval=None)
    # The bootstrap needs independent cells, but the envelope's points are selected among models.
    reason = "its points are chosen among models, and of a few of them"
    return result | {"no_intervals": reason}


def find_optima(
    rows: pd.DataFrame, quality: str, budgets: Iterable[float] | None = None
) -> list[dict]:
    """Finds the best model and the optimal size for each compute budget and number of tokens.

    Quality at a budget is interpolated linearly in log-log on each model's own curve. The optimum
    is the minimum of a parabola in log(gmacs), fitted to the best model and two on either side.
    There is no optimum if the best model is the smallest or the largest one.

    Args: budgets, in train_gflops; by default 12 from the least compute to the most.
    Returns: a dict for each budget on the curves of 3 models or more. It has tokens; budget; models
      (model, gmacs, params, quality); best, a model; bracketed, whether there is an optimum; and
      gmacs, params, quality at the optimum, else None.
    """
    rows = selection.average_seeds(rows, quality)
    if budgets is None:
        budgets = np.geomspace(rows["train_gflops"].min(), rows["train_gflops"].max(), 12)
    results = []
    for tokens, group in selection.split_by_tokens(rows):
        models, qualities = _interpolate(group, quality, budgets)
        for budget, values in zip(budgets, qualities.T, strict=True):
            points = models[["model", "gmacs", "params"]].assign(quality=values)
            points = points.dropna(subset="quality").sort_values("gmacs", kind="stable")
            if len(points) >= 3:
                optimum = _find_optimum(table.to_rows(points))
                results.append(dict(tokens=tokens, budget=float(budget), **optimum))
    return results


def _find_optimum(points):
    """Returns the values of `find_optima` at one budget, for points ordered by gmacs."""
    best = min(range(len(points)), key=lambda i: points[i]["quality"])
    result = dict(models=points, best=points[best]["model"], bracketed=False)
    result |= dict(gmacs=None, params=None, quality=None)
    if best in (0, len(points) - 1):
        return result
    near = points[max(best - 2, 0) : best + 3]
    gmacs, params, qualities = (
        np.log([point[name] for point in near]) for name in ("gmacs", "params", "quality")
    )
    # Centering log gmacs keeps the fit well conditioned.
    center = gmacs.mean()
    curvature, slope, level = np.polyfit(gmacs - center, qualities, 2)
    if curvature <= 0:  # a parabola that opens downwards has no minimum
        return result
    optimum = center - slope / 2 / curvature
    if not gmacs[0] < optimum < gmacs[-1]:  # a minimum outside the points is an extrapolation
        return result
    logs = dict(gmacs=optimum, params=np.interp(optimum, gmacs, params))
    logs |= dict(quality=level - slope**2 / 4 / curvature)
    at_optimum = {name: float(np.exp(log)) for name, log in logs.items()}
    return result | dict(bracketed=True, **at_optimum)


def fit_optima(rows: pd.DataFrame, quality: str) -> dict:
    """Finds the optimal sizes, and the exponents with which they grow with compute.

    Returns: budgets, from `find_optima`; exponents, for each number of tokens with at least 3
      optima. An exponent has tokens; optima, their number; gmacs and params, the p of optimum ~
      compute^p; by_seed, the p of gmacs for each seed that has 3 optima by itself.
    Raises: ValueError if no budget is on the curves of 3 models.
    """
    budgets = find_optima(rows, quality)
    if not budgets:
        raise UserError(
            "needs 3 models of equal tokens with several steps each, so that their curves pass "
            "the same compute."
        )
    # Each single seed is measured at the budgets of all seeds together.
    computes = sorted({budget["budget"] for budget in budgets})
    exponents = []
    for tokens, group in selection.split_by_tokens(rows):
        if exponent := _fit_exponents(budget for budget in budgets if budget["tokens"] == tokens):
            # The spread between seeds shows how far an exponent can be trusted.
            of_seeds = (
                _fit_exponents(find_optima(seed_rows, quality, computes))
                for _, seed_rows in group.groupby("seed")
            )
            by_seed = [of_seed["gmacs"] for of_seed in of_seeds if of_seed]
            exponents.append(dict(tokens=tokens, **exponent, by_seed=by_seed))
    return dict(budgets=budgets, exponents=exponents)


def _fit_exponents(budgets):
    """Fits the exponents to budgets of one number of tokens; None for fewer than 3 optima."""
    optima = [budget for budget in budgets if budget["bracketed"]]
    if len(optima) < 3:
        return None
    compute = np.log([optimum["budget"] for optimum in optima])
    slopes = {}
    for name in ("gmacs", "params"):
        sizes = np.log([optimum[name] for optimum in optima])
        slopes[name] = float(np.polyfit(compute, sizes, 1)[0])
    return dict(optima=len(optima), **slopes)
