"""Executors of a sweep's cells: this machine, one cell at a time or one per device, or Slurm.

A cell is a command, so any scheduler can run it. experiments/launch has scripts for more of them.
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
    """Runs commands, `parallel` at a time. If that is more than 1, each has its own devices.

    Args: commands, logs: by the cell's name. The output of a command is appended to its log.
    Returns: an iterator over (name, exit status) in the order in which the commands end.
    Raises: ValueError if there are fewer devices than `parallel`.
    """
    return Runs(commands, logs, split_devices(parallel))


class Runs:
    """An iterable that runs commands and yields (name, exit status) as they end.

    At SIGTERM or Ctrl-C it starts no more commands. It sends SIGTERM to the running ones, so that
    they save; their exit status then does not mean that they failed.
    """

    def __init__(self, commands, logs, shares):
        self._commands, self._logs = commands, logs
        self._free_shares, self._lock = list(shares), threading.Lock()
        self._running = set()
        self._workers = len(shares)
        self._signals = stopping.Deferring(
            "the cells that run save and end; no more are begun.",
            at_first=lambda: self._signal_all(subprocess.Popen.terminate),
            at_end=lambda: self._signal_all(subprocess.Popen.kill),
        )

    def __iter__(self):
        with self._signals, concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(self._run, name): name for name in self._commands}
            for future in concurrent.futures.as_completed(futures):
                status = future.result()
                if status is not None:  # None: the command was not started
                    yield futures[future], status

    @property
    def stopped(self) -> int | None:
        """The number of the signal that stopped the runs, or None."""
        return self._signals.received

    def _signal_all(self, send):
        """Calls `send` with every running process."""
        # No lock is needed: a command that is just being started checks `stopped` itself.
        for process in tuple(self._running):
            send(process)

    def _run(self, name):
        """Runs a command on a free share of the devices.

        Returns: its exit status; None if a signal came first, so that it was not started.
        """
        with self._lock:
            share = self._free_shares.pop()
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
                self._free_shares.append(share)


def split_devices(parallel: int) -> list[dict]:
    """Splits the devices into shares, one for each cell that runs at the same time.

    Returns: shares, each with environment 'variables' or CPU 'cores'. For parallel=1 the single
      share is empty, because the cell has all devices.
    Raises: ValueError if `parallel` exceeds the number of GPUs, TPU chips or, without these, cores.
    """
    if parallel == 1:
        return [{}]
    dev = pathlib.Path("/dev")
    tpu_files = [*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")]
    if gpus := _list_visible("CUDA_VISIBLE_DEVICES", sorted(dev.glob("nvidia[0-9]*"))):
        kind, shares = "GPUs", [{"variables": {"CUDA_VISIBLE_DEVICES": gpu}} for gpu in gpus]
    elif chips := _list_visible("TPU_VISIBLE_CHIPS", tpu_files):
        # These bounds give the process one chip, which no other process shares.
        bounds = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
        kind = "TPU chips"
        shares = [{"variables": {"TPU_VISIBLE_CHIPS": chip, **bounds}} for chip in chips]
    else:
        cores = sorted(os.sched_getaffinity(0))
        size = max(1, len(cores) // parallel)
        kind, shares = "cores", [{"cores": cores[i : i + size]} for i in range(0, len(cores), size)]
    if parallel > len(shares):
        raise UserError(f"{parallel=} cells at a time need as many {kind}, not {len(shares)}.")
    return shares[:parallel]


def _list_visible(variable, devices):
    """Returns the device numbers, as text, that the environment variable leaves visible."""
    if variable in os.environ:
        return [number for number in os.environ[variable].split(",") if number]
    return [str(i) for i in range(len(devices))]


def submit(
    commands: Mapping[str, Command],
    folder: pathlib.Path,
    settings: ConfigDict,
    cluster: str = "slurm",
) -> dict[str, str]:
    """Submits every command as a job through submitit.

    Args:
      commands: by the cell's name.   folder: for scripts and logs.
      settings: `config.slurm` of a sweep.
      cluster: 'slurm', or 'local' to run the jobs on this machine.
    Returns: the ids of the jobs by the cell's name.
    Raises: ValueError if submitit or Slurm is missing.
    """
    executor = _make_executor(folder, cluster)
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


def _make_executor(folder, cluster):
    """Returns a submitit executor.   Raises: ValueError if submitit or Slurm is missing."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("executor slurm needs submitit: pip install -e '.[slurm]'") from error
    if cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise UserError(
            "executor slurm needs Slurm's commands on this machine. For another scheduler, "
            "--executor print prints the commands of the cells."
        )
    return submitit.AutoExecutor(folder=folder, cluster=cluster)


class Job:
    """A command that submitit runs as a job.

    Shortly before the time limit, submitit stops the command, so that it saves, and requeues the
    job.
    """

    def __init__(self, command: Command):
        self._command, self._process = command, None

    def __call__(self) -> None:
        # Slurm sends submitit's signal USR2 to all processes of a job, which would end the command.
        # The shell ignores the signal, and the command inherits that by `exec`.
        ignore_signal = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
        self._process = subprocess.Popen([*ignore_signal, *self._command])
        if status := self._process.wait():
            raise subprocess.CalledProcessError(status, self._command)

    def checkpoint(self):
        """Stops the command and returns the job that continues it; submitit calls this at USR2."""
        import submitit

        self._process.terminate()
        self._process.wait()
        return submitit.helpers.DelayedSubmission(Job(self._command))
