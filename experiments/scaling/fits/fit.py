"""What a study's table tells: curves of quality against compute, and how far they can be trusted.

Quality is a loss or a distance, lower is better. What the table has too few points for is left out.
"""

import collections
import dataclasses
import json
import math

import numpy as np

from dit_jax.errors import UserError
from experiments.scaling.fits import bootstrap, contrasts, laws, selection


def study(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """All of the fits below and of `contrasts`; {"left_out": reason} for what cannot be fitted.

    Args: rows, as `table.read` returns them; seed, of the bootstrap.
    Raises: ValueError as `selection.measured`; if nothing can be fitted, with each reason.
    """
    rows = selection.measured(rows, quality)
    step = selection.last_step(rows)
    last = selection.at_step(rows, step)
    best = frontier(selection.average(rows, quality), quality)
    edge = envelope(rows, quality)
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
    found = {name: _or_reason(fit) for name, fit in fits.items()}
    if all("left_out" in fit for fit in found.values()):
        reasons = "\n".join(f"  {name}: {fit['left_out']}" for name, fit in found.items())
        raise UserError(f"nothing can be fitted to {len(rows)} rows with {quality}:\n{reasons}")
    return {
        "quality": quality,
        "rows": len(rows),
        "models": len(set(map(selection.model_of, rows))),
        "seeds": len({row.get("seed") for row in rows}),
        "steps": sorted({row["step"] for row in rows}),
        "level": bootstrap.LEVEL,
        **{name: rows[0].get(name) for name in selection.SAMPLING if rows[0].get(name) is not None},
        "frontier": [
            {n: row[n] for n in ("model", "step", "train_gflops", quality)} for row in best
        ],
        **found,
    }


def _or_reason(fit):
    try:
        found = fit()
        json.dumps(found, allow_nan=False)
    except ValueError as error:
        return {"left_out": str(error)}
    return found


def _or_none(interval, *arguments, seed):
    """The interval, or None for too few cells: the fit that it is of stands without it."""
    try:
        return interval(*arguments, seed=seed)
    except ValueError:
        return None


def law(rows: list[dict], quality: str, x: str, seed: int = 0) -> dict:
    """`laws.power_law` of quality against x, with the intervals of a and c over models.

    Returns: x, points, models, a, b, c, a_interval, c_interval; the latter None, with why in
      "no_intervals", for fewer than 6 models.
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
    cells = [str(selection.model_of(row)) for row in rows]
    return np.array([row[x] for row in rows]), np.array([row[quality] for row in rows]), cells


def lines(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """At each step `laws.log_linear` of quality against gmacs, of all runs that got there.

    Returns: steps, each with step, points, models, intercept, slope, slope_interval (None for
      fewer than 6 models), correlation, and of_params, the correlation with log params instead.
    Raises: ValueError if no step has 3 models' gmacs.
    """
    found = []
    for step in sorted({row["step"] for row in rows}):
        arguments = _columns(selection.at_step(rows, step), "gmacs", quality)
        gmacs, qualities, cells = arguments
        if len(set(gmacs)) < laws.MIN_LINE:
            continue
        params = np.log([row["params"] for row in selection.at_step(rows, step)])
        found.append(
            dict(
                step=step,
                points=len(gmacs),
                models=len(set(cells)),
                **dataclasses.asdict(laws.log_linear(gmacs, qualities)),
                of_params=laws.correlation(params, qualities),
                slope_interval=_or_none(bootstrap.slope_interval, *arguments, seed=seed),
            )
        )
    if not found:
        raise UserError(f"a line needs {laws.MIN_LINE} models of different gmacs at one step.")
    return dict(x="gmacs", steps=found)


def largest(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """The largest model, by gmacs, as the power law of all others at the last step predicts it.

    Returns: model, gmacs, reach (times those of the next), predicted, interval (of one more run,
      None for fewer than 6 other models), measured (mean over runs), runs, relative_error.
    Raises: ValueError as `laws.power_law` of the others.
    """
    step = selection.last_step(rows)
    rows = selection.at_step(rows, step)
    most = max(row["gmacs"] for row in rows)
    model = selection.model_of(next(row for row in rows if row["gmacs"] == most))
    held_out = [row for row in rows if selection.model_of(row) == model]
    others = [row for row in rows if selection.model_of(row) != model]
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
    """How errors grow with reach: laws of the models up to each size predict all larger ones.

    Returns: step; predictions, each with fitted_to (gmacs), model, gmacs, reach = gmacs /
      fitted_to, predicted, measured, relative_error.
    Raises: ValueError if no law can be fitted below the largest model.
    """
    step = selection.last_step(rows)
    rows = selection.average(selection.at_step(rows, step), quality)
    sizes = sorted({row["gmacs"] for row in rows})
    found = []
    for cut in sizes[laws.MIN_POWER - 1 : -1]:
        below = [row for row in rows if row["gmacs"] <= cut]
        try:
            fitted = laws.power_law(*_columns(below, "gmacs", quality)[:2])
        except ValueError:  # few models may not yet fall
            continue
        for row in sorted(rows, key=lambda row: row["gmacs"]):
            if row["gmacs"] > cut:
                predicted = float(fitted(row["gmacs"]))
                found.append(
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
    if not found:
        need = laws.MIN_POWER
        raise UserError(f"needs {need} models that a law fits, and a larger one, at step {step}.")
    return dict(step=step, predictions=found)


def within_tokens(rows: list[dict], quality: str, seed: int = 0) -> dict:
    """`lines`, `largest` and `rolling` among the models of each number of tokens alone.

    Args: rows of one step.
    Returns: groups, each with tokens; line, the one of `lines`; largest; rolling. Of any of these
      {"left_out": reason} for too few models.
    Raises: ValueError if all models have the same tokens.
    """
    numbers = sorted({row["tokens"] for row in rows if row["tokens"]})
    if len(numbers) < 2:
        raise UserError("needs models of several numbers of tokens.")
    found = []
    for tokens in numbers:
        alike = [row for row in rows if row["tokens"] == tokens]
        line = _or_reason(lambda alike=alike: lines(alike, quality, seed)["steps"][0])
        end = _or_reason(lambda alike=alike: largest(alike, quality, seed))
        further = _or_reason(lambda alike=alike: rolling(alike, quality))
        found.append(dict(tokens=tokens, line=line, largest=end, rolling=further))
    return dict(groups=found)


def frontier(rows: list[dict], quality: str, x: str = "train_gflops") -> list[dict]:
    """The rows that no other row of less or equal x beats or equals, in the order of x."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (row[x], row[quality])):
        if row[quality] < best:
            best = row[quality]
            kept.append(row)
    return kept


def envelope(rows: list[dict], quality: str, points: int = 32) -> list[dict]:
    """The best quality of any model at up to each compute, read off their curves as in `iso_flop`.

    Points of runs alone would be best of all just after they were taken, and worse before.
    Returns: train_gflops, evenly in log from the least to the most, with the quality, which never
      gets worse, and its model.
    """
    curves = list(_curves(selection.average(rows, quality)).values())
    computes = [row["train_gflops"] for curve in curves for row in curve]
    found, best = [], []
    # The ends are inside by more than rounding.
    for budget in np.geomspace(min(computes) * (1 + 1e-9), max(computes) * (1 - 1e-9), points):
        spent = ((curve, min(budget, curve[-1]["train_gflops"])) for curve in curves)
        there = filter(None, (_at_budget(curve, quality, compute) for curve, compute in spent))
        best = [min([*best, *there], key=lambda point: point["quality"])]
        at = {"train_gflops": float(budget), "model": best[0]["model"]}
        found.append({**at, quality: best[0]["quality"]})
    return found


def _law_of_envelope(edge, quality):
    """`laws.power_law` of the envelope; it is chosen among models, so there are no intervals."""
    x, q = (np.array([row[name] for row in edge]) for name in ("train_gflops", quality))
    fitted = laws.power_law(x, q)
    why = "its points are chosen among models, and of a few of them"
    found = dict(x="train_gflops", points=len(edge), models=len({row["model"] for row in edge}))
    found |= dict(**dataclasses.asdict(fitted), a_interval=None, c_interval=None)
    return found | {"no_intervals": why}


def _curves(rows):
    """The rows of each model, by its identity."""
    curves = collections.defaultdict(list)
    for row in rows:
        curves[selection.model_of(row)].append(row)
    return curves


def iso_flop(rows: list[dict], quality: str, budgets: list[float] | None = None) -> list[dict]:
    """The best model of each compute budget, for each number of tokens.

    Quality at a budget is read off each model's own curve, straight between its points in log
    and log. A parabola in log(gmacs) through the best model and two on either side has its
    minimum at the optimum; where the best model is the smallest or the largest there is none.

    Args: budgets in train_gflops; by default 12 from the least compute to the most.
    Returns: for budgets that lie on 3 models' curves or more: tokens, budget, models (model, gmacs,
      params, quality), best (a model), bracketed, and with it gmacs, params, quality at the
      optimum, else None.
    """
    rows = selection.average(rows, quality)
    computes = [row["train_gflops"] for row in rows]
    if budgets is None and rows:
        budgets = np.geomspace(min(computes), max(computes), 12)
    found = []
    for tokens in sorted({row["tokens"] for row in rows}):
        curves = _curves(row for row in rows if row["tokens"] == tokens)
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


def optima(rows: list[dict], quality: str) -> dict:
    """`iso_flop`, and for each number of tokens with 3 optima how they grow with compute.

    Returns: budgets; exponents, each with tokens, optima (their number), gmacs and params (of
      the optimal size ~ compute^exponent), by_seed (gmacs' of each seed alone that has one).
    Raises: ValueError if no budget lies on the curves of 3 models.
    """
    budgets = iso_flop(rows, quality)
    if not budgets:
        raise UserError(
            "needs 3 models of equal tokens with several steps each, so that their curves pass "
            "the same compute."
        )
    same = sorted({found["budget"] for found in budgets})
    exponents = []
    for tokens in sorted({row["tokens"] for row in rows}):
        if (whole := _exponents(budgets, tokens)) is None:
            continue
        by_seed = []
        for seed in sorted({row["seed"] for row in rows if row.get("seed") is not None}):
            alone = [row for row in rows if row.get("seed") == seed and row["tokens"] == tokens]
            if one := _exponents(iso_flop(alone, quality, same), tokens):
                by_seed.append(one["gmacs"])
        exponents.append(dict(tokens=tokens, **whole, by_seed=by_seed))
    return dict(budgets=budgets, exponents=exponents)


def _exponents(budgets, tokens):
    found = [f for f in budgets if f["tokens"] == tokens and f["bracketed"]]
    if len(found) < 3:
        return None
    compute, gmacs, params = (np.log([f[n] for f in found]) for n in ("budget", "gmacs", "params"))
    slopes = {
        name: float(np.polyfit(compute, sizes, 1)[0])
        for name, sizes in (("gmacs", gmacs), ("params", params))
    }
    return dict(optima=len(found), **slopes)
