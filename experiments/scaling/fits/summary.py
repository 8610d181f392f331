"""The fits of a study as readable text."""

import itertools

from dit_jax.evaluation import plot_style

REACHES = 1, 2, 4, 8, 16  # bins of gmacs / gmacs of the largest model in the fit
LEAST_DEVIATIONS = (
    2  # least difference, in standard deviations, at which one model is called better
)


def format_study(result: dict) -> str:
    """Returns the result of `fit.study` as text."""
    q = result["quality"]
    lines = [
        f"{q}: {result['rows']} rows, {result['models']} models, {result['seeds']} seeds, "
        f"steps {', '.join(f'{step:,}' for step in result['steps'])}. Intervals are of "
        f"{result['level']:.0%}, over models."
    ]
    # Fits that failed come last, with their reasons.
    left_out = []
    for name, (title, text) in PARTS.items():
        fit = result[name]
        if "left_out" in fit:
            left_out.append(f"  {title}: {fit['left_out']}")
        else:
            lines += ["", title, *(f"  {line}" for line in text(fit, q))]
    if left_out:
        lines += ["", "Left out", *left_out]
    return "\n".join(lines)


def format_networks(found: dict, quality: str) -> str:
    """Returns the result of `contrasts.networks` as text."""
    return "\n".join(_pairs(found, quality))


def _interval(interval, digits=3):
    """Returns '0.1 to 0.2'; an end that was not found is '?'."""
    if interval is None or tuple(interval) == (None, None):
        return "no interval"
    low, high = ("?" if end is None else f"{end:.{digits}g}" for end in interval)
    return f"{low} to {high}"


# A function of PARTS takes a fit's result and the quality's name, and yields lines of text.


def _line(fit, q):
    yield f"{q} = intercept + slope log10(gmacs), at equal steps"
    for at in fit["steps"]:
        yield f"step {at['step']:>10,}: {_slope(at)}"


def _slope(at):
    slope, r = _interval(at["slope_interval"]), at["correlation"]
    return (
        f"slope {at['slope']:.4g} ({slope}), correlation {r:.4f} (of log params "
        f"{at['of_params']:.4f}), {at['points']} runs"
    )


def _law(fit, q):
    at = f" at step {fit['step']:,}" if "step" in fit else ""
    law = f"{fit['a']:.4g} + {fit['b']:.4g} {fit['x']}^-{fit['c']:.4g}"
    yield f"{q} = {law}, {fit['points']} points{at}"
    if "no_intervals" in fit:
        yield f"no intervals: {fit['no_intervals']}"
    else:
        floor = _interval(fit["a_interval"])
        yield f"exponent {_interval(fit['c_interval'])}; at infinite compute {floor}"


def _largest(fit, q):
    yield (
        f"{fit['model']} ({fit['gmacs']:.4g} gmacs, {fit['reach']:.2g} x the next) at step "
        f"{fit['step']:,}: predicted {fit['predicted']:.4g} ({_interval(fit['interval'], 4)}), "
        f"measured {fit['measured']:.4g} ({fit['relative_error']:+.1%})"
    )


def _rolling(fit, q):
    # Errors grow with the distance beyond the models in the fit, so they are shown by distance.
    edges = [*REACHES, float("inf")]
    for low, high in itertools.pairwise(edges):
        errors = [p["relative_error"] for p in fit["predictions"] if low < p["reach"] <= high]
        if errors:
            span = f"{low:g} to {high:g}" if high < float("inf") else f"over {low:g}"
            mean, worst = sum(map(abs, errors)) / len(errors), max(errors, key=abs)
            yield f"{span} x beyond: {mean:.1%} on average, {worst:+.1%} at worst, of {len(errors)}"


def _within_tokens(fit, q):
    for group in fit["groups"]:
        line, end, further = group["line"], group["largest"], group["rolling"]
        yield f"{_tokens(group)}: {line.get('left_out') or _slope(line)}"
        yield from _indented([end["left_out"]] if "left_out" in end else _largest(end, q))
        yield from _indented([] if "left_out" in further else _rolling(further, q))


def _indented(lines):
    return (f"  {line}" for line in lines)


def _iso_flop(fit, q):
    for at in fit["budgets"]:
        best = f"{at['budget']:.3g} GFLOPs, {_tokens(at)}: best of {len(at['models'])} "
        best += at["best"]
        if at["bracketed"]:
            yield f"{best}; optimum {at['gmacs']:.3g} gmacs, {at['params']:.3g} parameters"
        else:
            yield f"{best}; no optimum between the models"
    for exponent in fit["exponents"]:
        seeds = ", ".join(f"{one:.3f}" for one in exponent["by_seed"]) or "none"
        yield (
            f"{_tokens(exponent)}, {exponent['optima']} optima: optimal gmacs ~ "
            f"compute^{exponent['gmacs']:.3f} (of each seed: {seeds}), parameters ~ "
            f"compute^{exponent['params']:.3f}"
        )
    if not fit["exponents"]:
        yield "fewer than 3 optima: no exponent"


def _slopes(fit, q):
    by_step = ", ".join(f"{at['mean']:+.3f} at {at['step']:,}" for at in fit["by_step"])
    yield f"mean {fit['mean']:+.3f}, and against log gmacs {fit['mean_per_gmacs']:+.3f}"
    if len(fit["by_step"]) > 1:
        yield f"mean at each step: {by_step}"
    yield f"of each group at step {fit['step']:,}, smaller models first"
    for group in fit["groups"]:
        yield f"{group['slope']:+.3f}  {', '.join(group['models'])}"


def _pairs(fit, q):
    noise = ", ".join(f"{_tokens(one)} {one['deviation']:.2%}" for one in fit["noise"])
    yield f"at step {fit['step']:,}; deviation between seeds: {noise or 'not known'}"
    for pair in fit["pairs"]:
        a, b = pair["pair"]
        sigma = pair["deviations"]
        better = f"{pair['better']} is better"
        if sigma is not None:
            apart = abs(sigma) >= LEAST_DEVIATIONS
            better = f"{better if apart else 'not told apart'}, {abs(sigma):.1f} deviations"
        both = f"{_model(a)} {a[q]:.4g}, {_model(b)} {b[q]:.4g}"
        yield f"{both}, at {pair['ratio']:.2f} x the {fit['cost']}: {better}"


def _model(row):
    """Returns a model's name; for a DiT, with its depth and tokens."""
    sizes = f" (depth {row['depth']}, {_tokens(row)})" if row["tokens"] else ""
    return f"{row['model']}{sizes}"


def _tokens(found):
    """Returns '4 tokens', or 'UNets' without tokens."""
    return plot_style.format_count("token", found["tokens"]) if found["tokens"] else "UNets"


# The parts of a study in their order, as keys of `fit.study`: (title, function).
PARTS = {
    "line": ("Against compute of a pass", _line),
    "law": ("Power law of models at equal steps", _law),
    "law_of_frontier": ("Power law of the best quality at each training compute", _law),
    "largest": ("The largest model, predicted by the others", _largest),
    "rolling": ("Predictions beyond the models fitted, errors", _rolling),
    "within_tokens": ("Of one number of tokens alone", _within_tokens),
    "iso_flop": ("Equal training compute", _iso_flop),
    "tokens": ("Slope of log quality against log tokens", _slopes),
    "depth": ("Slope of log quality against log depth", _slopes),
    "hidden_size": ("Slope of log quality against log width", _slopes),
    "equal_gmacs": ("Equal compute of a pass, other tokens", _pairs),
    "equal_params": ("Equal parameters and tokens, other depth", _pairs),
}
