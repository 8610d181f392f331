"""Selection of a table's rows for figures, and the look of each model in all figures.

The color shows the size of a model, the marker its patch size. A point is the mean over seeds; the
seeds are drawn faintly beside it.
"""

import collections
import dataclasses
import itertools

import numpy as np

from dit_jax.errors import UserError
from dit_jax.evaluation import curves, plot_style, plots
from experiments.scaling.fits import selection

WIDE = 6.8  # inches: both columns of a paper
UNITS = ("GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs", "YFLOPs")
EDGE = dict(markeredgecolor="white", markeredgewidth=0.4)  # separates markers that overlap
# Sizes in a legend in inches: height of a line; widths of a title, a handle and a letter.
LEGEND_LINE, LEGEND_TITLE, LEGEND_ENTRY, LETTER = 0.17, 0.85, 0.27, 0.062


class NoRowsError(UserError):
    """An error for a figure that the table has no rows for."""


def measured(rows: list[dict], *names: str) -> list[dict]:
    """Returns the rows with a value in all these columns.   Raises: NoRowsError for none."""
    complete_rows = [row for row in rows if all(row.get(name) is not None for name in names)]
    if not complete_rows:
        absent = [name for name in names if all(row.get(name) is None for row in rows)]
        raise NoRowsError(f"no row has {' and '.join(absent) or ' with '.join(names)}")
    return complete_rows


def standard(rows: list[dict]) -> list[dict]:
    """Returns the rows of the standard models, one model per size and patch size.

    They have the most common block, and the most common depth and width of their size. Other
    variants are in the table only for comparison with them.
    Raises: NoRowsError for rows without a size, or of several networks.
    """
    if len(networks := {row.get("network") for row in rows}) > 1:
        raise NoRowsError(f"the rows are of {len(networks)} networks, which networks_ compares")
    rows = select_block(measured(rows, "size", "patch_size"))
    shapes = collections.defaultdict(collections.Counter)
    for row in rows:
        shapes[row["size"]][_built(row)] += 1
    return [row for row in rows if _built(row) == shapes[row["size"]].most_common(1)[0][0]]


def get_size_names(rows: list[dict]) -> list[str]:
    """Returns the names of the sizes, fewest parameters first; [] if rows have no size."""
    try:
        ordered = sorted(standard(rows), key=lambda row: row.get("params") or 0)
    except NoRowsError:
        return []
    return list(dict.fromkeys(row["size"] for row in ordered))


def select_block(rows: list[dict]) -> list[dict]:
    """Returns the rows with the most common block."""
    ((block, _),) = collections.Counter(row.get("block") for row in rows).most_common(1)
    return [row for row in rows if row.get("block") == block]


def _built(row):
    """Returns (depth, hidden size)."""
    return row.get("depth"), row.get("hidden_size")


def complete(rows: list[dict], quality: str) -> list[dict]:
    """Returns the comparable rows that `selection.average` uses.   Raises: NoRowsError."""
    rows = selection.comparable(measured(rows, quality, "step"), quality)
    kept = {(selection.get_model_key(row), row["step"]) for row in selection.average(rows, quality)}
    return [row for row in rows if (selection.get_model_key(row), row["step"]) in kept]


def at_last_step(rows: list[dict], quality: str) -> list[dict]:
    """Returns the comparable rows at the last step that most models have.

    Raises: NoRowsError if no row has the quality.
    """
    rows = selection.comparable(measured(rows, quality, "step"), quality)
    return selection.at_step(rows, selection.last_step(rows))


def curve(rows: list[dict], x: str, y: str) -> curves.Curve:
    """Returns a curve with a point for each x, from all seeds, in the order of x."""
    points = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row[x]):
        points[row[x]].append((row[x], row[y]))
    return curves.Curve("", dict(points))


