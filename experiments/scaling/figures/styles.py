"""Colors and markers of models, and the parts that all figures of a study share.

The color shows the size of a model, the marker its patch size. A point is the mean over seeds; the
seeds are drawn faintly beside it.
"""

import dataclasses
import itertools

import pandas as pd

from dit_jax.evaluation import curves, plot_style, plots
from experiments.scaling.figures import subsets
from experiments.scaling.fits import selection, table

WIDE = 6.8  # inches; both columns of a paper
EDGE = dict(markeredgecolor="white", markeredgewidth=0.4)  # separates markers that overlap
# Inches in a legend: height of a line; widths of a title, a handle and a letter.
LEGEND_LINE, LEGEND_TITLE, LEGEND_ENTRY, LETTER = 0.17, 0.85, 0.27, 0.062


@dataclasses.dataclass(frozen=True)
class Styles:
    """The color of each size and the marker of each patch size.

    A model without a size is colored by its width. If there are more sizes than colors, all models
    are colored by width.
    """

    colors: dict[str, str]
    markers: dict[int, str]

    @classmethod
    def from_table(cls, rows: pd.DataFrame) -> "Styles":
        """Chooses the styles for a whole table, so that all its figures have the same."""
        sizes = subsets.get_size_names(rows)
        sizes = [] if len(sizes) > len(plot_style.COLORS) else sizes
        unnamed = rows if "size" not in rows else rows[~rows["size"].isin(sizes)]
        widths = sorted(unnamed["hidden_size"].dropna().unique())
        names = [*sizes, *(f"width {width}" for width in widths)]
        patches = sorted(rows["patch_size"].dropna().unique())
        return cls(
            dict(zip(names, make_colors(len(names)), strict=True)),
            dict(zip(patches, itertools.cycle(plot_style.MARKERS), strict=False)),
        )

    @property
    def by_size(self) -> bool:
        """Whether every model is colored by its size."""
        return not any(name.startswith("width ") for name in self.colors)

    def get_name(self, row: pd.Series) -> str:
        """Returns the key of a row's color: the size of its model, or the width."""
        size = row.get("size")
        return size if size in self.colors else f"width {row['hidden_size']}"

    def get_color(self, row: pd.Series) -> str:
        """Returns the color of a row's model."""
        return self.colors[self.get_name(row)]

    def get_marker(self, row: pd.Series) -> str:
        """Returns the marker of a row's model; a dot without a patch size."""
        return self.markers.get(row["patch_size"], ".")

    def draw_legend(self, figure, rows: pd.DataFrame, *lines: tuple[str, list]) -> None:
        """Draws a legend of the sizes and patch sizes in these rows below the axes.

        Args: lines, further lines (title, handles) of the legend.
        """
        new_line = plot_style.import_matplotlib().lines.Line2D

        # If all entries are widths, the title says so instead of each label.
        drawn = set(rows.apply(self.get_name, axis=1))
        widths = all(name.startswith("width ") for name in drawn)
        sizes = [
            new_line([], [], color=color, label=name.removeprefix("width ") if widths else name)
            for name, color in self.colors.items()
            if name in drawn
        ]
        marks = [
            new_line([], [], color="0.3", linestyle="none", marker=marker, label=f"{patch}")
            for patch, marker in self.markers.items()
            if patch in set(rows["patch_size"])
        ]
        draw_legend(figure, ("width" if widths else "size", sizes), ("patch size", marks), *lines)


def make_colors(count: int) -> tuple[str, ...]:
    """Returns `count` colors of the palette, or of a color ramp if the palette has too few."""
    if count <= len(plot_style.COLORS):
        return plot_style.COLORS[:count]
    matplotlib = plot_style.import_matplotlib()
    ramp = matplotlib.colormaps["viridis"]
    return tuple(matplotlib.colors.to_hex(ramp(i / (count - 1))) for i in range(count))


