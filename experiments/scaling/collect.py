"""Command that writes the rows of a sweep's cells as one table, and samples of its models.

  python -m experiments.scaling.collect --workdir DIR --out table.csv [--samples samples.npz]
  python -m experiments.scaling.collect --workdir DIR --where cfg_scale=1.5 --out table.csv

The table has the evaluations that the sweep's last run made in each cell. With --where it has all
evaluations in the cells that match, also those by `dit_jax.evaluate`. Evaluations with different
settings are an error. fits/table.py describes the columns. Beside the table, `<out>.cost.json` has
the cost of the cells: its times differ from run to run, and nothing in the table does.
"""

import numpy as np
from absl import flags

from dit_jax import cli
from dit_jax.system import files
from experiments.scaling.cells import collect

FLAGS = flags.FLAGS


def main(_):
    workdir, out = FLAGS.workdir, FLAGS.out
    where = FLAGS.where or ()
    cli.check_out(out, (".csv",))
    if FLAGS.samples:
        cli.check_out(FLAGS.samples, (".npz",), "--samples=")
    lines = collect.write(workdir, out, where)
    print(f"{out}: {len(lines)} rows of {len({line['cell'] for line in lines})} cells")
    if FLAGS.samples:
        arrays = collect.read_samples(workdir, where)
        files.replace(FLAGS.samples, lambda f: np.savez_compressed(f, **arrays))
        print(FLAGS.samples)


if __name__ == "__main__":
    cli.define_path("workdir", None, "Directory of a sweep.", required=True)
    cli.define_path("out", None, "The .csv to write.", required=True)
    cli.define_path("samples", None, "Write samples of all models to this .npz.")
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows of which this is true.")
    cli.run(main)
