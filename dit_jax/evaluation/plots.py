"""Plots of rows of measures: curves, axes and legends."""

import json
import pathlib

from dit_jax.evaluation import curves, measures, plot_style, queries

# Settings and costs with a logarithmic axis. A distance has a logarithmic axis if its largest value
# is more than LOG_RATIO times its smallest.
LOG_NAMES = ("steps", "num", "images_seen", "train_gflops", *curves.MODEL_COSTS)
LOG_RATIO = 10
LONG = 20  # characters: a longer label leaves little room beside it


def plot(rows: list[dict], x: str, y: str, out: pathlib.Path) -> None:
    """Writes the plot of y against x to a .png or .svg.

    Args:
      rows: as `queries.read` returns them.
      x, y: names as for `queries.get_value`.
    Raises: ValueError as `curves.from_rows`; OSError if the file cannot be written.
    """
    plot_style.save(draw(rows, x, y), out)


def get_axis_label(rows: list[dict], name: str, with_num: bool = False) -> str:
    """Returns the label of an axis: 'FID', or 'FID (50,000 samples)' with the number of samples."""
    label = plot_style.get_label(name)
    measured = [row for row in rows if queries.get_value(row, name) is not None]
    nums = {queries.get_value(row, "num") for row in measured}
    if not with_num or not curves.is_measure(rows, name) or len(nums) != 1 or None in nums:
        return label
    images = "held-out images" if any("likelihood" in row for row in rows) else "samples"
    separator = "\n" if len(label) > LONG else " "
    return f"{label}{separator}({nums.pop():,} {images})"


def draw(rows: list[dict], x: str, y: str):
    """Returns the matplotlib Figure of y against x.

    Raises: ValueError as `curves.from_rows`.
    """
    matplotlib = plot_style.import_matplotlib()
    drawn = curves.from_rows(rows, x, y)
    rows = curves.select_complete(rows, x, y)
    point_key = curves.get_point_key(rows, x)
    # Long labels, or more than four curves, do not fit inside the axes.
    labels = [_make_label(curve) for curve in drawn]
    longest = max(map(len, labels))
    outside = len(drawn) > 4 or longest > 1.2 * LONG
    columns = 1 if longest > LONG or not outside else 2
    height = plot_style.HEIGHT
    if outside:
        height += 0.16 * -(-len(drawn) // columns)
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(figsize=(plot_style.WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        lines = [_draw_curve(axes, i, curve, point_key, x) for i, curve in enumerate(drawn)]
        points = [xy for curve in drawn for seeds in curve.points.values() for xy in seeds]
        xs, ys = zip(*points, strict=True)
        _scale(axes.xaxis, x, xs)
        _scale(axes.yaxis, y, ys)
        axes.set_xlabel(get_axis_label(rows, x))
        axes.set_ylabel(get_axis_label(rows, y, with_num=True))
        title = None
        if point_key == "cfg_scale" and x != "cfg_scale":
            title = f"at points: {plot_style.get_label(point_key)}"
        if any(labels) or title:
            options = dict(title=title, frameon=False, alignment="left", ncols=columns)
            labelled = [line for line, label in zip(lines, labels, strict=True) if label]
            owner, location = (figure, "outside lower center") if outside else (axes, "best")
            plot_style.draw_legend(owner, labelled, filter(None, labels), loc=location, **options)
    return figure


def _make_label(curve):
    """Returns a curve's label with its number of seeds."""
    seeds = curve.describe_seeds()
    return f"{curve.label} ({seeds})" if curve.label and seeds else curve.label or seeds


def _draw_curve(axes, i, curve, point_key, x):
    """Draws the i-th curve, and returns its line.

    The value of `point_key` is written beside each point, unless `point_key` is x.
    """
    colors, markers, dashes = plot_style.COLORS, plot_style.MARKERS, plot_style.DASHES
    color, marker = colors[i % len(colors)], markers[i % len(markers)]
    means = curve.means()
    xs, ys = zip(*means, strict=True)
    xs = [plot_style.escape(value) if isinstance(value, str) else value for value in xs]
    # A line between words or models would suggest values in between.
    joined = x not in curves.MODEL_COSTS and not isinstance(xs[0], str)
    dash = dashes[i // len(colors) % len(dashes)] if joined else "none"
    (line,) = axes.plot(xs, ys, color=color, marker=marker, linestyle=dash)
    # A single seed is its own mean, so it gets no second point.
    if seed_points := [xy for seeds in curve.points.values() if len(seeds) > 1 for xy in seeds]:
        plot_style.draw_seeds(axes, seed_points, color)
    if point_key == x:
        return line
    axes.margins(0.12)  # room for the text beside points
    for j, (point, mean) in enumerate(zip(curve.points, means, strict=True)):
        # Many models have similar sizes, so their names alternate above and below.
        below = point_key == "workdir" and j % 2
        offset = dict(xytext=(-3, -3), ha="right", va="top") if below else dict(xytext=(3, 3))
        if (value := json.loads(point)) is not None:
            style = dict(textcoords="offset points", fontsize=7, color="0.25")
            axes.annotate(plot_style.escape(queries.to_text(value)), mean, **style, **offset)
    return line


def _scale(axis, name, values):
    """Makes an axis logarithmic if its name or values need it, and sets readable ticks."""
    if isinstance(values[0], str):
        return
    low, high = min(values), max(values)
    measure = measures.find(name)
    is_wide = measure and measure.is_distance and high > LOG_RATIO * low
    counts = name in ("step", "images_seen", "params")
    if low > 0 and (name in LOG_NAMES or is_wide):
        plot_style.set_log_scale(axis, counts)
    elif counts:
        ticker = plot_style.import_matplotlib().ticker
        axis.set_major_formatter(ticker.EngFormatter(sep=""))  # 400k, 1M