def draw_legend(figure, *lines: tuple[str, list]) -> None:
    """Draws a legend below the axes; long lines are broken.

    Args: lines, (title, handles) of each.
    """
    new_line = plot_style.import_matplotlib().lines.Line2D

    # Every entry gets the width of the longest label.
    width, height = figure.get_size_inches()
    letters = max((len(h.get_label()) for _, handles in lines for h in handles), default=0)
    per_line = max(1, int((width - LEGEND_TITLE) / (LEGEND_ENTRY + LETTER * letters)))
    broken = []
    for title, handles in lines:
        for start in range(0, len(handles), per_line):
            broken.append(("" if start else title, handles[start : start + per_line]))
    # matplotlib fills a legend by columns, and has no titles of lines. So a title is an entry
    # without a handle, and blank entries fill up short lines.
    blank = new_line([], [], linestyle="none")
    columns = 1 + max(len(handles) for _, handles in broken)
    cells = [
        [(blank, title), *((h, h.get_label()) for h in handles)]
        + [(blank, "")] * (columns - 1 - len(handles))
        for title, handles in broken
    ]
    handles, labels = zip(*(row[i] for i in range(columns) for row in cells), strict=True)
    legend = plot_style.draw_legend(
        figure,
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=7,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=0.8,
        labelspacing=0.3,
        borderpad=0.1,
    )
    for text in legend.texts[: len(broken)]:  # the first column has the titles
        text.set_color("0.3")
    # The figure grows by the legend's height, so that the axes keep their size.
    figure.set_size_inches(width, height + LEGEND_LINE * len(broken))


def new_figure(panels: int = 1, sharex: bool = False, sharey: bool = False):
    """Returns a figure and its axes [panels].

    Call it and draw within `matplotlib.rc_context(plot_style.STYLE)`.
    """
    matplotlib = plot_style.import_matplotlib()

    width = plot_style.WIDTH if panels == 1 else WIDE
    figure = matplotlib.figure.Figure(figsize=(width, plot_style.HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharex=sharex, sharey=sharey)[0])


def draw_curve(
    axes, curve: curves.Curve, color: str, marker: str, hollow: bool = False, **options
) -> None:
    """Draws the means, joined by a line, over faint points for the seeds."""
    # A single seed is its own mean, so it gets no second point.
    repeated = [point for seeds in curve.points.values() if len(seeds) > 1 for point in seeds]
    if repeated:
        plot_style.draw_seeds(axes, repeated, color)
    edge = dict(markerfacecolor="white", markersize=5) if hollow else EDGE
    axes.plot(*zip(*curve.means(), strict=True), color=color, marker=marker, **edge, **options)


def draw_point(axes, mean: tuple[float, float], color: str, marker: str) -> None:
    """Draws a single mean (x, y), for a line whose models have different markers."""
    x, y = mean
    axes.plot([x], [y], color=color, marker=marker, label="_mean", **EDGE)


def name_quality(axes, rows: pd.DataFrame, quality: str, log: bool) -> None:
    """Sets the label of the y axis, with the number of samples, and its scale.

    Args: log, whether to use a log scale if the quality is positive and lower is better.
    """
    from_samples = not quality.startswith(selection.LOSSES)
    measured = table.to_rows(rows.filter([quality, "num"]))
    axes.set_ylabel(plots.get_axis_label(measured, quality, with_num=from_samples))
    positive = (rows[quality] > 0).all()
    if log and positive and not quality.startswith(selection.HIGHER):
        plot_style.set_log_scale(axes.yaxis)


def tick_values(axis, values: set[float]) -> None:
    """Sets ticks at these values, if they are at most 6 and far enough apart on a log axis."""
    ordered = sorted(values)
    far_apart = all(high >= 1.3 * low for low, high in itertools.pairwise(ordered))
    if len(ordered) <= 6 and far_apart:
        axis.set_ticks(ordered, [f"{value:,}" for value in ordered])
