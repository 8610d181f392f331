"""The fits of a study as text."""

import itertools

from dit_jax.evaluation import plot_style

# Bins of the gmacs of a predicted model over those of the largest model in the fit.
REACHES = 1, 2, 4, 8, 16
# The least difference, in standard deviations, at which one model is called better.
LEAST_DEVIATIONS = 2


def format_study(result: dict) -> str:
    """Returns the result of `fit.fit_study` as text."""
    quality = result["quality"]
    lines = [
        f"{quality}: {result['rows']} rows, {result['models']} models, {result['seeds']} seeds, "
        f"steps {', '.join(f'{step:,}' for step in result['steps'])}. Intervals are of "
        f"{result['level']:.0%}, over models."
    ]
    # Fits that failed come last, with their reasons.
    left_out = []
    for name, (title, format_fit) in PARTS.items():
        fit = result[name]
        if "left_out" in fit:
            left_out.append(f"  {title}: {fit['left_out']}")
        else:
            lines += ["", title, *(f"  {line}" for line in format_fit(fit, quality))]
    if left_out:
        lines += ["", "Left out", *left_out]
    return "\n".join(lines)


def format_networks(result: dict, quality: str) -> str:
    """Returns the result of `contrasts.compare_networks` as text."""
    return "\n".join(_format_pairs(result, quality))


def _format_interval(interval, digits=3):
    """Returns '0.1 to 0.2', with '?' for an end that was not found."""
    if interval is None or tuple(interval) == (None, None):
        return "no interval"
    low, high = ("?" if end is None else f"{end:.{digits}g}" for end in interval)
    return f"{low} to {high}"


# The functions of PARTS take the result of a fit and the name of the quality, and yield lines.


def _format_line(fit, quality):
    yield f"{quality} = intercept + slope log10(gmacs), at equal steps"
    for line in fit["steps"]:
        yield f"step {line['step']:>10,}: {_describe_line(line)}"


def _describe_line(line):
    interval = _format_interval(line["slope_interval"])
    return (
        f"slope {line['slope']:.4g} ({interval}), correlation {line['correlation']:.4f} (of log "
        f"params {line['of_params']:.4f}), {line['points']} runs"
    )


def _format_law(fit, quality):
    step = f" at step {fit['step']:,}" if "step" in fit else ""
    law = f"{fit['a']:.4g} + {fit['b']:.4g} {fit['x']}^-{fit['c']:.4g}"
    yield f"{quality} = {law}, {fit['points']} points{step}"
    if "no_intervals" in fit:
        yield f"no intervals: {fit['no_intervals']}"
    else:
        floor = _format_interval(fit["a_interval"])
        yield f"exponent {_format_interval(fit['c_interval'])}; at infinite compute {floor}"


def _format_largest(fit, quality):
    interval = _format_interval(fit["interval"], digits=4)
    yield (
        f"{fit['model']} ({fit['gmacs']:.4g} gmacs, {fit['reach']:.2g} x the next) at step "
        f"{fit['step']:,}: predicted {fit['predicted']:.4g} ({interval}), measured "
        f"{fit['measured']:.4g} ({fit['relative_error']:+.1%})"
    )


def _format_rolling(fit, quality):
    # Errors are grouped by reach, because they grow with it.
    edges = [*REACHES, float("inf")]
    for low, high in itertools.pairwise(edges):
        errors = [p["relative_error"] for p in fit["predictions"] if low < p["reach"] <= high]
        if errors:
            reach = f"{low:g} to {high:g}" if high < float("inf") else f"over {low:g}"
            mean, worst = sum(map(abs, errors)) / len(errors), max(errors, key=abs)
            count = len(errors)
            yield f"{reach} x beyond: {mean:.1%} on average, {worst:+.1%} at worst, of {count}"


