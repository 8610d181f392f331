"""The execution of a sweep: its unfinished cells run here, or are submitted to Slurm."""

import json
import logging
import pathlib
import re

from ml_collections import ConfigDict

from dit_jax import latents
from dit_jax.errors import UserError
from dit_jax.system import files, json_files, stopping
from experiments.scaling.cells import cell_run, executors, grid

logger = logging.getLogger("dit_jax")

MOST_JOB_BYTES = 64  # bytes of a file `job`, which holds an id such as 123_4


def list_waiting(
    sweep: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path, retry_failed: bool = False
) -> list[grid.Cell]:
    """Returns the cells that are not done; failed cells only with retry_failed."""
    states = get_states(sweep, cells, workdir)
    skipped = ("done",) if retry_failed else ("done", "failed")
    return [cell for cell in cells if states[cell.name] not in skipped]


def get_states(sweep: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path) -> dict[str, str]:
    """Returns the state of each cell by its name, as `cell_run.get_state`."""
    return {
        cell.name: cell_run.get_state(cell, sweep.evaluate, workdir / cell.name) for cell in cells
    }


def check(evaluation: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path) -> None:
    """Raises if the data, the extractor or a cell's directory would make a cell fail.

    Args: evaluation, `config.evaluate` of the sweep.
    Raises: as `latents.open_split` and `cell_run.load_extractor`; ValueError that lists the cells
      whose directory has a run of another config.
    """
    if evaluation.num and cells:
        cell_run.load_extractor(evaluation)
    # Many cells share their data, so each config of the data is opened only once.
    metadata, problems = {}, []
    for cell in cells:
        data_config = json.dumps([cell.config.data.to_dict(), cell.config.latents.to_dict()])
        if data_config not in metadata:
            metadata[data_config] = latents.open_split(cell.config, "train").metadata
        try:
            cell_run.check(cell, workdir / cell.name, metadata[data_config])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def run(
    sweep: ConfigDict, cells: list[grid.Cell], commands: dict, workdir: pathlib.Path, parallel: int
) -> None:
    """Runs cells on this machine, and records a cell whose process died as failed.

    Args: commands, by the cell's name.   parallel: how many cells run at a time.
    Raises: ValueError if the workdir's name is not in UTF-8; stopping.Stopped after a signal, once
      the running cells have ended.
    """
    files.check_utf8(workdir)
    # The directories are made now, because the logs are in them.
    by_name = {cell.name: cell for cell in cells}
    logs = {name: workdir / name / "log.txt" for name in by_name}
    for log in logs.values():
        log.parent.mkdir(parents=True, exist_ok=True)
    for name in by_name:
        if cell_run.is_running(workdir / name):
            logger.warning("%s: another process runs it; this sweep waits for its end.", name)
    left = len(cells)
    runs = executors.run_local(commands, logs, parallel)
    with files.Directory(workdir) as sweep_directory:
        for name, status in runs:
            sweep_directory.check()
            cell, directory = by_name[name], workdir / name
            # A cell records its own errors, unless it was killed, as by a lack of memory.
            if status and not runs.stopped and status != cell_run.INTERRUPTED:
                message = f"its process ended with status {status}; see {logs[name]}"
                cell_run.record_failure(cell, sweep.evaluate, directory, message)
            left -= 1
            state = _describe_state(sweep, cell, workdir)
            logger.info("%s  %s, %d cells left", name, state, left)
    if runs.stopped:
        raise stopping.Stopped(runs.stopped, f"what the cells have saved is kept in {workdir}")


def make_commands(
    config_flags: list[str], cells: list[grid.Cell], workdir: pathlib.Path
) -> dict[str, executors.Command]:
    """Returns the arguments of `python` that run each cell, by its name."""
    command = ["-m", "experiments.scaling.cell", *config_flags]
    return {cell.name: [*command, f"--name={cell.name}", f"--workdir={workdir}"] for cell in cells}


def format_cells(sweep: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path) -> str:
    """Returns a table in text, with a line for each cell, and the total cost of training."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{'cell':{width}}  {'params':>11}  {'gmacs':>9}  {'steps':>8}  {'TFLOPs':>10}  state"]
    total = 0.0
    for cell in cells:
        counts, state = cell.counts, _describe_state(sweep, cell, workdir)
        tflops = counts["train_gflops"] / 1e3
        total += tflops
        lines.append(
            f"{cell.name:{width}}  {counts['params']:>11,}  {counts['gmacs']:>9.4g}  "
            f"{cell.steps[-1]:>8,}  {tflops:>10,.4g}  {state}"
        )
    return "\n".join([*lines, f"{len(cells)} cells, {total:,.4g} TFLOPs of training"])


def _describe_state(sweep, cell, workdir):
    """Returns the state of a cell; for a failed one with its error."""
    state = cell_run.get_state(cell, sweep.evaluate, workdir / cell.name)
    return f"failed: {cell_run.get_error(workdir / cell.name)}" if state == "failed" else state


def submit(sweep: ConfigDict, commands: dict, workdir: pathlib.Path) -> None:
    """Submits cells to Slurm, except cells whose earlier job has not ended.

    The file `job` in a cell's directory holds the id of its job.
    Args: commands, by the cell's name.
    Raises: as `executors.submit`; ValueError for a file `job` without an id.
    """
    folder = workdir / "slurm"
    queued = []
    for name in commands:
        path = workdir / name / "job"
        if path.is_file() and not executors.has_ended(_read_job_id(path), folder):
            queued.append(name)
    commands = {name: words for name, words in commands.items() if name not in queued}
    slurm = sweep.slurm
    # Several processes of one cell must find each other and connect.
    if slurm.nodes * slurm.tasks_per_node > 1:
        commands = {name: [*words, "--distributed"] for name, words in commands.items()}
    jobs = executors.submit(commands, folder, slurm) if commands else {}
    for name, job_id in jobs.items():
        path = workdir / name / "job"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(path, job_id)
        print(f"{name}: job {job_id}")
    for name in queued:
        print(f"{name}: queued or running; delete {workdir / name / 'job'} to submit it again.")
    print(f"{len(jobs)} jobs submitted. --list shows what is done.")


def _read_job_id(path):
    """Reads a file `job`.   Raises: OSError; ValueError if the file holds no id."""
    text = json_files.read_bytes(path, MOST_JOB_BYTES).decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,20}(_\d{1,20})?", text):
        raise UserError(
            f"{path} holds {text!r}, which is no id of a Slurm job. Delete the file to submit the "
            "cell again."
        )
    return text
