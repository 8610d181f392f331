"""Which rows of a study's table make which points, and how a model looks in all of the figures.

A color is a size of model, a marker a patch size; a point is the mean of the seeds, which are
faint beside it.
"""

import collections
import dataclasses
import itertools

import numpy as np

from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style, plots
from experiments.scaling.fits import selection

WIDE = 6.8  # inches: both columns
UNITS = ("GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs", "YFLOPs")
EDGE = dict(markeredgecolor="white", markeredgewidth=0.4)  # parts markers that overlap
# Inches: of a line, a title, a handle and a letter.
LEGEND_LINE, LEGEND_TITLE, LEGEND_ENTRY, LETTER = 0.17, 0.85, 0.27, 0.062


class LackingError(UserError):
    """The table has no rows for a figure."""


def measured(rows: list[dict], *names: str) -> list[dict]:
    """The rows with values of all of these.   Raises: LackingError if there is none."""
    found = [row for row in rows if all(row.get(name) is not None for name in names)]
    if not found:
        absent = [name for name in names if all(row.get(name) is None for row in rows)]
        raise LackingError(f"no row has {' and '.join(absent) or ' with '.join(names)}")
    return found


def standard(rows: list[dict]) -> list[dict]:
    """The rows of the models that are one to a size and patch size.

    These are of the most common block, and of a size's most common depth and width: the others
    are there to be compared with them. Raises: LackingError, also for several networks.
    """
    if len(found := {row.get("network") for row in rows}) > 1:
        raise LackingError(f"the rows are of {len(found)} networks, which networks_ compares")
    rows = of_block(measured(rows, "size", "patch_size"))
    shapes = collections.defaultdict(collections.Counter)
    for row in rows:
        shapes[row["size"]][_built(row)] += 1
    return [row for row in rows if _built(row) == shapes[row["size"]].most_common(1)[0][0]]


def sizes_of(rows: list[dict]) -> list[str]:
    """The names of the sizes, the one of the fewest parameters first; [] where rows have none."""
    try:
        found = sorted(standard(rows), key=lambda row: row.get("params") or 0)
    except LackingError:
        return []
    return list(dict.fromkeys(row["size"] for row in found))


def of_block(rows: list[dict]) -> list[dict]:
    """The rows of the most common block."""
    ((block, _),) = collections.Counter(row.get("block") for row in rows).most_common(1)
    return [row for row in rows if row.get("block") == block]


def _built(row):
    return row.get("depth"), row.get("hidden_size")


def complete(rows: list[dict], quality: str) -> list[dict]:
    """The comparable rows of which `selection.average` makes its means.   Raises: LackingError."""
    rows = selection.comparable(measured(rows, quality, "step"), quality)
    kept = {(selection.model_of(row), row["step"]) for row in selection.average(rows, quality)}
    return [row for row in rows if (selection.model_of(row), row["step"]) in kept]


def at_last_step(rows: list[dict], quality: str) -> list[dict]:
    """The comparable rows at the last step that most models have.   Raises: LackingError."""
    rows = selection.comparable(measured(rows, quality, "step"), quality)
    return selection.at_step(rows, selection.last_step(rows))


def curve(rows: list[dict], x: str, y: str) -> plots.Curve:
    """A point for each x, of all seeds, in the order of x."""
    points = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row[x]):
        points[row[x]].append((row[x], row[y]))
    return plots.Curve("", dict(points))