def _format_within_tokens(fit, quality):
    for group in fit["groups"]:
        line, largest, rolling = group["line"], group["largest"], group["rolling"]
        yield f"{_name_tokens(group)}: {line.get('left_out') or _describe_line(line)}"
        if "left_out" in largest:
            lines = [largest["left_out"]]
        else:
            lines = [*_format_largest(largest, quality)]
        if "left_out" not in rolling:
            lines += _format_rolling(rolling, quality)
        yield from (f"  {line}" for line in lines)


def _format_iso_flop(fit, quality):
    for budget in fit["budgets"]:
        best = f"{budget['budget']:.3g} GFLOPs, {_name_tokens(budget)}: best of "
        best += f"{len(budget['models'])} {budget['best']}"
        if budget["bracketed"]:
            sizes = f"{budget['gmacs']:.3g} gmacs, {budget['params']:.3g} parameters"
            yield f"{best}; optimum {sizes}"
        else:
            yield f"{best}; no optimum between the models"
    for exponent in fit["exponents"]:
        seeds = ", ".join(f"{of_seed:.3f}" for of_seed in exponent["by_seed"]) or "none"
        yield (
            f"{_name_tokens(exponent)}, {exponent['optima']} optima: optimal gmacs ~ "
            f"compute^{exponent['gmacs']:.3f} (of each seed: {seeds}), parameters ~ "
            f"compute^{exponent['params']:.3f}"
        )
    if not fit["exponents"]:
        yield "fewer than 3 optima: no exponent"


def _format_slopes(fit, quality):
    by_step = ", ".join(f"{step['mean']:+.3f} at {step['step']:,}" for step in fit["by_step"])
    yield f"mean {fit['mean']:+.3f}, and against log gmacs {fit['mean_per_gmacs']:+.3f}"
    if len(fit["by_step"]) > 1:
        yield f"mean at each step: {by_step}"
    yield f"of each group at step {fit['step']:,}, smaller models first"
    for group in fit["groups"]:
        yield f"{group['slope']:+.3f}  {', '.join(group['models'])}"


def _format_pairs(fit, quality):
    noise = ", ".join(f"{_name_tokens(group)} {group['deviation']:.2%}" for group in fit["noise"])
    yield f"at step {fit['step']:,}; deviation between seeds: {noise or 'not known'}"
    for pair in fit["pairs"]:
        verdict = f"{pair['better']} is better"
        if pair["deviations"] is not None:
            deviations = abs(pair["deviations"])
            if deviations < LEAST_DEVIATIONS:
                verdict = "not told apart"
            verdict += f", {deviations:.1f} deviations"
        models = ", ".join(f"{_name_model(row)} {row[quality]:.4g}" for row in pair["pair"])
        yield f"{models}, at {pair['ratio']:.2f} x the {fit['cost']}: {verdict}"


def _name_model(row):
    """Returns a model's name; for a DiT, with its depth and tokens."""
    sizes = f" (depth {row['depth']}, {_name_tokens(row)})" if row["tokens"] else ""
    return f"{row['model']}{sizes}"


def _name_tokens(row):
    """Returns '4 tokens'; for UNets, which have none, 'UNets'."""
    return plot_style.format_count("token", row["tokens"]) if row["tokens"] else "UNets"


# The parts of the text in their order: key of `fit.fit_study`, (title, function).
PARTS = {
    "line": ("Against compute of a pass", _format_line),
    "law": ("Power law of models at equal steps", _format_law),
    "law_of_frontier": ("Power law of the best quality at each training compute", _format_law),
    "largest": ("The largest model, predicted by the others", _format_largest),
    "rolling": ("Predictions beyond the models fitted, errors", _format_rolling),
    "within_tokens": ("Of one number of tokens alone", _format_within_tokens),
    "iso_flop": ("Equal training compute", _format_iso_flop),
    "tokens": ("Slope of log quality against log tokens", _format_slopes),
    "depth": ("Slope of log quality against log depth", _format_slopes),
    "hidden_size": ("Slope of log quality against log width", _format_slopes),
    "equal_gmacs": ("Equal compute of a pass, other tokens", _format_pairs),
    "equal_params": ("Equal parameters and tokens, other depth", _format_pairs),
}
