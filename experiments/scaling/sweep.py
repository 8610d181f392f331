"""Command that runs the cells of a sweep that are not done yet, each in its own workdir.

  python -m experiments.scaling.sweep --config experiments/scaling/configs/smoke.py --workdir DIR
  python -m experiments.scaling.sweep --config ... --workdir DIR --parallel 8     # one per GPU
  python -m experiments.scaling.sweep --config ... --workdir DIR --executor slurm
  python -m experiments.scaling.sweep --config ... --workdir DIR --executor print # the commands
  python -m experiments.scaling.sweep --config ... --workdir DIR --list           # what is done

A cell is trained and evaluated. A killed sweep continues when it is run again. Failed cells are
skipped unless --retry_failed is given. At the end DIR/table.csv has the table that
`experiments.scaling.collect` makes of the cells.
"""

import collections
import logging
import shlex
import sys

from absl import flags

from dit_jax import cli
from dit_jax.errors import UserError
from dit_jax.system import files, stopping
from experiments.scaling.cells import cell, collect, grid, sweep

logger = logging.getLogger("dit_jax")

FLAGS = flags.FLAGS


def main(_):
    config, workdir = FLAGS.config, FLAGS.workdir.absolute()
    cells = grid.make_cells(config)
    if FLAGS.list:
        print(sweep.format_cells(config, cells, workdir))
        return
    if workdir.is_dir():
        files.check_tree(workdir, links=False)  # before anything is written into a cell's directory
    left = sweep.list_waiting(config, cells, workdir, FLAGS.retry_failed)
    commands = {c.name: sweep.make_command(FLAGS["config"].words(), c.name, workdir) for c in left}
    # Printed commands are for other machines, so the data and the extractor are not checked here.
    if FLAGS.executor == "print":
        for words in commands.values():
            print(shlex.join(["python", *words]))
        return
    # Errors of data, extractor or directories come before any cell starts.
    commands = {name: [sys.executable, *words] for name, words in commands.items()}
    sweep.check(config.evaluate, left, workdir)
    for one in left:
        cell.forget_failure(one, config.evaluate, workdir / one.name)
    counts = collections.Counter(
        cell.get_state(c, config.evaluate, workdir / c.name) for c in cells
    )
    logger.info("%d cells: %s", len(cells), ", ".join(f"{n} {s}" for s, n in counts.items()))
    if FLAGS.executor == "slurm":
        sweep.submit(config, commands, workdir)
        return
    # `sweep.run` makes the directories. A cell must not make its own again after a move.
    commands = {name: [*words, "--made"] for name, words in commands.items()}
    sweep.run(config, left, commands, workdir, FLAGS.parallel)
    # The table is written only if all cells are done; otherwise an error lists the others.
    failed = [c for c in cells if cell.get_state(c, config.evaluate, workdir / c.name) == "failed"]
    if failed:
        lines = [f"  {c.name}: {cell.get_error(workdir / c.name)}" for c in failed]
        raise UserError("these cells failed:\n" + "\n".join(lines) + "\n--retry_failed runs them.")
    if unfinished := sweep.list_waiting(config, cells, workdir):
        logs = "\n".join(f"  {c.name}: see {workdir / c.name / 'log.txt'}" for c in unfinished)
        with stopping.attach_kept_message(_describe_kept):
            raise UserError(f"these cells were interrupted:\n{logs}")
    rows = collect.write(workdir, workdir / "table.csv", cells=[c.name for c in cells])
    print(f"{workdir / 'table.csv'}: {len(rows)} rows of {len(cells)} cells")


def _describe_kept():
    """Returns the sentence that tells the user what is kept when the sweep ends early."""
    return f"what the cells have saved is kept in {FLAGS.workdir}"


if __name__ == "__main__":
    cli.define_config(key="grids")
    cli.define_path("workdir", None, "Directory of the sweep.", required=True)
    flags.DEFINE_enum(
        "executor",
        "local",
        ["local", "slurm", "print"],
        "local: here; slurm: a job to a cell; print: the commands, for another scheduler.",
    )
    flags.DEFINE_integer(
        "parallel", 1, "Cells at a time of executor local, each on a device of its own.", 1
    )
    flags.DEFINE_bool("retry_failed", False, "Run cells again that failed.")
    flags.DEFINE_bool("list", False, "Show all cells, what they cost and what is done.")
    cli.run(main, kept=_describe_kept, on_cpu=True)
