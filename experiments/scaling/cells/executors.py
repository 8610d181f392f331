"""Where the cells of a sweep run: here, one after another or one to each device, or under Slurm.

Every cell is the same command, so that any scheduler can start it; launch/ has more of them.
"""

import concurrent.futures
import logging
import os
import pathlib
import subprocess
import threading
from collections.abc import Mapping

from ml_collections import ConfigDict

from dit_jax.errors import UserError
from dit_jax.system import files, stopping

logger = logging.getLogger("dit_jax")

Command = list[str]


def run_local(
    commands: Mapping[str, Command], logs: Mapping[str, pathlib.Path], parallel: int
) -> "Runs":
    """Starts every command, `parallel` at a time, each then on devices of its own.

    Args: commands, logs: by the cell's name; what a command prints is appended to its log.
    Returns: an iterator over (name, exit status) in the order in which they end.
    Raises: ValueError for more at a time than there are devices.
    """
    return Runs(commands, logs, shares(parallel))


class Runs:
    """(name, exit status) of commands as they end.

    At SIGTERM or Ctrl-C those that run get SIGTERM, so that they save, and no more are begun.
    `stopped` is the signal's number then: commands that end need not have failed.
    """

    def __init__(self, commands, logs, shares):
        self._commands, self._logs = commands, logs
        self._free = list(shares)
        self._running, self._lock = set(), threading.Lock()
        self._workers = len(shares)
        self._signals = stopping.Deferring(
            "the cells that run save and end; no more are begun.",
            at_first=lambda: self._send(subprocess.Popen.terminate),
            at_end=lambda: self._send(subprocess.Popen.kill),
        )

    def __iter__(self):
        with (
            self._signals,
            concurrent.futures.ThreadPoolExecutor(self._workers) as pool,
        ):
            futures = {pool.submit(self._run, name): name for name in self._commands}
            for future in concurrent.futures.as_completed(futures):
                status = future.result()
                if status is not None:  # it was started
                    yield futures[future], status

    @property
    def stopped(self) -> int | None:
        return self._signals.received

    def _send(self, act):
        # Without the lock: a command that is begun just now sees that a signal came.
        for process in tuple(self._running):
            act(process)

    def _run(self, name):
        with self._lock:
            share = self._free.pop()
        try:
            if self.stopped:
                return None
            if cores := share.get("cores"):
                os.sched_setaffinity(0, cores)  # of this thread, and so of what it starts
            with files.open_to_write(self._logs[name], "a") as log:
                process = subprocess.Popen(
                    self._commands[name],
                    env=os.environ | share.get("variables", {}),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is ours to hand on
                )
                self._running.add(process)
                if self.stopped:
                    process.terminate()
                try:
                    return process.wait()
                finally:
                    self._running.discard(process)
        finally:
            with self._lock:
                self._free.append(share)


def shares(parallel: int) -> list[dict]:
    """For each of the cells that run at once the 'variables' or the 'cores' that are its own.

    One alone has everything.
    Raises: ValueError for more cells than GPUs, TPU chips or, without those, cores.
    """
    if parallel == 1:
        return [{}]
    dev = pathlib.Path("/dev")
    if gpus := _visible("CUDA_VISIBLE_DEVICES", sorted(dev.glob("nvidia[0-9]*"))):
        kind, found = "GPUs", [{"variables": {"CUDA_VISIBLE_DEVICES": gpu}} for gpu in gpus]
    elif chips := _visible(
        "TPU_VISIBLE_CHIPS", [*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")]
    ):
        alone = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
        kind = "TPU chips"
        found = [{"variables": {"TPU_VISIBLE_CHIPS": chip, **alone}} for chip in chips]
    else:
        cores = sorted(os.sched_getaffinity(0))
        size = max(1, len(cores) // parallel)
        kind, found = "cores", [{"cores": cores[i : i + size]} for i in range(0, len(cores), size)]
    if parallel > len(found):
        raise UserError(f"{parallel=} cells at a time need as many {kind}, not {len(found)}.")
    return found[:parallel]


def _visible(variable, devices):
    """Numbers of the devices, as text: those that the variable leaves visible."""
    if variable in os.environ:
        return [part for part in os.environ[variable].split(",") if part]
    return [str(i) for i in range(len(devices))]


def submit(
    commands: Mapping[str, Command],
    folder: pathlib.Path,
    settings: ConfigDict,
    cluster: str = "slurm",
) -> dict[str, str]:
    """Submits every command as a job through submitit; the jobs' ids by the cell's name.

    Args: folder, for scripts and logs.   settings: `config.slurm` of a sweep.   cluster: 'slurm',
      or 'local' to run the jobs here.
    Raises: ValueError if submitit or Slurm is not there.
    """
    executor = _executor(folder, cluster)
    parameters = {key: value for key, value in settings.items() if value not in ("", 0)}
    at_once = parameters.pop("jobs_at_once")
    partition = parameters.pop("partition", None)
    if cluster == "slurm":
        parameters |= {"slurm_array_parallelism": at_once}
        parameters |= {"slurm_partition": partition} if partition else {}
    executor.update_parameters(name="dit_jax", **parameters)
    with executor.batch():
        jobs = {name: executor.submit(Job(command)) for name, command in commands.items()}
    return {name: job.job_id for name, job in jobs.items()}


def ended(job_id: str, folder: pathlib.Path) -> bool:
    """Whether a job that was submitted to Slurm has ended, well or not."""
    import submitit

    return submitit.SlurmJob(folder=folder, job_id=job_id).done(force_check=True)


def _executor(folder, cluster):
    try:
        import submitit
    except ImportError as error:
        raise UserError("executor slurm needs submitit: pip install -e '.[slurm]'") from error
    if cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise UserError(
            "executor slurm needs Slurm's commands on this machine; --executor print prints those "
            "of the cells, for any other scheduler."
        )
    return submitit.AutoExecutor(folder=folder, cluster=cluster)


class Job:
    """A command that submitit calls; before its time is over it saves and the job waits again."""

    def __init__(self, command: Command):
        self._command, self._process = command, None

    def __call__(self) -> None:
        # Slurm sends submitit's signal to all of a job's processes; it would end the command.
        ignoring = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
        self._process = subprocess.Popen([*ignoring, *self._command])
        if status := self._process.wait():
            raise subprocess.CalledProcessError(status, self._command)

    def checkpoint(self):
        """What submitit asks for at its signal: the job that is to go on."""
        import submitit

        self._process.terminate()
        self._process.wait()
        return submitit.helpers.DelayedSubmission(Job(self._command))
