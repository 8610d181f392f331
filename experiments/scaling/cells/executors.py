"""Executors of a sweep's cells: this machine, one cell at a time or one per device, or Slurm.

Every cell is started by the same command, so any scheduler can run it. experiments/launch has more
of them.
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
    """Runs every command, `parallel` at a time; each of several has devices of its own.

    Args: commands, logs: by the cell's name; the output of a command is appended to its log.
    Returns: an iterator over (name, exit status) in the order in which the commands end.
    Raises: ValueError if there are fewer devices than `parallel`.
    """
    return Runs(commands, logs, split_devices(parallel))


class Runs:
    """An iterable that runs commands and yields (name, exit status) as they end.

    At SIGTERM or Ctrl-C it sends SIGTERM to the running commands, so that they save, and starts no
    more. `stopped` is then the signal's number, and a command that ends need not have failed.
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
                if status is not None:  # None: the command was not started
                    yield futures[future], status

    @property
    def stopped(self) -> int | None:
        """The number of the signal that was received, or None."""
        return self._signals.received

    def _send(self, act):
        # No lock is needed: a command that is just being started checks `stopped` itself.
        for process in tuple(self._running):
            act(process)

    def _run(self, name):
        """Runs a command on a free share of the devices; returns its exit status.

        Returns None without starting it if a signal was received.
        """
        with self._lock:
            share = self._free.pop()
        try:
            if self.stopped:
                return None
            if cores := share.get("cores"):
                os.sched_setaffinity(0, cores)  # this thread's child processes inherit it
            with files.open_to_write(self._logs[name], "a") as log:
                process = subprocess.Popen(
                    self._commands[name],
                    env=os.environ | share.get("variables", {}),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that Ctrl-C reaches this process only
                )
                self._running.add(process)
                # The signal may have come after the check above and before `add`.
                if self.stopped:
                    process.terminate()
                try:
                    return process.wait()
                finally:
                    self._running.discard(process)
        finally:
            with self._lock:
                self._free.append(share)


def split_devices(parallel: int) -> list[dict]:
    """Returns, for each cell that runs at a time, its 'variables' or its 'cores'.

    With parallel=1 the cell has all devices, and its share is empty.
    Raises: ValueError if `parallel` exceeds the number of GPUs, TPU chips or, without these, cores.
    """
    if parallel == 1:
        return [{}]
    dev = pathlib.Path("/dev")
    if gpus := _visible("CUDA_VISIBLE_DEVICES", sorted(dev.glob("nvidia[0-9]*"))):
        kind, parts = "GPUs", [{"variables": {"CUDA_VISIBLE_DEVICES": gpu}} for gpu in gpus]
    elif chips := _visible(
        "TPU_VISIBLE_CHIPS", [*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")]
    ):
        # Together these say that the chip belongs to one process, which has no other chip.
        alone = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
        kind = "TPU chips"
        parts = [{"variables": {"TPU_VISIBLE_CHIPS": chip, **alone}} for chip in chips]
    else:
        cores = sorted(os.sched_getaffinity(0))
        size = max(1, len(cores) // parallel)
        kind, parts = "cores", [{"cores": cores[i : i + size]} for i in range(0, len(cores), size)]
    if parallel > len(parts):
        raise UserError(f"{parallel=} cells at a time need as many {kind}, not {len(parts)}.")
    return parts[:parallel]


def _visible(variable, devices):
    """Returns the device numbers, as text, that the environment variable leaves visible."""
    if variable in os.environ:
        return [part for part in os.environ[variable].split(",") if part]
    return [str(i) for i in range(len(devices))]


def submit(
    commands: Mapping[str, Command],
    folder: pathlib.Path,
    settings: ConfigDict,
    cluster: str = "slurm",
) -> dict[str, str]:
    """Submits every command as a job through submitit; returns the jobs' ids by the cell's name.

    Args:
      folder: for scripts and logs.   settings: `config.slurm` of a sweep.
      cluster: 'slurm', or 'local' to run the jobs on this machine.
    Raises: ValueError if submitit or Slurm is missing.
    """
    executor = _executor(folder, cluster)
    # An empty text or 0 means the cluster's default, so it is not passed on.
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


def has_ended(job_id: str, folder: pathlib.Path) -> bool:
    """Returns whether a job submitted to Slurm has ended, successfully or not."""
    import submitit  # here, because it is an optional dependency

    return submitit.SlurmJob(folder=folder, job_id=job_id).done(force_check=True)


def _executor(folder, cluster):
    """Returns a submitit executor.   Raises: ValueError if submitit or Slurm is missing."""
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
    """A command that submitit runs as a job.

    Shortly before the time limit submitit stops the command, which saves, and requeues the job.
    """

    def __init__(self, command: Command):
        self._command, self._process = command, None

    def __call__(self) -> None:
        # Slurm sends submitit's signal USR2 to all processes of a job. The shell ignores it, and so
        # does the command that it becomes; otherwise the signal would end the command.
        ignoring = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
        self._process = subprocess.Popen([*ignoring, *self._command])
        if status := self._process.wait():
            raise subprocess.CalledProcessError(status, self._command)

    def checkpoint(self):
        """Stops the command and returns the job that continues it; submitit calls this at USR2."""
        import submitit

        self._process.terminate()
        self._process.wait()
        return submitit.helpers.DelayedSubmission(Job(self._command))
