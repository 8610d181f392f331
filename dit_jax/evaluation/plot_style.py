"""Style of plots: their size, colours, labels, ticks, legends and files."""

import os
import pathlib
import types
from collections.abc import Iterable

from dit_jax.evaluation import measures
from dit_jax.system import files

# Name in a row -> its label in a plot.
LABELS = {
    "step": "training steps",
    "images_seen": "training images seen",
    "train_gflops": "training compute (GFLOPs)",
    "seconds": "training time (s)",
    "img_per_s": "training images per second",
    "gmacs": "multiply-adds of one pass (G)",
    "params": "parameters",
    "tokens": "tokens of an image",
    "depth": "depth (blocks)",
    "num": "samples",
    "steps": "sampling steps",
    "cfg_scale": "guidance scale",
    "eval_loss": "held-out loss",
    "eval_mse": "held-out MSE",
    "eval_vb": "held-out VB (bits)",
    **{name: measure.label for name, measure in measures.MEASURES.items()},
}
EXTRACTOR_LABELS = {"dinov2": "DINOv2", "pixels": "pixels"}
WIDTH, HEIGHT, DPI = 3.3, 2.4, 200  # inches, for one of a paper's two columns
# The colours of Okabe and Ito without yellow. Colour-blind readers can tell them apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
# The largest ratio of a log axis's ends -> the ticks in each decade; None for evenly spaced ticks.
LOG_TICKS = {3: None, 10: [1, 1.5, 2, 3, 4, 6, 8], 100: [1, 2, 5], 1000: [1, 3]}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.hashsalt": "dit_jax",  # makes the ids in a file the same in every run
}


def import_matplotlib() -> types.ModuleType:
    """Imports matplotlib with the modules that figures need, and returns it.

    The import takes a second, so only functions that draw a figure call this.
    """
    # The backend that a notebook sets may not be installed here, and files need none.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def get_label(name: str) -> str:
    """Returns the label for a name in a row: 'FID' for 'fid', 'FD of pixels' for 'fd_pixels'."""
    base, _, extractor = name.rpartition("_")
    if extractor in EXTRACTOR_LABELS and base:
        return f"{get_label(base)} of {EXTRACTOR_LABELS[extractor]}"
    return LABELS.get(name, name.replace("_", " "))


def format_count(noun: str, count: int) -> str:
    """Returns '1 token', '4 tokens'."""
    return f"{count:,} {noun if count == 1 else f'{noun}s'}"


def escape(text: str) -> str:
    """Escapes a name so that matplotlib does not take text between dollar signs for a formula.

    Control characters such as newlines, which no font has, become visible escapes.
    """
    return files.printable(text).replace("$", r"\$")


def draw_legend(owner, handles: Iterable, labels: Iterable[str], **options):
    """Draws the legend of axes or of a figure, with escaped labels; returns the Legend."""
    labels = list(labels)
    legend = owner.legend(list(handles), ["label"] * len(labels), **options)
    # Set afterwards, because some versions leave out labels that begin with an underscore.
    for text, label in zip(legend.texts, labels, strict=True):
        text.set_text(escape(label))
    return legend


def draw_seeds(axes, points: Iterable[tuple[float, float]], color: str) -> None:
    """Draws a faint point for each seed."""
    style = dict(color=color, marker=".", linestyle="none", alpha=0.5, markersize=5)
    axes.plot(*zip(*points, strict=True), label="_seeds", **style)


def set_log_scale(axis, counts: bool = False, room: float = 1.0) -> None:
    """Makes an axis logarithmic, with ticks that suit the range of the drawn values.

    Args:
      counts: whether the values are counts, whose ticks are such as 400k and 1M.
      room: the length of the axis, relative to the axis of a plot with one panel.
    """
    ticker = import_matplotlib().ticker

    if axis.axis_name == "x":
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    low, high = axis.get_view_interval()
    needs_no_exponent = low > 1e-4 and high < 1e5
    # A longer axis has room for more ticks.
    span = (high / low) ** (1 / room)
    # Matplotlib's default, powers of ten, suits the other ranges.
    if span <= max(LOG_TICKS) and (counts or needs_no_exponent):
        ticks = next(ticks for largest, ticks in LOG_TICKS.items() if span <= largest)
        evenly_spaced = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        axis.set_major_locator(ticker.LogLocator(subs=ticks) if ticks else evenly_spaced)
        axis.set_minor_locator(ticker.NullLocator())
    if counts:
        axis.set_major_formatter(ticker.EngFormatter(sep=""))
    elif high <= 10 * low and high < 1000:
        axis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))  # 0.20, 0.25
    elif needs_no_exponent:
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))


def save(figure, out: pathlib.Path) -> None:
    """Writes a figure as .png or .svg. The same figure gives the same bytes.

    Raises: OSError if the file cannot be written.
    """
    matplotlib = import_matplotlib()

    # The date and matplotlib's version would change the bytes.
    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}
    options = dict(format=out.suffix[1:], dpi=DPI, metadata=metadata)
    with matplotlib.rc_context(STYLE):
        files.replace(out, lambda file: figure.savefig(file, **options))
