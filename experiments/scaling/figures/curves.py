"""Figures of quality against model size and training compute, with fitted power laws."""

import logging

import numpy as np
import pandas as pd

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import styles, subsets
from experiments.scaling.fits import bootstrap, fit, laws, selection

logger = logging.getLogger("dit_jax")

# Styles of a fitted law and of the optimum at a compute budget.
LAW = dict(color="0.25", linestyle="--", linewidth=1, marker="", zorder=3)
STAR = dict(color="black", markerfacecolor="none", marker="*", markersize=7, linestyle="", zorder=3)
BAND = 5  # points along a prediction interval's band
BUDGETS = 5  # budgets drawn in one panel, at most
GREYS = 0.35, 0.9  # shades of the least and the most compute, in matplotlib's 'Greys'


def draw_gflops(rows: pd.DataFrame, quality: str):
    """Draws quality against multiply-adds at the last step; returns the matplotlib Figure.

    The title has a fit, a power law for a loss, else a line in log10(multiply-adds). It also has
    Pearson's correlation of quality and log10(multiply-adds).
    Raises: NoRowsError for fewer than 2 models.   Source: Peebles & Xie 2023, figures 2 and 8.
    """
    matplotlib = plot_style.import_matplotlib()

    drawn = subsets.select_last_step(subsets.select_standard(rows, "gmacs"), quality)
    _demand_models(drawn)
    look = styles.Styles.from_table(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (axes,) = styles.new_figure()
        _draw_models(axes, look, drawn, "gmacs", quality)
        x, y = drawn["gmacs"], drawn[quality]
        is_loss = quality.startswith(selection.LOSSES)
        line = _fit_or_log(laws.fit_line, x, y, f"line of {quality}")
        law = _fit_or_log(laws.fit_power_law, x, y, f"power law of {quality}") if is_loss else line
        texts = [f"fit {_equation(law, 'G')}"] if law else []
        texts += [f"$r = {line.correlation:.2f}$"] if line else []
        _draw_law(axes, law, x)
        axes.set_title(", ".join(texts), fontsize=7, loc="right")
        axes.set_xlabel(plot_style.get_label("gmacs"))
        plot_style.set_log_scale(axes.xaxis)
        styles.name_quality(axes, drawn, quality, log=is_loss)
        look.draw_legend(figure, drawn)
    return figure


def draw_compute(rows: pd.DataFrame, quality: str):
    """Draws quality against training compute, a line per model; returns the matplotlib Figure.

    For a loss or a distance it adds the power law of the best quality of any model at each compute.
    With more sizes than colors it has a panel per number of tokens, to keep the lines apart.
    Raises: NoRowsError for fewer than 2 models.   Source: Peebles & Xie 2023, figure 9.
    """
    matplotlib = plot_style.import_matplotlib()

    # `drawn` has a row per seed, `means` one row per model and step.
    drawn = subsets.select_complete(subsets.select_standard(rows, "train_gflops"), quality)
    means = selection.average(drawn, quality)
    _demand_models(means)
    look = styles.Styles.from_table(rows)
    unit, name = subsets.choose_unit(means["train_gflops"])
    drawn = drawn.assign(compute=drawn["train_gflops"] / unit)
    parts = [(None, drawn)] if look.by_size else list(selection.split_by_tokens(drawn))
    # A power law needs positive values that fall with compute.
    law = None
    if (drawn[quality] > 0).all() and not quality.startswith(selection.HIGHER):
        best = fit.find_envelope(drawn, quality)
        x, y = best["train_gflops"] / unit, best[quality]
        law = _fit_or_log(laws.fit_power_law, x, y, f"best {quality}")
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = styles.new_figure(len(parts), sharey=True)
        for axes, (tokens, part) in zip(panels, parts, strict=True):
            _draw_models(axes, look, part, "compute", quality)
            _draw_law(axes, law, part["compute"])
            if tokens:
                axes.set_title(plot_style.format_count("token", tokens), fontsize=8)
            axes.set_xlabel(f"training compute ({name})")
            plot_style.set_log_scale(axes.xaxis, room=min(1, 2 / len(parts)))
            styles.name_quality(axes, drawn, quality, log=True)
        for axes in panels[1:]:
            axes.set_ylabel("")
        # With several panels the law belongs to none of them alone, so it is written above all.
        if law:
            text = f"best of all {_equation(law, 'C')}, $C$ in {name}"
            if len(panels) == 1:
                panels[0].set_title(text, fontsize=7, loc="right")
            else:
                figure.suptitle(text, fontsize=7)
        look.draw_legend(figure, drawn)
    return figure


def draw_isoflop(rows: pd.DataFrame, quality: str):
    """Draws quality against multiply-adds at equal training compute; returns the matplotlib Figure.

    It has a panel per number of tokens. A star is the optimal size for a compute budget, drawn if
    there are models on both sides of it.
    Raises: NoRowsError if no 3 models with equal tokens reach a common compute.
    """
    matplotlib = plot_style.import_matplotlib()

    # `fit.find_optima` needs all of these columns.
    needed = "train_gflops", "gmacs", "params", "tokens"
    drawn = subsets.select_complete(subsets.select_standard(rows, *needed), quality)
    _demand_fittable(drawn, quality)
    budgets = fit.find_optima(drawn, quality)
    if not budgets:
        raise subsets.NoRowsError("no compute was passed by 3 models of equal tokens")
    look = styles.Styles.from_table(rows)
    models = drawn.drop_duplicates("model", keep="last").set_index("model")
    computes = pd.Series([budget["budget"] for budget in budgets])
    unit, name = subsets.choose_unit(computes)
    with matplotlib.rc_context(plot_style.STYLE):
        # The darker a curve, the larger its budget. The lightest greys are left out, because they
        # could not be seen on white.
        ramp = matplotlib.colormaps["Greys"](np.linspace(*GREYS, 256))
        edges = computes.min() / unit / 1.1, computes.max() / unit * 1.1
        colors = matplotlib.colors
        greys = matplotlib.cm.ScalarMappable(colors.LogNorm(*edges), colors.ListedColormap(ramp))
        tokens = sorted({budget["tokens"] for budget in budgets})
        figure, panels = styles.new_figure(len(tokens), sharex=True)
        for axes, count in zip(panels, tokens, strict=True):
            # A selection of budgets, spread evenly, so that the curves do not crowd.
            panel = [budget for budget in budgets if budget["tokens"] == count]
            for i in sorted(set(np.linspace(0, len(panel) - 1, BUDGETS).round().astype(int))):
                _draw_budget(axes, panel[i], greys.to_rgba(panel[i]["budget"] / unit))
                for point in panel[i]["models"]:
                    model = models.loc[point["model"]]
                    at = point["gmacs"], point["quality"]
                    styles.draw_point(axes, at, look.get_color(model), look.get_marker(model))
            axes.set_title(plot_style.format_count("token", count), fontsize=8)
            axes.set_xlabel(plot_style.get_label("gmacs"))
            axes.margins(x=0.08)
            plot_style.set_log_scale(axes.xaxis, room=min(1, 2 / len(tokens)))
            styles.name_quality(axes, drawn, quality, log=True)
        for axes in panels[1:]:
            axes.set_ylabel("")
        # All panels share one color bar. The legend has only models that are drawn.
        bar = figure.colorbar(greys, ax=panels, label=f"training compute ({name})", pad=0.02)
        plot_style.set_log_scale(bar.ax.yaxis)
        shown = {point["model"] for budget in budgets for point in budget["models"]}
        star = matplotlib.lines.Line2D([], [], label="", **STAR)
        look.draw_legend(
            figure,
            models.loc[list(shown)],
            ("optimum", [star][: any(b["bracketed"] for b in budgets)]),
        )
    return figure


def draw_extrapolation(rows: pd.DataFrame, quality: str):
    """Draws a power law of all models but the largest, extrapolated to it; returns the Figure.

    Quality is drawn against multiply-adds at the last step, with the prediction interval of one
    more run along the law. Hollow markers are measurements of the largest model.
    Raises: NoRowsError if no law can be fitted.
    """
    drawn = subsets.select_last_step(subsets.select_standard(rows, "gmacs"), quality)
    return _draw_extrapolations(rows, {"": drawn}, quality)


def draw_extrapolation_tokens(rows: pd.DataFrame, quality: str):
    """Draws `draw_extrapolation` in a panel per number of tokens; returns the matplotlib Figure.

    Numbers of tokens without a fit are left out.
    Raises: NoRowsError if all models have the same tokens, or none can be fitted.
    """
    drawn = subsets.select_last_step(subsets.select_standard(rows, "gmacs", "tokens"), quality)
    parts = {
        plot_style.format_count("token", tokens): part
        for tokens, part in selection.split_by_tokens(drawn)
    }
    if len(parts) < 2:
        raise subsets.NoRowsError("all models have the same tokens")
    return _draw_extrapolations(rows, parts, quality)


def _draw_extrapolations(rows, parts, quality):
    """Draws one panel per part, {title: rows}; returns the matplotlib Figure.

    Raises: NoRowsError if no part can be fitted, with the reason of the last.
    """
    matplotlib = plot_style.import_matplotlib()

    fits, reason = {}, ""
    for title, part in parts.items():
        _demand_fittable(part, quality)
        try:
            fits[title] = fit.predict_largest(part, quality)
        except ValueError as error:
            reason = str(error).rstrip(".")
    if not fits:
        raise subsets.NoRowsError(reason)
    look = styles.Styles.from_table(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = styles.new_figure(len(fits), sharey=True)
        for axes, (title, largest) in zip(panels, fits.items(), strict=True):
            narrow = len(fits) > 2
            _draw_extrapolation(axes, look, title, parts[title], largest, quality, narrow)
            plot_style.set_log_scale(axes.xaxis, room=min(1, 2 / len(fits)))
        for axes in panels[1:]:
            axes.set_ylabel("")
        look.draw_legend(figure, pd.concat([parts[title] for title in fits]))
    return figure


def _draw_extrapolation(axes, look, title, drawn, found, quality, narrow):
    """Draws a panel.   Args: found, of `fit.predict_largest`.   narrow, to break the title."""
    # The law is fitted again, since `found` has its prediction but not its curve.
    others = drawn[drawn["gmacs"] < found["gmacs"]]
    law = laws.fit_power_law(others["gmacs"], others[quality])
    _draw_models(axes, look, others, "gmacs", quality)
    largest = drawn[drawn["gmacs"] == found["gmacs"]]
    _draw_models(axes, look, largest, "gmacs", quality, hollow=True)
    _draw_law(axes, law, drawn["gmacs"])
    # In a narrow panel the title would run into the next one, so it has more lines.
    separator = "\n" if narrow else " "
    text, model = f"{title}, " if title else "", plot_style.escape(found["model"])
    text += f"fit of all but {model}:{separator}{_equation(law, 'G')}\n"
    text += f"{model}: predicted {_digits(found['predicted'])}"
    if found["interval"]:
        _draw_interval(axes, others, found, quality)
        ends = ("?" if end is None else _digits(end) for end in found["interval"])
        text += f"{separator}({bootstrap.LEVEL:.0%}: {' to '.join(ends)})"
    text += f",{separator}measured {_digits(found['measured'])}"
    axes.set_title(text, fontsize=7, loc="right")
    axes.set_xlabel(plot_style.get_label("gmacs"))
    styles.name_quality(axes, drawn, quality, log=True)


def _digits(number):
    """Returns a number with three significant digits, trailing zeros included."""
    return f"{number:#.3g}".rstrip(".")


def _draw_interval(axes, rows, found, quality):
    """Draws the prediction interval of one more run.

    It is a bar at the largest model, and a band from the other models up to it. An interval
    without an end on some side has no band.
    """
    columns = rows["gmacs"], rows[quality], selection.name_models(rows)
    across = np.geomspace(rows["gmacs"].max(), found["gmacs"], BAND)
    ends = [bootstrap.find_prediction_interval(*columns, float(at)) for at in across[:-1]]
    ends = np.array([*ends, found["interval"]], np.float64)  # None is nan
    axes.vlines(across[-1:], *ends[-1:].T, color="0.6", linewidth=3, zorder=1, label="_interval")
    if np.isfinite(ends).all():
        grey = dict(color="0.85", linewidth=0, zorder=0)
        axes.fill_between(across, *ends.T, label="_band", **grey)


def _draw_budget(axes, budget, color):
    """Draws the curve of one compute budget, with a star at its optimum, if it has one."""
    points = [(point["gmacs"], point["quality"]) for point in budget["models"]]
    axes.plot(*zip(*points, strict=True), color=color)
    if budget["bracketed"]:
        axes.plot([budget["gmacs"]], [budget["quality"]], label="_optimum", **STAR)


def _draw_models(axes, look, rows, x, quality, hollow=False):
    """Draws one curve per model."""
    for _, model in rows.groupby(selection.name_models(rows), sort=False):
        color, marker = look.get_color(model.iloc[0]), look.get_marker(model.iloc[0])
        styles.draw_curve(axes, subsets.make_curve(model, x, quality), color, marker, hollow)


def _demand_models(rows):
    """Raises: NoRowsError for rows of a single model."""
    if selection.name_models(rows).nunique() < 2:
        raise subsets.NoRowsError(f"all rows are of one model, {rows['model'].iloc[0]}")


def _demand_fittable(rows, quality):
    """Raises: NoRowsError for a quality that cannot be fitted, with the reason."""
    try:
        selection.measured(rows, quality)
    except ValueError as error:
        raise subsets.NoRowsError(str(error).rstrip(".")) from error


def _fit_or_log(law, x, y, what):
    """Fits a law to points; if that fails, returns None and logs the reason."""
    try:
        return law(x, y)
    except ValueError as error:
        logger.info("no %s: %s", what, error)
        return None


def _draw_law(axes, law, x):
    """Draws a law over the range of x; None draws nothing."""
    if law:
        across = np.geomspace(min(x), max(x), 100)
        axes.plot(across, law(across), label="_law", **LAW)


def _equation(law, symbol):
    """Returns the equation of a law as matplotlib's mathtext."""
    if isinstance(law, laws.LogLinear):
        sign = "+" if law.slope > 0 else "-"
        slope = _number(abs(law.slope))
        return rf"${_number(law.intercept)} {sign} {slope}\,\log_{{10}} {symbol}$"
    power = rf"{_number(law.b)}\,{symbol}^{{-{law.c:.2g}}}"
    return f"${_number(law.a)} + {power}$" if law.a > 0 else f"${power}$"


def _number(value):
    """Returns mathtext with three significant digits, such as '2.44\\times 10^{-5}'."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return rf"{mantissa}\times 10^{{{int(exponent)}}}" if exponent else mantissa
