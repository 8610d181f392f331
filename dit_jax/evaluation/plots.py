"""Plots of rows of measures: curves, axes and legends."""

import json
import pathlib

from dit_jax.evaluation import curves, measures, plot_style, queries

# Settings and costs with a logarithmic axis. A distance gets one if its largest value is more than
# SPAN times its smallest.
LOG = ("steps", "num", "images_seen", "train_gflops", *curves.MODEL_COSTS)
SPAN = 10
LONG = 20  # characters of a label that leaves little room beside it


def plot(rows: list[dict], x: str, y: str, out: pathlib.Path) -> None:
    """Writes the plot of y against x to a .png or .svg.

    Args:
      rows: as `queries.read` returns them.
      x, y: names as for `queries.get_value`.
    Raises: ValueError as `curves.from_rows`; OSError.
    """
    plot_style.save(draw(rows, x, y), out)


def axis_label(rows: list[dict], name: str, with_num: bool = False) -> str:
    """Returns the label of an axis: 'FID', or 'FID (50,000 samples)' with the number of samples."""
    text = plot_style.label(name)
    measured = [row for row in rows if queries.get_value(row, name) is not None]
    num = {queries.get_value(row, "num") for row in measured}
    if with_num and curves.is_measure(rows, name) and len(num) == 1 and None not in num:
        images = "held-out images" if any("likelihood" in row for row in rows) else "samples"
        text += "\n" * (len(text) > LONG) or " "
        text += f"({num.pop():,} {images})"
    return text


def draw(rows: list[dict], x: str, y: str):
    """Returns the matplotlib Figure of y against x.

    Raises: ValueError as `curves.from_rows`.
    """
    matplotlib = plot_style.import_matplotlib()
    drawn = curves.from_rows(rows, x, y)
    rows = curves.select_complete(rows, x, y)
    point_key = curves.get_point_key(rows, x)
    # Long labels, or more than four curves, do not fit inside the axes.
    labels = [_with_seeds(curve) for curve in drawn]
    longest = max(map(len, labels))
    outside = len(drawn) > 4 or longest > 1.2 * LONG
    columns = 1 if longest > LONG or not outside else 2
    with matplotlib.rc_context(plot_style.STYLE):
        height = plot_style.HEIGHT + 0.16 * outside * -(-len(drawn) // columns)
        figure = matplotlib.figure.Figure(figsize=(plot_style.WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        lines = [_draw_curve(axes, i, curve, point_key, x) for i, curve in enumerate(drawn)]
        points = [p for curve in drawn for seeds in curve.points.values() for p in seeds]
        xs, ys = zip(*points, strict=True)
        _scale(axes.xaxis, x, xs)
        _scale(axes.yaxis, y, ys)
        axes.set_xlabel(axis_label(rows, x))
        axes.set_ylabel(axis_label(rows, y, with_num=True))
        title = (
            f"at points: {plot_style.LABELS[point_key]}" if point_key == "cfg_scale" != x else None
        )
        if any(labels) or title:
            place = dict(loc="outside lower center" if outside else "best", ncols=columns)
            options = dict(title=title, frameon=False, alignment="left", **place)
            named = [line for line, label in zip(lines, labels, strict=True) if label]
            plot_style.legend(figure if outside else axes, named, filter(None, labels), **options)
    return figure


def _with_seeds(curve):
    """Returns a curve's label with its number of seeds."""
    seeds = curve.describe_seeds()
    return f"{curve.label} ({seeds})" if curve.label and seeds else curve.label or seeds


def _draw_curve(axes, i, curve, point_key, x):
    """Draws curve number i, and returns its line.

    Each point is named by its value of `point_key`, unless that is x itself.
    """
    colors, markers, dashes = plot_style.COLORS, plot_style.MARKERS, plot_style.DASHES
    color, marker = colors[i % len(colors)], markers[i % len(markers)]
    means = curve.means()
    xs, ys = zip(*means, strict=True)
    xs = [plot_style.literal(name) if isinstance(name, str) else name for name in xs]
    # A line between words or models would suggest values in between.
    joined = x not in curves.MODEL_COSTS and not isinstance(xs[0], str)
    dash = dashes[i // len(colors) % len(dashes)] if joined else "none"
    (line,) = axes.plot(xs, ys, color=color, marker=marker, linestyle=dash)
    several = [point for seeds in curve.points.values() if len(seeds) > 1 for point in seeds]
    if several:
        plot_style.draw_seeds(axes, several, color)
    if point_key == x:
        return line
    axes.margins(0.12)  # room for names
    for j, (key, mean) in enumerate(zip(curve.points, means, strict=True)):
        # Many models have similar sizes: their names alternate above and below.
        below = point_key == "workdir" and j % 2
        place = dict(xytext=(-3, -3), ha="right", va="top") if below else dict(xytext=(3, 3))
        if (text := json.loads(key)) is not None:
            grey = dict(textcoords="offset points", fontsize=7, color="0.25")
            axes.annotate(plot_style.literal(queries.to_text(text)), mean, **grey, **place)
    return line


def _scale(axis, name, values):
    """Makes an axis logarithmic if its values call for it, and gives it readable ticks."""
    if isinstance(values[0], str):
        return
    low, high = min(values), max(values)
    measure = measures.find(name)
    spans = measure and measure.is_distance and high > SPAN * low
    counts = name in ("step", "images_seen", "params")
    if low > 0 and (name in LOG or spans):
        plot_style.log_scale(axis, counts)
    elif counts:
        ticker = plot_style.import_matplotlib().ticker
        axis.set_major_formatter(ticker.EngFormatter(sep=""))  # 400k, 1M