def compute_unit(gflops: list[float]) -> tuple[float, str]:
    """(GFLOPs in it, its name) of the unit in which the middle of these is in 1 to 1000."""
    middle = np.sqrt(min(gflops) * max(gflops))
    power = int(np.clip(np.log10(middle) // 3, 0, len(UNITS) - 1))
    return 1000.0**power, UNITS[power]


def in_unit(rows: list[dict], unit: float) -> list[dict]:
    """The rows with their 'compute', that of training in this unit of `compute_unit`."""
    return [{**row, "compute": row["train_gflops"] / unit} for row in rows]


def group(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """The rows by their values of these, in the order of their first ones."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) for name in names)].append(row)
    return dict(groups)


@dataclasses.dataclass(frozen=True)
class Looks:
    """The color of each size and the marker of each patch size.

    Models without a size have that of their width; so have all, where there are more sizes than
    colors.
    """

    colors: dict[str, str]
    markers: dict[int, str]

    @classmethod
    def of(cls, rows: list[dict]) -> "Looks":
        """Of all of a table, so that they are the same in all figures."""
        names = sizes_of(rows)
        names = [] if len(names) > len(plot_style.COLORS) else names
        widths = {row.get("hidden_size") for row in rows if row.get("size") not in names} - {None}
        names += [f"width {width}" for width in sorted(widths)]
        patches = sorted({row.get("patch_size") for row in rows} - {None})
        return cls(
            dict(zip(names, colors_of(len(names)), strict=True)),
            {p: plot_style.MARKERS[i % len(plot_style.MARKERS)] for i, p in enumerate(patches)},
        )

    @property
    def by_size(self) -> bool:
        """Whether each size has a color of its own."""
        return not any(name.startswith("width ") for name in self.colors)

    def name(self, row: dict) -> str:
        """The size of a row's model, or its width."""
        size = row.get("size")
        return size if size in self.colors else f"width {row['hidden_size']}"

    def color(self, row: dict) -> str:
        return self.colors[self.name(row)]

    def marker(self, row: dict) -> str:
        return self.markers.get(row.get("patch_size"), ".")

    def legend(self, figure, rows: list[dict], *lines: tuple[str, list]) -> None:
        """Below the axes: the sizes, the patch sizes of these rows, and lines as `draw_legend`."""
        new_line = plot_style.import_matplotlib().lines.Line2D

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


def colors_of(count: int) -> tuple[str, ...]:
    """The palette; of more than it has a ramp."""
    if count <= len(plot_style.COLORS):
        return plot_style.COLORS[:count]
    matplotlib = plot_style.import_matplotlib()
    ramp = matplotlib.colormaps["viridis"]
    return tuple(matplotlib.colors.to_hex(ramp(i / (count - 1))) for i in range(count))


def draw_legend(figure, *lines: tuple[str, list]) -> None:
    """A legend below the axes, of lines of (title, handles); long lines are broken."""
    new_line = plot_style.import_matplotlib().lines.Line2D

    width, height = figure.get_size_inches()
    letters = max((len(h.get_label()) for _, handles in lines for h in handles), default=0)
    most = max(1, int((width - LEGEND_TITLE) / (LEGEND_ENTRY + LETTER * letters)))  # of a line
    broken = []
    for title, handles in lines:
        for start in range(0, len(handles), most):
            broken.append(("" if start else title, handles[start : start + most]))
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
    for text in legend.texts[: len(broken)]:  # the titles, over their own empty handles
        text.set_color("0.3")
    figure.set_size_inches(width, height + LEGEND_LINE * len(broken))


def new_figure(panels: int = 1, sharex: bool = False, sharey: bool = False):
    """A figure, and its axes [panels], to be drawn within `matplotlib.rc_context(style.STYLE)`."""
    matplotlib = plot_style.import_matplotlib()

    width = plot_style.WIDTH if panels == 1 else WIDE
    figure = matplotlib.figure.Figure(figsize=(width, plot_style.HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharex=sharex, sharey=sharey)[0])


def draw_curve(
    axes, found: plots.Curve, color: str, marker: str, hollow: bool = False, **options
) -> None:
    """The means, joined, over the faint points of seeds."""
    if several := [p for seeds in found.points.values() if len(seeds) > 1 for p in seeds]:
        plot_style.draw_seeds(axes, several, color)
    edge = dict(markerfacecolor="white", markersize=5) if hollow else EDGE
    axes.plot(*zip(*found.means(), strict=True), color=color, marker=marker, **edge, **options)


def draw_point(axes, at: tuple[float, float], color: str, marker: str) -> None:
    """A mean alone, where a line is of several models."""
    axes.plot([at[0]], [at[1]], color=color, marker=marker, label="_mean", **EDGE)


def name_quality(axes, rows: list[dict], quality: str, log: bool) -> None:
    """The label of the y axis, with the number of samples, and a log scale where it can be."""
    of_samples = not quality.startswith(selection.LOSSES)
    axes.set_ylabel(plots.axis_label(rows, quality, with_num=of_samples))
    positive = all(row[quality] > 0 for row in rows)
    if log and positive and not quality.startswith(selection.HIGHER):
        plot_style.log_scale(axes.yaxis)


def tick_values(axis, values: set[float]) -> None:
    """Ticks at these, where they are few and far enough apart on a log axis."""
    ordered = sorted(values)
    apart = all(high >= 1.3 * low for low, high in itertools.pairwise(ordered))
    if len(ordered) <= 6 and apart:
        axis.set_ticks(ordered, [f"{value:,}" for value in ordered])
