"""Command that trains one cell of a sweep and evaluates its compute points, or continues that.

  python -m experiments.scaling.cell --config SWEEP --name NAME --workdir DIR

`experiments.scaling.sweep` starts this command for each cell. On a pod it runs in every process.
The cell's directory DIR/NAME is a workdir of `dit_jax.train` with an additional file `cell.json`.
"""

from absl import flags

from dit_jax import cli
from dit_jax.system import files
from experiments.scaling.cells import cell, grid

FLAGS = flags.FLAGS


def main(_):
    config = FLAGS.config
    (one,) = grid.make_cells(config, FLAGS.name)
    directory = FLAGS.workdir / one.name
    files.refuse_link(directory)  # a link could make the cell write into any other directory
    cell.run(one, config.evaluate, directory, FLAGS.made)


if __name__ == "__main__":
    cli.define_config(key="grids")
    flags.DEFINE_string("name", None, "Of the cell.", required=True)
    cli.define_path("workdir", None, "Directory of the sweep.", required=True)
    flags.DEFINE_bool("made", False, "A sweep has made the cell's directory: it must be there.")
    cli.run(
        main,
        kept=lambda: f"what the cell has saved is kept in {FLAGS.workdir / FLAGS.name}",
        stopped_status=cell.INTERRUPTED,
        saves=True,
    )
