"""How plots look: a paper's column, colours that all readers tell apart, ticks, files."""

import os
import pathlib
import types
from collections.abc import Iterable

from dit_jax.system import files

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
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "fd": "FD",
    "inception_score": "Inception score",
    "label_accuracy": "label accuracy",
    "bits_per_dim": "bits per dimension",
    "bits_per_latent_dim": "bits per latent dimension",
    "eval_loss": "held-out loss",
    "eval_mse": "held-out MSE",
    "eval_vb": "held-out VB (bits)",
}
EXTRACTORS = {"dinov2": "DINOv2", "pixels": "pixels"}
WIDTH, HEIGHT, DPI = 3.3, 2.4, 200  # inches: a column of two
# Okabe and Ito's, which colour-blind readers tell apart, without their yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
# On a log axis of which the end is so many times the start; less than a decade: None, evenly.
SUBS = {3: None, 10: [1, 1.5, 2, 3, 4, 6, 8], 100: [1, 2, 5], 1000: [1, 3]}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.hashsalt": "dit_jax",  # else ids are random
}


def import_matplotlib() -> types.ModuleType:
    """Returns matplotlib, with the modules of it that figures are drawn with.

    It takes a second, so figures are drawn by functions that call this. MPLBACKEND is set aside
    meanwhile: a notebook's names a module that need not be here, without which matplotlib cannot be
    imported, and figures are only written to files.
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
    """A name for people: 'fid' is 'FID', 'fd_pixels' 'FD of pixels'."""
    base, _, extractor = name.rpartition("_")
    if extractor in EXTRACTORS and base:
        return f"{LABELS.get(base, base.replace('_', ' '))} of {EXTRACTORS[extractor]}"
    return LABELS.get(name, name.replace("_", " "))


def count(noun: str, number: int) -> str:
    """'1 token', '4 tokens'."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def literal(text: str) -> str:
    """A name that matplotlib draws as it is: what lies between two dollar signs is no formula.

    Control characters, newlines among them, are drawn as their escapes: no font has them.
    """
    return files.printable(text).replace("$", r"\$")


def legend(owner, handles: Iterable, labels: Iterable[str], **options):
    """The matplotlib Legend of axes or of a figure, with all these labels as they are."""
    labels = list(labels)
    drawn = owner.legend(list(handles), ["label"] * len(labels), **options)
    # Later, since some versions leave out a label that begins with an underscore.
    for text, label in zip(drawn.texts, labels, strict=True):
        text.set_text(literal(label))
    return drawn


def draw_seeds(axes, points: Iterable[tuple[float, float]], color: str) -> None:
    """Faint points, one to a seed, behind their mean."""
    style = dict(color=color, marker=".", linestyle="none", alpha=0.5, markersize=5)
    axes.plot(*zip(*points, strict=True), label="_seeds", **style)


def log_scale(axis, counts: bool = False, room: float = 1.0) -> None:
    """A log axis with readable ticks for what is drawn: 0.5, 1, 2; of counts 400k, 1M.

    Args: room: length of the axis, in those of a single one.
    """
    ticker = import_matplotlib().ticker

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    near, plain = high <= 10 * low, low > 1e-4 and high < 1e5
    crowd = (high / low) ** (1 / room)
    if crowd <= max(SUBS) and (counts or plain):  # else powers of ten
        subs = next(s for most, s in SUBS.items() if crowd <= most)
        even = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        axis.set_major_locator(ticker.LogLocator(subs=subs) if subs else even)
        axis.set_minor_locator(ticker.NullLocator())
    if counts:
        axis.set_major_formatter(ticker.EngFormatter(sep=""))
    elif near and high < 1000:
        axis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))  # 0.20, 0.25
    elif plain:
        axis.set_major_formatter(ticker.FuncFormatter(lambda number, _: f"{number:,.10g}"))


def save(figure, out: pathlib.Path) -> None:
    """Writes a figure as .png or .svg: the same bytes for the same figure.   Raises: OSError."""
    matplotlib = import_matplotlib()

    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}
    options = dict(format=out.suffix[1:], dpi=DPI, metadata=metadata)
    with matplotlib.rc_context(STYLE):
        files.replace(out, lambda file: figure.savefig(file, **options))
