"""Command that writes the table of a sweep, and samples of its models.

  python -m experiments.scaling.collect --workdir DIR --out table.csv [--samples samples.npz]
  python -m experiments.scaling.collect --workdir DIR --where cfg_scale=1.5 --out table.csv

The table has the evaluations that the sweep's last run made in each cell. With --where it has all
matching evaluations in the cells, also those by `dit_jax.evaluate`. Evaluations with different
settings are an error. fits/table.py describes the columns.

The cost of the cells is in `<out>.cost.json` beside the table. Its times differ from run to run;
nothing in the table does.
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
    rows = collect.write(workdir, out, where)
    print(f"{out}: {len(rows)} rows of {len({row['cell'] for row in rows})} cells")
    if FLAGS.samples:
        arrays = collect.read_samples(workdir, where)
        files.replace(FLAGS.samples, lambda f: np.savez_compressed(f, **arrays))
        print(FLAGS.samples)


if __name__ == "__main__":
    cli.define_path("workdir", None, "Directory of the sweep.", required=True)
    cli.define_path("out", None, "The .csv to write.", required=True)
    cli.define_path("samples", None, "Write samples of all models to this .npz.")
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows for which this is true.")
    cli.run(main)
