"""A command's processes, started as forks: signals, ends, what they wrote."""

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

MAX_SECONDS = 240  # that a command may take


class LostError(Exception):
    """A result that differs, or an end that a user would not understand."""


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
        """Args: log, its name begins those of the files.   before: called in each process first."""
        self._words = job.words(directory, inputs)
        self._logs = [log.with_name(f"{log.name}-{i}") for i in range(len(self._words))]
        devices = job.devices // len(self._words)
        env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self._left = {
            i: zygote.start(words, env, log, before)
            for i, (words, log) in enumerate(zip(self._words, self._logs, strict=True))
        }
        self.statuses: list[int | None] = [None] * len(self._words)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for i, pid in list(self._left.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[i] = os.waitstatus_to_exitcode(status)
                del self._left[i]
        return not self._left

    def wait(self, seconds: float) -> bool:
        """Until all have ended, or for so long; whether they have."""
        until = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def wait_until_handled(self) -> None:
        """Until they receive signals as commands do; before, Python's imports would be ended."""
        mask = (1 << signal.SIGTERM - 1) | (1 << signal.SIGINT - 1)
        while not self.poll():
            with contextlib.suppress(OSError):
                caught = [int(_status(pid, "SigCgt"), 16) for pid in self._left.values()]
                if all(one & mask == mask for one in caught):
                    return
            time.sleep(0.005)

    def wait_for_end(self) -> bool:
        """Until all have ended of themselves, else they are killed.

        Returns: whether all have done what they were asked to.
        Raises: LostError if they did not end, or one shows a traceback or another status.
        """
        ended = self.wait(MAX_SECONDS)
        self.kill()
        if not ended:
            raise LostError(f"does not end:\n{self.text()}")
        if "Traceback" in self.text():
            raise LostError(f"shows a traceback, {self.statuses}:\n{self.text()}")
        return not any(self.statuses)

    def check_error(self, text: str = "error: ") -> None:
        """Demands that each process that did not succeed ended with an error that has the text."""
        ends = {0, 1} if len(self) == 1 else {0, 1, -signal.SIGABRT}  # JAX's, after another's
        if set(self.statuses) - ends or text not in self.text():
            raise LostError(f"ends with {self.statuses}, without {text!r}:\n{self.text()}")

    def check_way_on(self) -> None:
        """Demands that a user is told the very command that was given."""
        lines = self.text().splitlines()
        ways = [f"To go on, run: {shlex.join(_command(words))}" for words in self._words]
        if not any(line.endswith(way) for line in lines for way in ways):
            raise LostError(f"does not say how to go on, {self.statuses}:\n{self.text()}")

    def send(self, number: int, which: Sequence[int] | None = None, group: bool = False) -> None:
        """Sends a signal to the processes, or to some; with `group` to their descendants too."""
        for i in list(self._left) if which is None else which:
            if i in self._left:
                pids = [self._left[i], *(_descendants(self._left[i]) if group else [])]
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)

    def kill(self) -> None:
        """Ends all that is left."""
        self.send(signal.SIGKILL, group=True)
        self.wait(30)

    def text(self) -> str:
        """What they wrote to standard error."""
        texts = [pathlib.Path(f"{log}.err").read_text() for log in self._logs]
        return "\n".join(text.strip() for text in texts)

    def __len__(self) -> int:
        return len(self.statuses)


def _command(words):
    return [sys.executable, "-m", *words]


def _status(pid, name):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def _descendants(pid):
    actual = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                actual += [child, *_descendants(child)]
    return actual
