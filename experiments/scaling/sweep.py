"""Command that runs the unfinished cells of a sweep, each in its own workdir.

  python -m experiments.scaling.sweep --config experiments/scaling/configs/smoke.py --workdir DIR
  python -m experiments.scaling.sweep --config ... --workdir DIR --parallel 8     # one per GPU
  python -m experiments.scaling.sweep --config ... --workdir DIR --executor slurm
  python -m experiments.scaling.sweep --config ... --workdir DIR --executor print # the commands
  python -m experiments.scaling.sweep --config ... --workdir DIR --list           # what is done

A cell is trained and evaluated. A killed sweep continues when it is run again, without its failed
cells unless --retry_failed is given. At the end, DIR/table.csv has the table that
`experiments.scaling.collect` makes.
"""

import collections
import logging
import shlex
import sys

from absl import flags

from dit_jax import cli
from dit_jax.errors import UserError
from dit_jax.system import files, stopping
from experiments.scaling.cells import cell_run, collect, grid, sweep

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
    waiting = sweep.list_waiting(config, cells, workdir, FLAGS.retry_failed)
    commands = sweep.make_commands(FLAGS["config"].words(), waiting, workdir)
    # Printed commands are for other machines, so the data and the extractor are not checked here.
    if FLAGS.executor == "print":
        for words in commands.values():
            print(shlex.join(["python", *words]))
        return
    # Errors of data, extractor or directories come before any cell starts.
    commands = {name: [sys.executable, *words] for name, words in commands.items()}
    sweep.check(config.evaluate, waiting, workdir)
    for cell in waiting:
        cell_run.forget_failure(cell, config.evaluate, workdir / cell.name)
    states = sweep.get_states(config, cells, workdir)
    counts = collections.Counter(states.values()).items()
    logger.info("%d cells: %s", len(cells), ", ".join(f"{n} {state}" for state, n in counts))
    if FLAGS.executor == "slurm":
        sweep.submit(config, commands, workdir)
        return
    # `sweep.run` makes the directories. A cell must not make its own again after a move.
    commands = {name: [*words, "--made"] for name, words in commands.items()}
    sweep.run(config, waiting, commands, workdir, FLAGS.parallel)
    # The table is written only if all cells are done; otherwise an error lists the others.
    states = sweep.get_states(config, cells, workdir)
    if failed := [name for name, state in states.items() if state == "failed"]:
        lines = [f"  {name}: {cell_run.get_error(workdir / name)}" for name in failed]
        lines = ["these cells failed:", *lines, "--retry_failed runs them again."]
        raise UserError("\n".join(lines))
    if unfinished := [name for name, state in states.items() if state != "done"]:
        logs = "\n".join(f"  {name}: see {workdir / name / 'log.txt'}" for name in unfinished)
        with stopping.attach_kept_message(_describe_kept):
            raise UserError(f"these cells were interrupted:\n{logs}")
    rows = collect.write(workdir, workdir / "table.csv", cells=list(states))
    print(f"{workdir / 'table.csv'}: {len(rows)} rows of {len(cells)} cells")


def _describe_kept():
    """Returns the message that says what is kept when the sweep ends early."""
    return f"what the cells have saved is kept in {FLAGS.workdir}"


if __name__ == "__main__":
    cli.define_config(key="grids")
    cli.define_path("workdir", None, "Directory of the sweep.", required=True)
    flags.DEFINE_enum(
        "executor",
        "local",
        ["local", "slurm", "print"],
        "local: here; slurm: one job per cell; print: the commands, for another scheduler.",
    )
    flags.DEFINE_integer(
        "parallel", 1, "Cells that executor local runs at a time, each on its own device.", 1
    )
    flags.DEFINE_bool("retry_failed", False, "Run failed cells again.")
    flags.DEFINE_bool("list", False, "Show all cells, their cost and their state.")
    cli.run(main, kept=_describe_kept, on_cpu=True)
