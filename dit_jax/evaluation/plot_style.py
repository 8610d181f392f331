"""Style of plots: the width of a paper's column, colours for all readers, ticks, and files."""

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
EXTRACTORS = {"dinov2": "DINOv2", "pixels": "pixels"}
WIDTH, HEIGHT, DPI = 3.3, 2.4, 200  # inches: one of two columns
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
# Ticks of a log axis: largest ratio of its ends -> ticks in each decade. None is evenly spaced
# ticks, for less than a decade.
SUBS = {3: None, 10: [1, 1.5, 2, 3, 4, 6, 8], 100: [1, 2, 5], 1000: [1, 3]}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.hashsalt": "dit_jax",  # without it the ids in a file are random
}


def import_matplotlib() -> types.ModuleType:
    """Returns matplotlib, with the modules that figures need.

    The import takes a second, so only functions that draw a figure call this. MPLBACKEND is unset
    meanwhile: it may name a module of a notebook that is not installed. Files need no backend.
    """
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


def label(name: str) -> str:
    """Returns the label of a name in a row: 'fid' is 'FID', 'fd_pixels' is 'FD of pixels'."""
    base, _, extractor = name.rpartition("_")
    if extractor in EXTRACTORS and base:
        return f"{LABELS.get(base, base.replace('_', ' '))} of {EXTRACTORS[extractor]}"
    return LABELS.get(name, name.replace("_", " "))


def count(noun: str, number: int) -> str:
    """Returns '1 token', '4 tokens'."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def literal(text: str) -> str:
    """Returns a name that matplotlib draws unchanged: text between two dollar signs is no formula.

    Control characters such as newlines are drawn as escapes, since no font has them.
    """
    return files.printable(text).replace("$", r"\$")


def legend(owner, handles: Iterable, labels: Iterable[str], **options):
    """Returns the matplotlib Legend of axes or of a figure, with all labels drawn unchanged."""
    labels = list(labels)
    drawn = owner.legend(list(handles), ["label"] * len(labels), **options)
    # Set afterwards, since some versions leave out labels that begin with an underscore.
    for text, label in zip(drawn.texts, labels, strict=True):
        text.set_text(literal(label))
    return drawn


def draw_seeds(axes, points: Iterable[tuple[float, float]], color: str) -> None:
    """Draws faint points, one for each seed, behind their mean."""
    style = dict(color=color, marker=".", linestyle="none", alpha=0.5, markersize=5)
    axes.plot(*zip(*points, strict=True), label="_seeds", **style)


def log_scale(axis, counts: bool = False, room: float = 1.0) -> None:
    """Makes an axis logarithmic, with readable ticks for the range that is drawn.

    Ticks are such as 0.5, 1, 2, or 400k, 1M for counts.
    Args:
      counts: whether the values are counts.
      room: the length of the axis, relative to that of a single plot.
    """
    ticker = import_matplotlib().ticker

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    within_decade, plain = high <= 10 * low, low > 1e-4 and high < 1e5
    # A longer axis has room for more ticks.
    span = (high / low) ** (1 / room)
    if span <= max(SUBS) and (counts or plain):  # else matplotlib's default, powers of ten
        subs = next(s for most, s in SUBS.items() if span <= most)
        even = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        axis.set_major_locator(ticker.LogLocator(subs=subs) if subs else even)
        axis.set_minor_locator(ticker.NullLocator())
    if counts:
        axis.set_major_formatter(ticker.EngFormatter(sep=""))
    elif within_decade and high < 1000:
        axis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))  # 0.20, 0.25
    elif plain:
        axis.set_major_formatter(ticker.FuncFormatter(lambda number, _: f"{number:,.10g}"))


def save(figure, out: pathlib.Path) -> None:
    """Writes a figure as .png or .svg. The same figure gives the same bytes.

    Raises: OSError.
    """
    matplotlib = import_matplotlib()

    # The date and matplotlib's version would change the bytes.
    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}
    options = dict(format=out.suffix[1:], dpi=DPI, metadata=metadata)
    with matplotlib.rc_context(STYLE):
        files.replace(out, lambda file: figure.savefig(file, **options))
