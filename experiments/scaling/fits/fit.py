"""Fits of quality against compute to a study's table, with their intervals and extrapolations.

Quality is a loss or a distance; lower is better. Fits that need more points than the table has are
left out.
"""

import collections
import dataclasses
import json
import math

import numpy as np

from dit_jax.errors import UserError
from experiments.scaling.fits import bootstrap, contrasts, laws, selection


def study(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """Returns all fits of this module and of `contrasts`; {"left_out": reason} for a failed fit.

    Args: rows, as `table.read` returns them.   seed, of the bootstrap.
    Raises: ValueError as `selection.measured`; ValueError with all reasons if every fit fails.
    """
    rows = selection.measured(rows, quality)
    step = selection.last_step(rows)
    last = selection.at_step(rows, step)
    best = frontier(selection.average(rows, quality), quality)
    edge = envelope(rows, quality)
    # The fits are functions, so that one that raises does not prevent the others.
    fits = {
        "line": lambda: lines(rows, quality, seed),
        "law": lambda: {"step": step, **law(last, quality, "gmacs", seed)},
        "law_of_frontier": lambda: _law_of_envelope(edge, quality),
        "largest": lambda: largest(rows, quality, seed),
        "rolling": lambda: rolling(rows, quality),
        "within_tokens": lambda: within_tokens(last, quality, seed),
        "iso_flop": lambda: optima(rows, quality),
        **{of: lambda of=of: contrasts.slopes(rows, quality, of) for of in contrasts.VARIED},
        "equal_gmacs": lambda: contrasts.equal_gmacs(rows, quality),
        "equal_params": lambda: contrasts.equal_params(rows, quality),
    }
    results = {name: _or_reason(fit) for name, fit in fits.items()}
    if all("left_out" in fit for fit in results.values()):
        reasons = "\n".join(f"  {name}: {fit['left_out']}" for name, fit in results.items())
        raise UserError(f"nothing can be fitted to {len(rows)} rows with {quality}:\n{reasons}")
    # The file of fits can be read without the table: it says what was measured and how.
    return {
        "quality": quality,
        "rows": len(rows),
        "models": len(set(map(selection.get_model_key, rows))),
        "seeds": len({row.get("seed") for row in rows}),
        "steps": sorted({row["step"] for row in rows}),
        "level": bootstrap.LEVEL,
        **{name: rows[0].get(name) for name in selection.SAMPLING if rows[0].get(name) is not None},
        "frontier": [
            {n: row[n] for n in ("model", "step", "train_gflops", quality)} for row in best
        ],
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


def law(rows: list[dict], quality: str, x: str, seed: int = 0) -> dict:
    """Fits `laws.power_law` to quality against x, with bootstrap intervals of a and c over models.

    Returns: x, points, models, a, b, c, a_interval, c_interval. For fewer than 6 models the
      intervals are None, and "no_intervals" has the reason.
    Raises: ValueError as `laws.power_law`.
    """
    arguments = _columns(rows, x, quality)
    fitted = laws.power_law(*arguments[:2])
    result = dict(x=x, points=len(rows), models=len(set(arguments[2])), a=fitted.a, b=fitted.b)
    result |= dict(c=fitted.c, a_interval=None, c_interval=None)
    try:
        intervals = bootstrap.law_intervals(*arguments, seed=seed)
    except ValueError as error:
        return result | {"no_intervals": str(error)}
    return result | {f"{name}_interval": interval for name, interval in intervals.items()}


def _columns(rows, x, quality):
    """Returns x [n], quality [n] and cells [n], the arguments of `bootstrap`; a cell is a model."""
    cells = [str(selection.get_model_key(row)) for row in rows]
    return np.array([row[x] for row in rows]), np.array([row[quality] for row in rows]), cells


def lines(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """Fits `laws.log_linear` to quality against gmacs at each step, over all runs that reached it.

    Returns: x; steps, each with step, points, models, intercept, slope, slope_interval (None for
      fewer than 6 models), correlation, and of_params, the correlation with log params instead.
    Raises: ValueError if no step has models with 3 different gmacs.
    """
    results = []
    for step in sorted({row["step"] for row in rows}):
        arguments = _columns(selection.at_step(rows, step), "gmacs", quality)
        gmacs, qualities, cells = arguments
        if len(set(gmacs)) < laws.MIN_LINE:  # few models may have reached the step
            continue
        params = np.log([row["params"] for row in selection.at_step(rows, step)])
        results.append(
            dict(
                step=step,
                points=len(gmacs),
                models=len(set(cells)),
                **dataclasses.asdict(laws.log_linear(gmacs, qualities)),
                of_params=laws.correlation(params, qualities),
                slope_interval=_or_none(bootstrap.slope_interval, *arguments, seed=seed),
            )
        )
    if not results:
        raise UserError(f"a line needs {laws.MIN_LINE} models of different gmacs at one step.")
    return dict(x="gmacs", steps=results)


def largest(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """Predicts the model with the largest gmacs by a power law of all others at the last step.

    Returns: step, model, gmacs, reach (gmacs over the next largest model's), predicted, interval
      (of one more run; None for fewer than 6 other models), measured (mean over runs), runs,
      relative_error.
    Raises: ValueError if there are no others, or as `laws.power_law` of the others.
    """
    step = selection.last_step(rows)
    rows = selection.at_step(rows, step)
    # If several models have the largest gmacs, the first is predicted and the others are fitted.
    most = max(row["gmacs"] for row in rows)
    model = selection.get_model_key(next(row for row in rows if row["gmacs"] == most))
    held_out = [row for row in rows if selection.get_model_key(row) == model]
    others = [row for row in rows if selection.get_model_key(row) != model]
    if not others:
        raise UserError("needs other models than the largest.")
    arguments = _columns(others, "gmacs", quality)
    predicted = float(laws.power_law(*arguments[:2])(most))
    interval = _or_none(bootstrap.prediction_interval, *arguments, most, seed=seed)
    measured = float(np.mean([row[quality] for row in held_out]))
    return dict(
        step=step,
        model=held_out[0]["model"],
        gmacs=most,
        reach=float(most / arguments[0].max()),
        predicted=predicted,
        interval=interval,
        measured=measured,
        runs=len(held_out),
        relative_error=predicted / measured - 1,
    )


def rolling(rows: list[dict], quality: str) -> dict:
    """Predicts larger models by power laws of smaller ones, to show how errors grow with distance.

    For each size, a law is fitted to the models up to it at the last step, and predicts all larger
    models.
    Returns: step; predictions, each with fitted_to (gmacs), model, gmacs, reach = gmacs /
      fitted_to, predicted, measured, relative_error.
    Raises: ValueError if no law can be fitted below the largest model.
    """
    step = selection.last_step(rows)
    rows = selection.average(selection.at_step(rows, step), quality)
    sizes = sorted({row["gmacs"] for row in rows})
    # A law needs MIN_POWER sizes, and beyond the largest size there is nothing to predict.
    predictions = []
    for cut in sizes[laws.MIN_POWER - 1 : -1]:
        below = [row for row in rows if row["gmacs"] <= cut]
        try:
            fitted = laws.power_law(*_columns(below, "gmacs", quality)[:2])
        except ValueError:  # over few models, quality may not fall with gmacs
            continue
        for row in sorted(rows, key=lambda row: row["gmacs"]):
            if row["gmacs"] > cut:
                predicted = float(fitted(row["gmacs"]))
                predictions.append(
                    dict(
                        fitted_to=cut,
                        model=row["model"],
                        gmacs=row["gmacs"],
                        reach=row["gmacs"] / cut,
                        predicted=predicted,
                        measured=row[quality],
                        relative_error=predicted / row[quality] - 1,
                    )
                )
    if not predictions:
        need = laws.MIN_POWER
        raise UserError(f"needs {need} models that a law fits, and a larger one, at step {step}.")
    return dict(step=step, predictions=predictions)


def within_tokens(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """Applies `lines`, `largest` and `rolling` to the models with each number of tokens separately.

    Args: rows, of one step.
    Returns: groups, each with tokens; line, the single step of `lines`; largest; rolling. With too
      few models, any of the three is {"left_out": reason}.
    Raises: ValueError if all models have the same tokens.
    """
    numbers = sorted({row["tokens"] for row in rows if row["tokens"]})
    if len(numbers) < 2:
        raise UserError("needs models of several numbers of tokens.")
    groups = []
    for tokens in numbers:
        alike = [row for row in rows if row["tokens"] == tokens]
        line = _or_reason(lambda alike=alike: lines(alike, quality, seed)["steps"][0])
        end = _or_reason(lambda alike=alike: largest(alike, quality, seed))
        further = _or_reason(lambda alike=alike: rolling(alike, quality))
        groups.append(dict(tokens=tokens, line=line, largest=end, rolling=further))
    return dict(groups=groups)


def frontier(rows: list[dict], quality: str, x: str = "train_gflops") -> list[dict]:
    """Returns the Pareto frontier in the order of x.

    A row is on it if every other row with less or equal x has a worse quality.
    """
    # Of rows with equal x the best comes first, so the others are not better and are left out.
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (row[x], row[quality])):
        if row[quality] < best:
            best = row[quality]
            kept.append(row)
    return kept


def envelope(rows: list[dict], quality: str, points: int = 32) -> list[dict]:
    """Returns the best quality of any model at up to each training compute.

    Qualities are interpolated on each model's curve, as in `iso_flop`. An envelope of measured
    points alone would fall in steps at the compute points, and be too high just before each.
    Returns: `points` rows with train_gflops, evenly spaced in log from the least to the most;
      quality, which never gets worse; and model.
    """
    curves = list(_curves(selection.average(rows, quality)).values())
    computes = [row["train_gflops"] for curve in curves for row in curve]
    envelope_rows, best = [], []
    # The first and last budgets are moved inwards, so that rounding cannot put them off the curves.
    for budget in np.geomspace(min(computes) * (1 + 1e-9), max(computes) * (1 - 1e-9), points):
        # Beyond its last point a model keeps the quality that it had there.
        spent = ((curve, min(budget, curve[-1]["train_gflops"])) for curve in curves)
        points_at = filter(None, (_at_budget(curve, quality, compute) for curve, compute in spent))
        best = [min([*best, *points_at], key=lambda point: point["quality"])]
        at = {"train_gflops": float(budget), "model": best[0]["model"]}
        envelope_rows.append({**at, quality: best[0]["quality"]})
    return envelope_rows


def _law_of_envelope(edge, quality):
    """Fits `laws.power_law` to the envelope, without intervals.

    The bootstrap needs independent cells, but the envelope's points are selected among models.
    """
    x, q = (np.array([row[name] for row in edge]) for name in ("train_gflops", quality))
    fitted = laws.power_law(x, q)
    why = "its points are chosen among models, and of a few of them"
    result = dict(x="train_gflops", points=len(edge), models=len({row["model"] for row in edge}))
    result |= dict(**dataclasses.asdict(fitted), a_interval=None, c_interval=None)
    return result | {"no_intervals": why}


def _curves(rows):
    """Returns the rows of each model, by `selection.get_model_key`."""
    curves = collections.defaultdict(list)
    for row in rows:
        curves[selection.get_model_key(row)].append(row)
    return curves


def iso_flop(rows: list[dict], quality: str, budgets: list[float] | None = None) -> list[dict]:
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
    computes = [row["train_gflops"] for row in rows]
    if budgets is None and rows:
        budgets = np.geomspace(min(computes), max(computes), 12)
    results = []
    for tokens in sorted({row["tokens"] for row in rows}):
        curves = _curves(row for row in rows if row["tokens"] == tokens)
        for budget in budgets:
            points = [_at_budget(curve, quality, budget) for curve in curves.values()]
            points = sorted(filter(None, points), key=lambda point: point["gmacs"])
            if len(points) >= 3:
                results.append(dict(tokens=tokens, budget=float(budget), **_optimum(points)))
    return results


def _at_budget(curve, quality, budget):
    """Interpolates a model's quality at a compute budget; None outside its curve."""
    compute = np.log([row["train_gflops"] for row in curve])
    if not compute[0] <= np.log(budget) <= compute[-1]:
        return None
    value = np.exp(np.interp(np.log(budget), compute, np.log([row[quality] for row in curve])))
    kept = {name: curve[0][name] for name in ("model", "gmacs", "params")}
    return {**kept, "quality": float(value)}


def _optimum(points):
    """Returns the values of `iso_flop` for points ordered by gmacs."""
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


def optima(rows: list[dict], quality: str) -> dict:
    """Returns `iso_flop`, and the exponents with which optimal sizes grow with compute.

    Returns: budgets, of `iso_flop`; exponents, for each number of tokens with at least 3 optima. An
      exponent has tokens; optima, their number; gmacs and params, p of optimum ~ compute^p;
      by_seed, p of gmacs for each seed that has one by itself.
    Raises: ValueError if no budget lies on the curves of 3 models.
    """
    budgets = iso_flop(rows, quality)
    if not budgets:
        raise UserError(
            "needs 3 models of equal tokens with several steps each, so that their curves pass "
            "the same compute."
        )
    # Each seed alone is measured at the budgets of all seeds together.
    same = sorted({budget["budget"] for budget in budgets})
    exponents = []
    for tokens in sorted({row["tokens"] for row in rows}):
        if (whole := _exponents(budgets, tokens)) is None:
            continue
        # The spread between seeds shows how far an exponent can be trusted.
        by_seed = []
        for seed in sorted({row["seed"] for row in rows if row.get("seed") is not None}):
            alone = [row for row in rows if row.get("seed") == seed and row["tokens"] == tokens]
            if one := _exponents(iso_flop(alone, quality, same), tokens):
                by_seed.append(one["gmacs"])
        exponents.append(dict(tokens=tokens, **whole, by_seed=by_seed))
    return dict(budgets=budgets, exponents=exponents)


def _exponents(budgets, tokens):
    """Fits the exponents for one number of tokens; None for fewer than 3 optima."""
    points = [b for b in budgets if b["tokens"] == tokens and b["bracketed"]]
    if len(points) < 3:
        return None
    compute, gmacs, params = (np.log([b[n] for b in points]) for n in ("budget", "gmacs", "params"))
    slopes = {
        name: float(np.polyfit(compute, sizes, 1)[0])
        for name, sizes in (("gmacs", gmacs), ("params", params))
    }
    return dict(optima=len(points), **slopes)
