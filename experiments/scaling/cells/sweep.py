"""The execution of a sweep: cells that are not done yet run here, or are submitted to Slurm."""

import json
import logging
import pathlib
import re

from ml_collections import ConfigDict

from dit_jax import latents
from dit_jax.errors import UserError
from dit_jax.system import files, json_files, stopping
from experiments.scaling.cells import cell, executors, grid

logger = logging.getLogger("dit_jax")

MOST_JOB_BYTES = 64  # of a job's id, such as 123_4


def list_waiting(
    sweep: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path, retry_failed: bool = False
) -> list[grid.Cell]:
    """Returns the cells that are not done; failed cells only with retry_failed."""
    skipped = ("done",) if retry_failed else ("done", "failed")
    return [c for c in cells if cell.get_state(c, sweep.evaluate, workdir / c.name) not in skipped]


def check(evaluation: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path) -> None:
    """Raises unless data and extractor can be opened and each directory belongs to its cell.

    Args: evaluation, `config.evaluate` of the sweep.
    Raises: as `latents.open_split` and `cell.load_extractor`; ValueError that lists the cells
      whose directory has a run of another config.
    """
    if evaluation.num and cells:
        cell.load_extractor(evaluation)
    # Many cells share their data, which is opened once for each different config of it.
    metadata, problems = {}, []
    for one in cells:
        keys = json.dumps([one.config.data.to_dict(), one.config.latents.to_dict()])
        if keys not in metadata:
            metadata[keys] = latents.open_split(one.config, "train").metadata
        try:
            cell.check(one, workdir / one.name, metadata[keys])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def run(
    sweep: ConfigDict, cells: list[grid.Cell], commands: dict, workdir: pathlib.Path, parallel: int
) -> None:
    """Runs cells on this machine; records a cell whose process died as failed.

    Args: commands, by the cell's name.   parallel: number of cells that run at a time.
    Raises: ValueError if the workdir's name is not in UTF-8; stopping.Stopped after a signal, once
      the running cells have ended.
    """
    files.check_utf8(workdir)
    # The directories are made now, because the logs are in them.
    by_name = {c.name: c for c in cells}
    logs = {name: workdir / name / "log.txt" for name in by_name}
    for log in logs.values():
        log.parent.mkdir(parents=True, exist_ok=True)
    for name in (c.name for c in cells if cell.is_busy(workdir / c.name)):
        logger.warning("%s: another process runs it; its turn here waits for that to end.", name)
    left = len(cells)
    runs = executors.run_local(commands, logs, parallel)
    with files.Directory(workdir) as here:
        for name, status in runs:
            here.check()
            one, directory = by_name[name], workdir / name
            # A cell records its own errors; one that was killed, as by a lack of memory, cannot.
            if status and not runs.stopped and status != cell.INTERRUPTED:
                message = f"its process ended with status {status}; see {logs[name]}"
                cell.record_failure(one, sweep.evaluate, directory, message)
            left -= 1
            state = cell.get_state(one, sweep.evaluate, directory)
            state += f": {cell.get_error(directory)}" if state == "failed" else ""
            logger.info("%s  %s, %d cells left", name, state, left)
    if runs.stopped:
        raise stopping.Stopped(runs.stopped, f"what the cells have saved is kept in {workdir}")


def make_command(config: list[str], name: str, workdir: pathlib.Path) -> executors.Command:
    """Returns the arguments of `python` that run a cell.

    Args: config, the flags of the sweep's config.
    """
    module = ["-m", "experiments.scaling.cell"]
    return [*module, *config, f"--name={name}", f"--workdir={workdir}"]


def format_cells(sweep: ConfigDict, cells: list[grid.Cell], workdir: pathlib.Path) -> str:
    """Returns a text with a line for each cell, and the total cost of training."""
    width = max(len(c.name) for c in cells)
    lines = [f"{'cell':{width}}  {'params':>11}  {'gmacs':>9}  {'steps':>8}  {'TFLOPs':>10}  state"]
    total = 0.0
    for one in cells:
        counts, state = one.counts, cell.get_state(one, sweep.evaluate, workdir / one.name)
        state += f": {cell.get_error(workdir / one.name)}" if state == "failed" else ""
        tflops = counts["train_gflops"] / 1e3
        total += tflops
        lines.append(
            f"{one.name:{width}}  {counts['params']:>11,}  {counts['gmacs']:>9.4g}  "
            f"{one.steps[-1]:>8,}  {tflops:>10,.4g}  {state}"
        )
    return "\n".join([*lines, f"{len(cells)} cells, {total:,.4g} TFLOPs of training"])


def submit(sweep: ConfigDict, commands: dict, workdir: pathlib.Path) -> None:
    """Submits cells to Slurm, except those with a job of an earlier call that has not ended.

    The id of a cell's job is kept in the file `job` of its directory.
    Raises: as `executors.submit`; ValueError for a file `job` without an id.
    """
    folder = workdir / "slurm"
    queued = []
    for name in commands:
        path = workdir / name / "job"
        if path.is_file() and not executors.has_ended(_read_job(path), folder):
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


def _read_job(path):
    """Reads the id of a cell's job.   Raises: OSError; ValueError if the file holds no id."""
    text = json_files.read_bytes(path, MOST_JOB_BYTES).decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,20}(_\d{1,20})?", text):
        raise UserError(
            f"{path} holds {text!r}, which is no id of a Slurm job: delete it to submit the cell "
            "again."
        )
    return text
