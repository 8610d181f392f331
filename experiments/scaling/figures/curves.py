"""The figures of quality against the size and the compute of models, with their laws."""

import logging

import numpy as np

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import looks
from experiments.scaling.fits import bootstrap, fit, laws, selection

logger = logging.getLogger("dit_jax")

LAW = dict(color="0.25", linestyle="--", linewidth=1, marker="", zorder=3)
STAR = dict(color="black", markerfacecolor="none", marker="*", markersize=7, linestyle="", zorder=3)
BAND = 5  # points of it
BUDGETS = 5  # at most, drawn of a number of tokens
GREYS = 0.35, 0.9  # of the least and the most compute, in matplotlib's 'Greys'


def draw_gflops(rows: list[dict], quality: str):
    """The matplotlib Figure of quality against multiply-adds, at the last step.

    With Pearson's correlation of quality and log10 of them, and a line in these; of a loss a power
    law. Raises: LackingError for fewer than 2 models. Source: Peebles & Xie 2023, figures 2 and 8.
    """
    matplotlib = plot_style.import_matplotlib()

    drawn = looks.at_last_step(looks.measured(looks.standard(rows), "gmacs"), quality)
    _demand_models(drawn)
    look = looks.Looks.of(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (axes,) = looks.new_figure()
        _draw_models(axes, look, drawn, "gmacs", quality)
        x, y = _columns(drawn, "gmacs", quality)
        of_loss = quality.startswith(selection.LOSSES)
        line = _fitted(laws.log_linear, x, y, f"line of {quality}")
        law = _fitted(laws.power_law, x, y, f"power law of {quality}") if of_loss else line
        texts = [f"fit {_equation(law, 'G')}"] if law else []
        texts += [f"$r = {line.correlation:.2f}$"] if line else []
        _draw_law(axes, law, x)
        axes.set_title(", ".join(texts), fontsize=7, loc="right")
        axes.set_xlabel(plot_style.label("gmacs"))
        plot_style.log_scale(axes.xaxis)
        looks.name_quality(axes, drawn, quality, log=of_loss)
        look.legend(figure, drawn)
    return figure


def draw_compute(rows: list[dict], quality: str):
    """The matplotlib Figure of quality against training compute, a line to a model.

    With the power law of the best of all models, where quality is a loss or a distance. Where
    there are more sizes than colors, a panel to each number of tokens keeps the lines apart.
    Raises: LackingError for fewer than 2 models. Source: Peebles & Xie 2023, figure 9.
    """
    matplotlib = plot_style.import_matplotlib()

    drawn = looks.complete(looks.measured(looks.standard(rows), "train_gflops"), quality)
    means = selection.average(drawn, quality)
    _demand_models(means)
    look = looks.Looks.of(rows)
    unit, name = looks.compute_unit([row["train_gflops"] for row in means])
    drawn, means = looks.in_unit(drawn, unit), looks.in_unit(means, unit)
    parts = {(None,): drawn} if look.by_size else looks.group(drawn, "tokens")
    law = None
    if all(row[quality] > 0 for row in drawn) and not quality.startswith(selection.HIGHER):
        x, y = _columns(looks.in_unit(fit.envelope(drawn, quality), unit), "compute", quality)
        law = _fitted(laws.power_law, x, y, f"best {quality}")
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = looks.new_figure(len(parts), sharey=True)
        for axes, ((tokens,), part) in zip(panels, sorted(parts.items()), strict=True):
            _draw_models(axes, look, part, "compute", quality)
            _draw_law(axes, law, [row["compute"] for row in part])
            if tokens:
                axes.set_title(plot_style.count("token", tokens), fontsize=8)
            axes.set_xlabel(f"training compute ({name})")
            plot_style.log_scale(axes.xaxis, room=min(1, 2 / len(parts)))
            looks.name_quality(axes, drawn, quality, log=True)
        for axes in panels[1:]:
            axes.set_ylabel("")
        if law:
            text = f"best of all {_equation(law, 'C')}, $C$ in {name}"
            if len(panels) == 1:
                panels[0].set_title(text, fontsize=7, loc="right")
            else:
                figure.suptitle(text, fontsize=7)
        look.legend(figure, drawn)
    return figure


def draw_isoflop(rows: list[dict], quality: str):
    """The matplotlib Figure of quality against multiply-adds at equal compute, a panel to tokens.

    A star is the optimum of a budget that models on both sides of it bracket.
    Raises: LackingError where no compute was passed by 3 models of equal tokens.
    """
    matplotlib = plot_style.import_matplotlib()

    needed = "train_gflops", "gmacs", "params", "tokens"
    drawn = looks.complete(looks.measured(looks.standard(rows), *needed), quality)
    _demand_fittable(drawn, quality)
    found = fit.iso_flop(drawn, quality)
    if not found:
        raise looks.LackingError("no compute was passed by 3 models of equal tokens")
    look = looks.Looks.of(rows)
    kinds = {row["model"]: row for row in drawn}
    budgets = [budget["budget"] for budget in found]
    unit, name = looks.compute_unit(budgets)
    with matplotlib.rc_context(plot_style.STYLE):
        ramp = matplotlib.colormaps["Greys"](np.linspace(*GREYS, 256))
        edges = min(budgets) / unit / 1.1, max(budgets) / unit * 1.1
        colors = matplotlib.colors
        greys = matplotlib.cm.ScalarMappable(colors.LogNorm(*edges), colors.ListedColormap(ramp))
        tokens = sorted({budget["tokens"] for budget in found})
        figure, panels = looks.new_figure(len(tokens), sharex=True)
        for axes, count in zip(panels, tokens, strict=True):
            of_tokens = [budget for budget in found if budget["tokens"] == count]
            for i in sorted(set(np.linspace(0, len(of_tokens) - 1, BUDGETS).round().astype(int))):
                _draw_budget(axes, of_tokens[i], greys.to_rgba(of_tokens[i]["budget"] / unit))
                for point in of_tokens[i]["models"]:
                    kind = kinds[point["model"]]
                    at = point["gmacs"], point["quality"]
                    looks.draw_point(axes, at, look.color(kind), look.marker(kind))
            axes.set_title(plot_style.count("token", count), fontsize=8)
            axes.set_xlabel(plot_style.label("gmacs"))
            axes.margins(x=0.08)
            plot_style.log_scale(axes.xaxis, room=min(1, 2 / len(tokens)))
            looks.name_quality(axes, drawn, quality, log=True)
        for axes in panels[1:]:
            axes.set_ylabel("")
        bar = figure.colorbar(greys, ax=panels, label=f"training compute ({name})", pad=0.02)
        plot_style.log_scale(bar.ax.yaxis)
        shown = [kinds[point["model"]] for budget in found for point in budget["models"]]
        star = matplotlib.lines.Line2D([], [], label="", **STAR)
        look.legend(figure, shown, ("optimum", [star][: any(b["bracketed"] for b in found)]))
    return figure


def draw_extrapolation(rows: list[dict], quality: str):
    """The matplotlib Figure of the power law of all models but the largest, and of that one.

    Quality is against multiply-adds, at the last step. With the interval of one more run along
    the law, and hollow what was measured of the largest. Raises: LackingError where none can be
    fitted.
    """
    drawn = looks.at_last_step(looks.measured(looks.standard(rows), "gmacs"), quality)
    return _draw_extrapolations(rows, {"": drawn}, quality)


def draw_extrapolation_tokens(rows: list[dict], quality: str):
    """As `draw_extrapolation`, a panel to the models of each number of tokens that can be fitted.

    Raises: LackingError where there are not two numbers, or none can.
    """
    drawn = looks.at_last_step(looks.measured(looks.standard(rows), "gmacs", "tokens"), quality)
    parts = {
        plot_style.count("token", tokens): part
        for (tokens,), part in sorted(looks.group(drawn, "tokens").items())
    }
    if len(parts) < 2:
        raise looks.LackingError("all models have the same tokens")
    return _draw_extrapolations(rows, parts, quality)


def _draw_extrapolations(rows, parts, quality):
    matplotlib = plot_style.import_matplotlib()

    found, reason = {}, ""
    for title, part in parts.items():
        _demand_fittable(part, quality)
        try:
            found[title] = fit.largest(part, quality)
        except ValueError as error:
            reason = str(error).rstrip(".")
    if not found:
        raise looks.LackingError(reason)
    look = looks.Looks.of(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = looks.new_figure(len(found), sharey=True)
        for axes, (title, largest) in zip(panels, found.items(), strict=True):
            narrow = len(found) > 2
            _draw_extrapolation(axes, look, title, parts[title], largest, quality, narrow)
            plot_style.log_scale(axes.xaxis, room=min(1, 2 / len(found)))
        for axes in panels[1:]:
            axes.set_ylabel("")
        look.legend(figure, [row for title in found for row in parts[title]])
    return figure


def _draw_extrapolation(axes, look, title, drawn, found, quality, narrow):
    others = [row for row in drawn if row["gmacs"] < found["gmacs"]]
    x, y = _columns(others, "gmacs", quality)
    law = laws.power_law(x, y)
    _draw_models(axes, look, others, "gmacs", quality)
    largest = [row for row in drawn if row["gmacs"] == found["gmacs"]]
    _draw_models(axes, look, largest, "gmacs", quality, hollow=True)
    _draw_law(axes, law, [*x, found["gmacs"]])
    rest = "\n" if narrow else " "
    text, model = f"{title}, " if title else "", plot_style.literal(found["model"])
    text += f"fit of all but {model}:{rest}{_equation(law, 'G')}\n"
    text += f"{model}: predicted {_digits(found['predicted'])}"
    if found["interval"]:
        _draw_interval(axes, others, found, quality)
        ends = ("?" if end is None else _digits(end) for end in found["interval"])
        text += f"{rest}({bootstrap.LEVEL:.0%}: {' to '.join(ends)})"
    text += f",{rest}measured {_digits(found['measured'])}"
    axes.set_title(text, fontsize=7, loc="right")
    axes.set_xlabel(plot_style.label("gmacs"))
    looks.name_quality(axes, drawn, quality, log=True)


def _digits(number):
    """Three of them, the last ones also if they are 0."""
    return f"{number:#.3g}".rstrip(".")


def _draw_interval(axes, rows, found, quality):
    """Of one more run: a bar at the largest model, and a band up to it if it has two ends there."""
    cells = [str(selection.model_of(row)) for row in rows]
    x, y = _columns(rows, "gmacs", quality)
    across = np.geomspace(x.max(), found["gmacs"], BAND)
    ends = [bootstrap.prediction_interval(x, y, cells, float(at)) for at in across[:-1]]
    ends = np.array([*ends, found["interval"]], np.float64)  # None is nan
    axes.vlines(across[-1:], *ends[-1:].T, color="0.6", linewidth=3, zorder=1, label="_interval")
    if np.isfinite(ends).all():
        grey = dict(color="0.85", linewidth=0, zorder=0)
        axes.fill_between(across, *ends.T, label="_band", **grey)


def _draw_budget(axes, budget, color):
    points = [(point["gmacs"], point["quality"]) for point in budget["models"]]
    axes.plot(*zip(*points, strict=True), color=color)
    if budget["bracketed"]:
        axes.plot([budget["gmacs"]], [budget["quality"]], label="_optimum", **STAR)


def _draw_models(axes, look, rows, x, quality, hollow=False):
    """A curve to a model."""
    for of_model in looks.group(rows, *selection.MODEL).values():
        color, marker = look.color(of_model[0]), look.marker(of_model[0])
        looks.draw_curve(axes, looks.curve(of_model, x, quality), color, marker, hollow)


def _columns(rows, *names):
    return [np.array([row[name] for row in rows]) for name in names]


def _demand_models(rows):
    if len({selection.model_of(row) for row in rows}) < 2:
        raise looks.LackingError(f"all rows are of one model, {rows[0]['model']}")


def _demand_fittable(rows, quality):
    try:
        selection.measured(rows, quality)
    except ValueError as error:
        raise looks.LackingError(str(error).rstrip(".")) from error


def _fitted(law, x, y, what):
    """The law of these points, or None, which the log explains."""
    try:
        return law(x, y)
    except ValueError as error:
        logger.info("no %s: %s", what, error)
        return None


def _draw_law(axes, law, x):
    if law:
        across = np.geomspace(min(x), max(x), 100)
        axes.plot(across, law(across), label="_law", **LAW)


def _equation(law, symbol):
    """In mathtext."""
    if isinstance(law, laws.LogLinear):
        sign = "+" if law.slope > 0 else "-"
        slope = _number(abs(law.slope))
        return rf"${_number(law.intercept)} {sign} {slope}\,\log_{{10}} {symbol}$"
    power = rf"{_number(law.b)}\,{symbol}^{{-{law.c:.2g}}}"
    return f"${_number(law.a)} + {power}$" if law.a > 0 else f"${power}$"


def _number(value):
    """Three digits: '2.44\\times 10^{-5}'."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return rf"{mantissa}\times 10^{{{int(exponent)}}}" if exponent else mantissa
