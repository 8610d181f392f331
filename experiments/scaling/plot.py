"""Command that draws all figures of a study from its table, each as .png and .svg.

  python -m experiments.scaling.plot --table FILE.csv [--samples FILE.npz] [--out_dir DIR]
    [--qualities eval_mse,fd_pixels,label_accuracy] [--where learning_rate=0.001]

For each quality there are the figures gflops_, compute_, isoflop_, tokens_depth_, extrapolation_,
extrapolation_tokens_, blocks_ and networks_<quality>. With --samples there is also a figure
samples; the .npz has `image` [models, n, H, W, C] uint8, `label` [n] int32 and `cell` [models]. A
figure without rows in the table is left out, and the log gives the reason.
"""

from absl import flags

from dit_jax import cli
from dit_jax.system import npz_files
from experiments.scaling.figures import plot
from experiments.scaling.fits import table

FLAGS = flags.FLAGS


def main(_):
    path = FLAGS.table
    rows = table.read(path, FLAGS.where or (), to_draw=True)
    for quality in FLAGS.qualities:
        table.check_quality(rows, quality)
    arrays = npz_files.read_npz(FLAGS.samples) if FLAGS.samples else None
    out_dir = FLAGS.out_dir or path.parent / "figures"
    for out in plot.write(rows, FLAGS.qualities, arrays, out_dir):
        print(out)


if __name__ == "__main__":
    cli.define_path("table", None, "CSV file of the study.", required=True)
    cli.define_path("samples", None, "An .npz with samples of several models.")
    cli.define_path(
        "out_dir", None, "Directory of the figures; by default figures/ beside the table."
    )
    flags.DEFINE_list("qualities", "eval_mse,fd_pixels,label_accuracy", "Columns of the table.")
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows for which this is true.")
    cli.run(main)
