"""A plot of rows that `dit_jax.evaluate` wrote: curves of one measure, as wide as a paper's column.

  python -m dit_jax.plot --rows 'runs/*/evaluations.jsonl' --x cfg_scale --y fid --out fid.png
  python -m dit_jax.plot --rows runs/dit/evaluations.jsonl --x steps --y fid --out steps.png
  python -m dit_jax.plot --rows runs/dit/evaluations.jsonl --x recall --y precision --out pr.png

--x, --y and --where take names in a row or in its 'sample': fid, step (of training), steps (of
sampling), cfg_scale, sampler, and 'workdir'. Rows that differ in any other value make separate
curves; several seeds are averaged. A curve of one measure against another joins its points in
the order of cfg_scale, which is written beside them. In a plot of a measure against gmacs or params
the points are named by their workdirs.
"""

from absl import flags

from dit_jax import cli
from dit_jax.evaluation import plots, queries
from dit_jax.system import files

FLAGS = flags.FLAGS


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png", ".svg"))
    # --rows may be repeated, and each may have several patterns.
    patterns = [pattern for text in FLAGS.rows for pattern in text.split(",")]
    rows = queries.read(str(files.to_path(pattern, "--rows")) for pattern in patterns)
    for condition in FLAGS.where or ():
        rows = queries.select(rows, condition)
    plots.plot(rows, FLAGS.x, FLAGS.y, out)
    print(out)


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "rows", None, "Files or globs of evaluations.jsonl; again, or with commas.", required=True
    )
    flags.DEFINE_string("x", None, "Name in a row: step, images_seen, cfg_scale.", required=True)
    flags.DEFINE_string("y", None, "Name in a row: fid, precision, fd_dinov2.", required=True)
    cli.define_path("out", None, "A .png or .svg.", required=True)
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows of which this is true.")
    cli.run(main)
