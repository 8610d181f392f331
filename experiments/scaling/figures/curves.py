"""Figures of quality against model size and training compute, with fitted power laws."""

import logging

import numpy as np
import pandas as pd

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import styles, subsets
from experiments.scaling.fits import bootstrap, fit, laws, selection

logger = logging.getLogger("dit_jax")

# Styles of a fitted law, and of the optimum at a compute budget.
LAW = dict(color="0.25", linestyle="--", linewidth=1, marker="", zorder=3)
STAR = dict(color="black", markerfacecolor="none", marker="*", markersize=7, linestyle="", zorder=3)
BAND = 5  # points along a prediction interval's band
BUDGETS = 5  # budgets drawn in one panel, at most
GREYS = 0.35, 0.9  # shades of the least and the most compute in matplotlib's 'Greys'


def draw_gflops(rows: pd.DataFrame, quality: str):
    """Draws quality against multiply-adds at the last step; returns the matplotlib Figure.

    For a loss it draws a fitted power law, else a line in log10(multiply-adds). The title has this
    fit, and Pearson's correlation of quality and log10(multiply-adds).
    Raises: NoRowsError for fewer than 2 models.   Source: Peebles & Xie 2023, figures 2 and 8.
    """
    matplotlib = plot_style.import_matplotlib()

    drawn = subsets.require_last_step(subsets.select_standard(rows, "gmacs"), quality)
    _require_several_models(drawn)
    look = styles.Styles.from_table(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (axes,) = styles.new_figure()
        _draw_models(axes, look, drawn, "gmacs", quality)
        x, y = drawn["gmacs"], drawn[quality]
        is_loss = quality.startswith(selection.LOSSES)
        line = _fit_or_log(laws.fit_line, x, y, f"line of {quality}")
        law = _fit_or_log(laws.fit_power_law, x, y, f"power law of {quality}") if is_loss else line
        title = [f"fit {_format_equation(law, 'G')}"] if law else []
        title += [f"$r = {line.correlation:.2f}$"] if line else []
        _draw_law(axes, law, x)
        axes.set_title(", ".join(title), fontsize=7, loc="right")
        axes.set_xlabel(plot_style.get_label("gmacs"))
        plot_style.set_log_scale(axes.xaxis)
        styles.name_quality(axes, drawn, quality, log=is_loss)
        look.draw_legend(figure, drawn)
    return figure


def draw_compute(rows: pd.DataFrame, quality: str):
    """Draws quality against training compute, a line per model; returns the matplotlib Figure.

    For a loss or a distance it draws a power law of the best quality that any model has at each
    compute. With more sizes than colors it has a panel per number of tokens, to keep lines apart.
    Raises: NoRowsError for fewer than 2 models.   Source: Peebles & Xie 2023, figure 9.
    """
    matplotlib = plot_style.import_matplotlib()

    # `drawn` has a row for each seed, `means` only one for each model and step.
    drawn = subsets.require_complete(subsets.select_standard(rows, "train_gflops"), quality)
    means = selection.average_seeds(drawn, quality)
    _require_several_models(means)
    look = styles.Styles.from_table(rows)
    unit, name = subsets.choose_unit(means["train_gflops"])
    drawn = drawn.assign(compute=drawn["train_gflops"] / unit)
    groups = [(None, drawn)] if look.by_size else list(selection.split_by_tokens(drawn))
    # A power law needs positive values that fall with compute.
    law = None
    if (drawn[quality] > 0).all() and not quality.startswith(selection.HIGHER):
        envelope = fit.find_envelope(drawn, quality)
        x, y = envelope["train_gflops"] / unit, envelope[quality]
        law = _fit_or_log(laws.fit_power_law, x, y, f"best {quality}")
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = styles.new_figure(len(groups), sharey=True)
        for axes, (tokens, group) in zip(panels, groups, strict=True):
            _draw_models(axes, look, group, "compute", quality)
            _draw_law(axes, law, group["compute"])
            if tokens:
                axes.set_title(plot_style.format_count("token", tokens), fontsize=8)
            axes.set_xlabel(f"training compute ({name})")
            plot_style.set_log_scale(axes.xaxis, room=min(1, 2 / len(groups)))
            styles.name_quality(axes, drawn, quality, log=True)
        for axes in panels[1:]:
            axes.set_ylabel("")
        # The law is fitted to the models of all panels, so it is written above them.
        if law:
            text = f"best of all {_format_equation(law, 'C')}, $C$ in {name}"
            if len(panels) == 1:
                panels[0].set_title(text, fontsize=7, loc="right")
            else:
                figure.suptitle(text, fontsize=7)
        look.draw_legend(figure, drawn)
    return figure


def draw_isoflop(rows: pd.DataFrame, quality: str):
    """Draws quality against multiply-adds at equal training compute; returns the matplotlib Figure.

    It has a panel per number of tokens. A star marks the optimal size for a compute budget if there
    are models on both sides of it.
    Raises: NoRowsError if no 3 models with equal tokens reach a common compute.
    """
    matplotlib = plot_style.import_matplotlib()

    # `fit.find_optima` needs all of these columns.
    needed = "train_gflops", "gmacs", "params", "tokens"
    drawn = subsets.require_complete(subsets.select_standard(rows, *needed), quality)
    _require_fittable(drawn, quality)
    budgets = fit.find_optima(drawn, quality)
    if not budgets:
        raise subsets.NoRowsError("no compute was passed by 3 models of equal tokens")
    look = styles.Styles.from_table(rows)
    models = drawn.drop_duplicates("model", keep="last").set_index("model")
    computes = pd.Series([budget["budget"] for budget in budgets])
    unit, name = subsets.choose_unit(computes)
    with matplotlib.rc_context(plot_style.STYLE):
        # A darker curve has a larger budget.
        greys = _make_greys(computes.min() / unit / 1.1, computes.max() / unit * 1.1)
        counts = sorted({budget["tokens"] for budget in budgets})
        figure, panels = styles.new_figure(len(counts), sharex=True)
        for axes, tokens in zip(panels, counts, strict=True):
            panel = [budget for budget in budgets if budget["tokens"] == tokens]
            # At most BUDGETS of them, spread evenly, so that the curves do not crowd.
            for i in sorted(set(np.linspace(0, len(panel) - 1, BUDGETS).round().astype(int))):
                budget = panel[i]
                _draw_budget(axes, budget, greys.to_rgba(budget["budget"] / unit))
                for point in budget["models"]:
                    model = models.loc[point["model"]]
                    mean = point["gmacs"], point["quality"]
                    styles.draw_point(axes, mean, look.get_color(model), look.get_marker(model))
            axes.set_title(plot_style.format_count("token", tokens), fontsize=8)
            axes.set_xlabel(plot_style.get_label("gmacs"))
            axes.margins(x=0.08)
            plot_style.set_log_scale(axes.xaxis, room=min(1, 2 / len(counts)))
            styles.name_quality(axes, drawn, quality, log=True)
        for axes in panels[1:]:
            axes.set_ylabel("")
        # All panels share one color bar. The legend has only models that are drawn.
        bar = figure.colorbar(greys, ax=panels, label=f"training compute ({name})", pad=0.02)
        plot_style.set_log_scale(bar.ax.yaxis)
        drawn_models = {point["model"] for budget in budgets for point in budget["models"]}
        stars = []
        if any(budget["bracketed"] for budget in budgets):
            stars.append(matplotlib.lines.Line2D([], [], label="", **STAR))
        look.draw_legend(figure, models.loc[list(drawn_models)], ("optimum", stars))
    return figure


def _make_greys(low, high):
    """Returns a log scale of greys from light to dark, without those too light for white paper."""
    matplotlib = plot_style.import_matplotlib()
    greys = matplotlib.colormaps["Greys"](np.linspace(*GREYS, 256))
    colors = matplotlib.colors
    return matplotlib.cm.ScalarMappable(colors.LogNorm(low, high), colors.ListedColormap(greys))


def draw_extrapolation(rows: pd.DataFrame, quality: str):
    """Draws a power law of all models but the largest, and its prediction for the largest.

    Quality is drawn against multiply-adds at the last step, with the prediction interval of one
    more run along the law. Hollow markers are measurements of the largest model.
    Returns: the matplotlib Figure.
    Raises: NoRowsError if no law can be fitted.
    """
    drawn = subsets.require_last_step(subsets.select_standard(rows, "gmacs"), quality)
    return _draw_extrapolations(rows, {"": drawn}, quality)


def draw_extrapolation_tokens(rows: pd.DataFrame, quality: str):
    """Draws the figure of `draw_extrapolation` in a panel per number of tokens.

    Numbers of tokens without a fit are left out.
    Returns: the matplotlib Figure.
    Raises: NoRowsError if all models have the same tokens, or if no law can be fitted.
    """
    drawn = subsets.require_last_step(subsets.select_standard(rows, "gmacs", "tokens"), quality)
    groups = {
        plot_style.format_count("token", tokens): group
        for tokens, group in selection.split_by_tokens(drawn)
    }
    if len(groups) < 2:
        raise subsets.NoRowsError("all models have the same tokens")
    return _draw_extrapolations(rows, groups, quality)


def _draw_extrapolations(rows, groups, quality):
    """Draws one panel per group of rows; returns the matplotlib Figure.

    Args: rows, the whole table.   groups: {title: rows}.
    Raises: NoRowsError if no group can be fitted, with the reason for the last one.
    """
    matplotlib = plot_style.import_matplotlib()

    fits, reason = {}, ""
    for title, group in groups.items():
        _require_fittable(group, quality)
        try:
            fits[title] = fit.predict_largest(group, quality)
        except ValueError as error:
            reason = str(error).rstrip(".")
    if not fits:
        raise subsets.NoRowsError(reason)
    look = styles.Styles.from_table(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = styles.new_figure(len(fits), sharey=True)
        # In a narrow panel the title would run into the next one, so it gets more lines.
        separator = "\n" if len(fits) > 2 else " "
        for axes, (title, prediction) in zip(panels, fits.items(), strict=True):
            _draw_extrapolation(axes, look, title, groups[title], prediction, quality, separator)
            plot_style.set_log_scale(axes.xaxis, room=min(1, 2 / len(fits)))
        for axes in panels[1:]:
            axes.set_ylabel("")
        look.draw_legend(figure, pd.concat([groups[title] for title in fits]))
    return figure


def _draw_extrapolation(axes, look, title, drawn, prediction, quality, separator):
    """Draws a panel.   Args: prediction, of `fit.predict_largest` for the rows `drawn`."""
    # The law is fitted again, since `prediction` has its value but not its curve.
    others = drawn[drawn["gmacs"] < prediction["gmacs"]]
    law = laws.fit_power_law(others["gmacs"], others[quality])
    _draw_models(axes, look, others, "gmacs", quality)
    largest = drawn[drawn["gmacs"] == prediction["gmacs"]]
    _draw_models(axes, look, largest, "gmacs", quality, hollow=True)
    _draw_law(axes, law, drawn["gmacs"])
    model = plot_style.escape(prediction["model"])
    text = f"fit of all but {model}:{separator}{_format_equation(law, 'G')}\n"
    text += f"{model}: predicted {_format_digits(prediction['predicted'])}"
    if prediction["interval"]:
        _draw_interval(axes, others, prediction, quality)
        low, high = ("?" if end is None else _format_digits(end) for end in prediction["interval"])
        text += f"{separator}({bootstrap.LEVEL:.0%}: {low} to {high})"
    text += f",{separator}measured {_format_digits(prediction['measured'])}"
    axes.set_title(f"{title}, {text}" if title else text, fontsize=7, loc="right")
    axes.set_xlabel(plot_style.get_label("gmacs"))
    styles.name_quality(axes, drawn, quality, log=True)


def _format_digits(number):
    """Returns a number with three significant digits, trailing zeros included."""
    return f"{number:#.3g}".rstrip(".")


def _draw_interval(axes, rows, prediction, quality):
    """Draws the prediction interval of one more run.

    It is a bar at the largest model, and a band from the other models up to it. If an interval has
    no end on some side, there is no band.
    """
    columns = rows["gmacs"], rows[quality], selection.name_models(rows)
    gmacs = np.geomspace(rows["gmacs"].max(), prediction["gmacs"], BAND)
    intervals = [bootstrap.find_prediction_interval(*columns, float(at)) for at in gmacs[:-1]]
    intervals.append(prediction["interval"])
    lows, highs = np.array(intervals, np.float64).T  # None becomes nan
    bar = dict(color="0.6", linewidth=3, zorder=1, label="_interval")
    axes.vlines(gmacs[-1:], lows[-1:], highs[-1:], **bar)
    if np.isfinite([lows, highs]).all():
        band = dict(color="0.85", linewidth=0, zorder=0, label="_band")
        axes.fill_between(gmacs, lows, highs, **band)


def _draw_budget(axes, budget, color):
    """Draws the curve of one compute budget, with a star at the optimum if there is one."""
    points = [(point["gmacs"], point["quality"]) for point in budget["models"]]
    axes.plot(*zip(*points, strict=True), color=color)
    if budget["bracketed"]:
        axes.plot([budget["gmacs"]], [budget["quality"]], label="_optimum", **STAR)


def _draw_models(axes, look, rows, x, quality, hollow=False):
    """Draws one curve per model."""
    for _, model in rows.groupby(selection.name_models(rows), sort=False):
        color, marker = look.get_color(model.iloc[0]), look.get_marker(model.iloc[0])
        styles.draw_curve(axes, subsets.make_curve(model, x, quality), color, marker, hollow)


def _require_several_models(rows):
    """Raises a NoRowsError for rows of a single model."""
    if selection.name_models(rows).nunique() < 2:
        raise subsets.NoRowsError(f"all rows are of one model, {rows['model'].iloc[0]}")


def _require_fittable(rows, quality):
    """Raises a NoRowsError with the reason if no curve can be fitted to the quality."""
    try:
        selection.select_fittable(rows, quality)
    except ValueError as error:
        raise subsets.NoRowsError(str(error).rstrip(".")) from error


def _fit_or_log(fit_curve, x, y, description):
    """Fits a curve to points; if that fails, logs the reason and returns None."""
    try:
        return fit_curve(x, y)
    except ValueError as error:
        logger.info("no %s: %s", description, error)
        return None


def _draw_law(axes, law, x):
    """Draws a law over the range of x; None draws nothing."""
    if law:
        points = np.geomspace(min(x), max(x), 100)
        axes.plot(points, law(points), label="_law", **LAW)


def _format_equation(law, symbol):
    """Returns the equation of a law as matplotlib's mathtext."""
    if isinstance(law, laws.LogLinear):
        sign = "+" if law.slope > 0 else "-"
        slope = _format_number(abs(law.slope))
        return rf"${_format_number(law.intercept)} {sign} {slope}\,\log_{{10}} {symbol}$"
    power = rf"{_format_number(law.b)}\,{symbol}^{{-{law.c:.2g}}}"
    return f"${_format_number(law.a)} + {power}$" if law.a > 0 else f"${power}$"


def _format_number(value):
    """Returns a number with three significant digits as mathtext, such as '2.44\\times 10^{-5}'."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return rf"{mantissa}\times 10^{{{int(exponent)}}}" if exponent else mantissa
