"""A command's processes, started as forks, with their signals, exit statuses and errors."""

import contextlib
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence

from faults import jobs
from helpers import zygote

MAX_SECONDS = 240  # the time limit of a command


class LostError(Exception):
    """A round lost something: a result differs, or a command ended without a clear message."""


class Running:
    """The processes of one start of a command.

    Attributes:
      statuses: exit status of each process, None while it runs, -N after signal N.
    """

    def __init__(
        self,
        job: jobs.Job,
        directory: pathlib.Path,
        inputs: pathlib.Path,
        log: pathlib.Path,
        before: Callable[[], object] = lambda: None,
    ):
        """Args: log: prefix of the log files' paths.   before: called in each process first."""
        self._words = job.make_words(directory, inputs)
        self._logs = [log.with_name(f"{log.name}-{i}") for i in range(len(self._words))]
        devices = job.devices // len(self._words)
        env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self._running_pids = {
            i: zygote.start(words, env, log, before)
            for i, (words, log) in enumerate(zip(self._words, self._logs, strict=True))
        }
        self.statuses: list[int | None] = [None] * len(self._words)

    def poll(self) -> bool:
        """Records the processes that have ended; returns whether all have."""
        for i, pid in list(self._running_pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[i] = os.waitstatus_to_exitcode(status)
                del self._running_pids[i]
        return not self._running_pids

    def wait(self, seconds: float) -> bool:
        """Waits until all processes have ended, or for so many seconds; returns `poll()`."""
        until = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def wait_until_handled(self) -> None:
        """Waits until all processes have signal handlers; earlier signals only end the imports."""
        required = (1 << signal.SIGTERM - 1) | (1 << signal.SIGINT - 1)
        while not self.poll():
            with contextlib.suppress(OSError):
                masks = [
                    int(_read_status(pid, "SigCgt"), 16) for pid in self._running_pids.values()
                ]
                if all(mask & required == required for mask in masks):
                    return
            time.sleep(0.005)

    def wait_for_end(self) -> bool:
        """Waits until all processes have ended by themselves, and kills them otherwise.

        Returns: whether all succeeded.
        Raises: LostError if they did not end, or if one shows a traceback.
        """
        ended = self.wait(MAX_SECONDS)
        self.kill()
        if not ended:
            raise LostError(f"does not end:\n{self.read_stderr()}")
        if "Traceback" in self.read_stderr():
            raise LostError(f"shows a traceback, {self.statuses}:\n{self.read_stderr()}")
        return not any(self.statuses)

    def check_error(self, message: str = "error: ") -> None:
        """Raises LostError if a status is neither 0 nor 1, or if no error has this message."""
        # JAX aborts a process whose peer has failed.
        allowed = {0, 1} if len(self) == 1 else {0, 1, -signal.SIGABRT}
        if set(self.statuses) - allowed or message not in self.read_stderr():
            raise LostError(
                f"ends with {self.statuses}, without {message!r}:\n{self.read_stderr()}"
            )

    def check_way_on(self) -> None:
        """Raises LostError unless an error names the given command as the way to go on."""
        lines = self.read_stderr().splitlines()
        ways = [f"To go on, run: {shlex.join(_command(words))}" for words in self._words]
        if not any(line.endswith(way) for line in lines for way in ways):
            raise LostError(f"does not say how to go on, {self.statuses}:\n{self.read_stderr()}")

    def send(self, signum: int, indices: Sequence[int] | None = None, group: bool = False) -> None:
        """Sends a signal to these processes or to all, and with `group` to their descendants."""
        for i in list(self._running_pids) if indices is None else indices:
            if i not in self._running_pids:
                continue
            pids = [self._running_pids[i]]
            if group:
                pids += _list_descendants(pids[0])
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def kill(self) -> None:
        """Kills all processes that still run, and their descendants."""
        self.send(signal.SIGKILL, group=True)
        self.wait(30)

    def read_stderr(self) -> str:
        """Returns what all processes wrote to standard error."""
        outputs = [pathlib.Path(f"{log}.err").read_text() for log in self._logs]
        return "\n".join(output.strip() for output in outputs)

    def __len__(self) -> int:
        return len(self.statuses)


def _command(words):
    return [sys.executable, "-m", *words]


def _read_status(pid, name):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def _list_descendants(pid):
    descendants = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                descendants += [child, *_list_descendants(child)]
    return descendants
