"""Command that trains one cell of a sweep and evaluates its compute points.

  python -m experiments.scaling.cell --config SWEEP --name NAME --workdir DIR

`experiments.scaling.sweep` starts this command for each cell. On a pod it runs in every process.
Run again, it continues an interrupted cell. The cell's directory DIR/NAME is a workdir of
`dit_jax.train` with an additional file `cell.json`.
"""

from absl import flags

from dit_jax import cli
from dit_jax.system import files
from experiments.scaling.cells import cell_run, grid

FLAGS = flags.FLAGS


def main(_):
    config = FLAGS.config
    (cell,) = grid.make_cells(config, FLAGS.name)
    directory = FLAGS.workdir / cell.name
    files.refuse_link(directory)  # a link could make the cell write into any other directory
    cell_run.run(cell, config.evaluate, directory, FLAGS.made)


if __name__ == "__main__":
    cli.define_config(key="grids")
    flags.DEFINE_string("name", None, "Name of the cell.", required=True)
    cli.define_path("workdir", None, "Directory of the sweep.", required=True)
    flags.DEFINE_bool("made", False, "A sweep has made the cell's directory: it must exist.")
    cli.run(
        main,
        kept=lambda: f"what the cell has saved is kept in {FLAGS.workdir / FLAGS.name}",
        stopped_status=cell_run.INTERRUPTED,
        saves=True,
    )
