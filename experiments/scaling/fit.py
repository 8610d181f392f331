"""Command that fits curves of quality against compute to a study's table, with their intervals.

  python -m experiments.scaling.fit --table FILE.csv [--quality eval_mse] [--out fit.json]

Quality is a loss or a distance; lower is better. A fit that needs more points than the table has is
left out, with the reason. The JSON is the result of `fits.fit.fit_study`.
"""

import json

from absl import flags

from dit_jax import cli
from dit_jax.system import files
from experiments.scaling.fits import fit, summary, table

FLAGS = flags.FLAGS


def main(_):
    out = FLAGS.out or FLAGS.table.with_suffix(".fit.json")
    cli.check_out(out, (".json",))
    rows = table.read(FLAGS.table, FLAGS.where or ())
    table.check_quality(rows, FLAGS.quality)
    result = fit.fit_study(rows, FLAGS.quality)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    files.replace_text(out, text)
    print(summary.format_study(result))
    print(f"\n{out}")


if __name__ == "__main__":
    cli.define_path("table", None, "CSV file of the study.", required=True)
    flags.DEFINE_string("quality", "eval_mse", "Column: eval_mse, eval_loss, fd_pixels, fid.")
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows for which this is true.")
    cli.define_path("out", None, "The .json to write; by default NAME.fit.json beside the table.")
    cli.run(main)
