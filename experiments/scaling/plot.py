"""The figures of a study from its table, each as .png and .svg.

  python -m experiments.scaling.plot --table FILE.csv [--samples FILE.npz] [--out_dir DIR]
    [--qualities eval_mse,fd_pixels,label_accuracy] [--where learning_rate=0.001]

gflops_, compute_, isoflop_, tokens_depth_, extrapolation_, extrapolation_tokens_, blocks_ and
networks_<quality>; and samples, of the arrays of --samples: `image` [models, n, H, W, C] uint8,
`label` [n] int32, `cell` [models]. A figure that the table has no rows for is left out, and the log
says why.
"""

import functools
import logging
import pathlib

from absl import flags

from dit_jax import cli
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style, plots
from dit_jax.system import npz_files
from experiments.scaling import curves, looks, panels, samples, selection, table

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")

FIGURES = {
    "gflops": curves.draw_gflops,
    "compute": curves.draw_compute,
    "isoflop": curves.draw_isoflop,
    "tokens_depth": panels.draw_tokens_depth,
    "extrapolation": curves.draw_extrapolation,
    "extrapolation_tokens": curves.draw_extrapolation_tokens,
    "blocks": panels.draw_blocks,
    "networks": panels.draw_networks,
}


def write(rows: list[dict], qualities: list[str], arrays: dict | None, out_dir: pathlib.Path):
    """Writes all figures that there are rows for; their paths.

    Args: arrays: of the samples, or None.
    Raises: ValueError if there is none, or as `selection.comparable`; OSError.
    """
    drawn, reasons = [], []
    for quality in qualities:
        if missing := sum(row.get(quality) is None for row in rows):
            logger.info("%d of %d rows have no %s: left out.", missing, len(rows), quality)
        if missing < len(rows):  # refused before anything is written
            selection.comparable(rows, quality, across=("network", "block"))
    todo = {
        f"{name}_{quality}": functools.partial(draw, rows, quality)
        for quality in qualities
        for name, draw in FIGURES.items()
    }
    if arrays is not None:
        todo["samples"] = functools.partial(samples.draw_samples, rows, arrays)
    for name, draw in todo.items():
        try:
            figure = draw()
        except looks.LackingError as error:
            reasons.append(f"{name}: {error}")
            logger.info("no %s: %s.", name, error)
            continue
        for suffix in (".png", ".svg"):
            out = out_dir / (name + suffix)
            cli.check_out(out, (suffix,))
            plot_style.save(figure, out)
            drawn.append(out)
    if not drawn:
        raise UserError("nothing to draw:\n  " + "\n  ".join(reasons))
    return drawn


def main(_):
    path = FLAGS.table
    rows = table.read(path)
    for line, row in enumerate(rows, 2):
        plots.check_drawable(f"{path}:{line}", row)
    for condition in FLAGS.where or ():
        rows = plots.where(rows, condition)
    arrays = npz_files.read_npz(FLAGS.samples) if FLAGS.samples else None
    out_dir = FLAGS.out_dir or path.parent / "figures"
    for out in write(rows, FLAGS.qualities, arrays, out_dir):
        print(out)


if __name__ == "__main__":
    cli.define_path("table", None, "Of experiments.scaling.collect.", required=True)
    cli.define_path("samples", None, "An .npz of images of several models.")
    cli.define_path("out_dir", None, "Of the figures; by default figures beside the table.")
    flags.DEFINE_list("qualities", "eval_mse,fd_pixels,label_accuracy", "Columns of the table.")
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows of which this is true.")
    cli.run(main)