def compute_unit(gflops: list[float]) -> tuple[float, str]:
    """Returns (GFLOPs per unit, name) of the unit in which the geometric middle is 1 to 1000."""
    middle = np.sqrt(min(gflops) * max(gflops))
    power = int(np.clip(np.log10(middle) // 3, 0, len(UNITS) - 1))
    return 1000.0**power, UNITS[power]


def in_unit(rows: list[dict], unit: float) -> list[dict]:
    """Returns the rows with a column 'compute', the training compute in a unit.

    Args: unit, in GFLOPs, from `compute_unit`.
    """
    return [{**row, "compute": row["train_gflops"] / unit} for row in rows]


def group(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Groups rows by their values in these columns, in the order of the first row of each group."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) for name in names)].append(row)
    return dict(groups)


@dataclasses.dataclass(frozen=True)
class Looks:
    """The color of each size and the marker of each patch size.

    A model without a size has a color for its width. If there are more sizes than colors, all
    models are colored by their width.
    """

    colors: dict[str, str]
    markers: dict[int, str]

    @classmethod
    def of(cls, rows: list[dict]) -> "Looks":
        """Returns the looks for a whole table, so that they are the same in all its figures."""
        names = get_size_names(rows)
        names = [] if len(names) > len(plot_style.COLORS) else names
        widths = {row.get("hidden_size") for row in rows if row.get("size") not in names} - {None}
        names += [f"width {width}" for width in sorted(widths)]
        patches = sorted({row.get("patch_size") for row in rows} - {None})
        return cls(
            dict(zip(names, make_colors(len(names)), strict=True)),
            {p: plot_style.MARKERS[i % len(plot_style.MARKERS)] for i, p in enumerate(patches)},
        )

    @property
    def by_size(self) -> bool:
        """Whether every model is colored by its size."""
        return not any(name.startswith("width ") for name in self.colors)

    def name(self, row: dict) -> str:
        """Returns the size of a row's model, or its width: the key of its color."""
        size = row.get("size")
        return size if size in self.colors else f"width {row['hidden_size']}"

    def color(self, row: dict) -> str:
        """Returns the color of a row's model."""
        return self.colors[self.name(row)]

    def marker(self, row: dict) -> str:
        """Returns the marker of a row's model; a dot without a patch size."""
        return self.markers.get(row.get("patch_size"), ".")

    def legend(self, figure, rows: list[dict], *lines: tuple[str, list]) -> None:
        """Draws a legend of the sizes and patch sizes in these rows below the axes.

        Args: lines, more lines as in `draw_legend`.
        """
        new_line = plot_style.import_matplotlib().lines.Line2D

        # If all entries are widths, the title says so instead of each label.
        drawn = {self.name(row) for row in rows}
        widths = all(name.startswith("width ") for name in drawn)
        sizes = [
            new_line([], [], color=color, label=name.removeprefix("width ") if widths else name)
            for name, color in self.colors.items()
            if name in drawn
        ]
        patches = {row.get("patch_size") for row in rows}
        marks = [
            new_line([], [], color="0.3", linestyle="none", marker=marker, label=f"{patch}")
            for patch, marker in self.markers.items()
            if patch in patches
        ]
        draw_legend(figure, ("width" if widths else "size", sizes), ("patch size", marks), *lines)


def make_colors(count: int) -> tuple[str, ...]:
    """Returns `count` colors: the palette's, or a color ramp if the palette has too few."""
    if count <= len(plot_style.COLORS):
        return plot_style.COLORS[:count]
    matplotlib = plot_style.import_matplotlib()
    ramp = matplotlib.colormaps["viridis"]
    return tuple(matplotlib.colors.to_hex(ramp(i / (count - 1))) for i in range(count))


def draw_legend(figure, *lines: tuple[str, list]) -> None:
    """Draws a legend below the axes; long lines are broken.

    Args: lines, of (title, handles).
    """
    new_line = plot_style.import_matplotlib().lines.Line2D

    # `most` entries fit into a line, if each is as wide as the longest label.
    width, height = figure.get_size_inches()
    letters = max((len(h.get_label()) for _, handles in lines for h in handles), default=0)
    most = max(1, int((width - LEGEND_TITLE) / (LEGEND_ENTRY + LETTER * letters)))
    broken = []
    for title, handles in lines:
        for start in range(0, len(handles), most):
            broken.append(("" if start else title, handles[start : start + most]))
    # matplotlib has no titles inside a legend and fills it by columns. So a title is an entry
    # without a handle, and blank entries fill up short lines.
    blank = new_line([], [], linestyle="none")
    columns = 1 + max(len(handles) for _, handles in broken)
    cells = [
        [(blank, title), *((h, h.get_label()) for h in handles)]
        + [(blank, "")] * (columns - 1 - len(handles))
        for title, handles in broken
    ]
    handles, labels = zip(*(row[i] for i in range(columns) for row in cells), strict=True)
    legend = plot_style.legend(
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
    axes, found: curves.Curve, color: str, marker: str, hollow: bool = False, **options
) -> None:
    """Draws the means, joined by a line, over faint points for the seeds."""
    # A single seed is its own mean, so it gets no second point.
    if several := [p for seeds in found.points.values() if len(seeds) > 1 for p in seeds]:
        plot_style.draw_seeds(axes, several, color)
    edge = dict(markerfacecolor="white", markersize=5) if hollow else EDGE
    axes.plot(*zip(*found.means(), strict=True), color=color, marker=marker, **edge, **options)


def draw_point(axes, at: tuple[float, float], color: str, marker: str) -> None:
    """Draws a single mean, for a line through several models with markers of their own."""
    axes.plot([at[0]], [at[1]], color=color, marker=marker, label="_mean", **EDGE)


def name_quality(axes, rows: list[dict], quality: str, log: bool) -> None:
    """Sets the label of the y axis, with the number of samples.

    Args: log, whether to use a log scale, if the quality is positive and lower is better.
    """
    from_samples = not quality.startswith(selection.LOSSES)
    axes.set_ylabel(plots.axis_label(rows, quality, with_num=from_samples))
    positive = all(row[quality] > 0 for row in rows)
    if log and positive and not quality.startswith(selection.HIGHER):
        plot_style.log_scale(axes.yaxis)


def tick_values(axis, values: set[float]) -> None:
    """Sets ticks at these values if they are at most 6, and far enough apart on a log axis."""
    ordered = sorted(values)
    apart = all(high >= 1.3 * low for low, high in itertools.pairwise(ordered))
    if len(ordered) <= 6 and apart:
        axis.set_ticks(ordered, [f"{value:,}" for value in ordered])
