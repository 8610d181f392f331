"""A plot of one measure against another value, from rows that `dit_jax.evaluate` wrote.

  python -m dit_jax.plot --rows 'runs/*/evaluations.jsonl' --x cfg_scale --y fid --out fid.png
  python -m dit_jax.plot --rows runs/dit/evaluations.jsonl --x steps --y fid --out steps.png
  python -m dit_jax.plot --rows runs/dit/evaluations.jsonl --x recall --y precision --out pr.png

--x, --y and --where take the names of values in a row or in its settings: fid, step (of training),
steps (of sampling), cfg_scale, sampler, and 'workdir'. Rows that differ in another setting make
separate curves; a point is the mean of its seeds. A curve of one measure against another joins its
points in the order of cfg_scale, which is written beside them. In a plot of a measure against gmacs
or params, workdirs are written beside the points.
"""

from absl import flags

from dit_jax import cli
from dit_jax.evaluation import plots, queries
from dit_jax.system import files

FLAGS = flags.FLAGS


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png", ".svg"))
    # --rows may be repeated, and each value may have several patterns.
    patterns = [pattern for value in FLAGS.rows for pattern in value.split(",")]
    rows = queries.read(str(files.to_path(pattern, "--rows")) for pattern in patterns)
    for condition in FLAGS.where or ():
        rows = queries.select(rows, condition)
    plots.plot(rows, FLAGS.x, FLAGS.y, out)
    print(out)


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "rows",
        None,
        "Files or globs of evaluations.jsonl, with commas; may be repeated.",
        required=True,
    )
    flags.DEFINE_string("x", None, "Name in a row: step, images_seen, cfg_scale.", required=True)
    flags.DEFINE_string("y", None, "Name in a row: fid, precision, fd_dinov2.", required=True)
    cli.define_path("out", None, "A .png or .svg.", required=True)
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: plot only rows with these values.")
    cli.run(main)
