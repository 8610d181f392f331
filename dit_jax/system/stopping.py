"""Ctrl-C and SIGTERM: the first ends the work in order, a second Ctrl-C ends the process at once.

Python runs a signal's handler between two of its own instructions, and so not while XLA compiles,
which may take minutes. Therefore a thread waits for the numbers of signals, which Python's C code
writes to a pipe at once; this thread speaks, and ends the process where it must.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax

from dit_jax.system import files

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
PATIENCE = 1.0  # seconds after which a command that has not ended says that it will


class Stopped(KeyboardInterrupt):
    """A signal that ended the work, and what is kept of it, such as 'step 3 is saved'."""

    def __init__(self, number: int, kept: str = ""):
        super().__init__(f"{NAMES[number]}: {kept}")
        self.number, self.kept = number, kept

    @property
    def status(self) -> int:
        """The exit status of a process that this signal ended, as shells count: 130 or 143."""
        return 128 + self.number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is short, of the host or of a device; on CPUs JAX may call it INTERNAL."""
    short = ("RESOURCE_EXHAUSTED", "Out of memory allocating")
    return isinstance(error, MemoryError) or any(text in str(error) for text in short)


def raise_wrapped(error: BaseException | None) -> None:
    """Raises the `Stopped` that a library has made an error of its own of, if this is one."""
    while error is not None:
        if isinstance(error, Stopped):
            raise error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def telling(kept: Callable[[], str]) -> Iterator[None]:
    """Hands on to an error, as its `kept`, what tells what is kept of the work inside.

    Called when all has ended: a checkpoint may yet be being written. Not of a `files.LostError`:
    what was kept cannot be looked at.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(error, files.LostError):
            error.kept = kept
        raise


class Signals:
    """Receives SIGINT and SIGTERM while it is entered; in other than the main thread neither.

    The second SIGINT ends the process and its worker processes at once; more SIGTERMs, which
    schedulers send until the process is gone, are ignored.
    """

    numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
    patience = 0.0  # seconds between the first signal and the notice

    def __init__(
        self,
        notice: str,
        at_first: Callable[[], object] = lambda: None,
        at_end: Callable[[], object] = lambda: None,
    ):
        """Args: notice, what happens at the first signal.   at_first, at_end: called in a thread
        of their own at the first signal, and before the second Ctrl-C ends the process."""
        self.received: int | None = None  # the first signal's number
        self._notice, self._at_first, self._at_end = notice, at_first, at_end
        self._thread = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._previous = {}
            self.install()
        return self

    def install(self) -> None:
        """Sets the handlers, also in place of those that a library has set since."""
        for number in self.numbers if self._thread else ():
            # A shell that starts a command in the background has it ignore Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def __exit__(self, *_) -> None:
        if not self._thread:
            return
        signal.set_wakeup_fd(self._previous_pipe)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        os.close(self._pipe[1])
        self._thread.join()
        os.close(self._pipe[0])

    def _handle(self, number, _):
        """Runs in the main thread, between two of Python's instructions."""
        self.received = self.received or number

    def _watch(self):
        """Runs in a thread: reads signals' numbers from the pipe until it is closed."""
        first, waits = None, None
        while True:
            if not select.select(self._pipe[:1], [], [], waits)[0]:
                self._say(first)
                waits = None
                continue
            numbers = os.read(self._pipe[0], 64)
            if not numbers:
                return
            for number in filter(self.numbers.__contains__, numbers):
                if first is None:
                    first, waits = number, self.patience or None
                    self.received = self.received or number
                    if not self.patience:
                        self._say(first)
                    self._at_first()
                elif number == signal.SIGINT:
                    write("Ctrl-C again: ended at once.")
                    self._at_end()
                    end(128 + number)

    def _say(self, number):
        again = " Ctrl-C again ends at once." if number == signal.SIGINT else ""
        write(f"{NAMES[number]}: {self._notice}{again}")


class Raising(Signals):
    """Raises `Stopped` in the main thread at the first signal, wherever that is: for commands.

    Once it has, SIGTERM is ignored until the process is gone, and Ctrl-C ends it.
    """

    patience = PATIENCE

    def __init__(self):
        super().__init__("ending as soon as the devices let go.")
        self._ending, self._at_exit = False, signal.SIG_DFL

    def __enter__(self) -> "Raising":
        self._hook, sys.unraisablehook = sys.unraisablehook, self._report
        return super().__enter__()

    def ignore(self) -> None:
        """From now on no signal raises: the command is ending."""
        self._ending = True

    def finish(self) -> None:
        """All is done: until Python has ended, signals change nothing."""
        self._ending, self._at_exit = True, signal.SIG_IGN

    def _handle(self, number, _):
        if not self._ending:  # a second one must not break into the removal of temporaries
            self._ending = True
            self.received = self.received or number
            raise Stopped(self.received)

    def _report(self, unraisable):
        """Raises again what Python drops: in `__del__`, or where a file is closed by going away."""
        if not isinstance(unraisable.exc_value, Stopped):
            return self._hook(unraisable)
        self._ending = False
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def __exit__(self, *exception) -> None:
        sys.unraisablehook = self._hook
        if self._ending:
            self._previous = {signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: self._at_exit}
        super().__exit__(*exception)


class Deferring(Signals):
    """Keeps the first signal as `received`, so that a loop can end on a whole step and save.

    Several processes must agree on the step. There JAX's own handler of SIGTERM tells all of them,
    so a Ctrl-C becomes a SIGTERM and `received` is of no use.
    """

    def __init__(self, notice: str, **calls: Callable[[], object]):
        super().__init__(notice, **calls)
        if jax.process_count() > 1:
            self.numbers = (signal.SIGINT,)
            self._at_first = lambda: os.kill(os.getpid(), signal.SIGTERM)


class Blocked:
    """While entered, threads and processes that this thread starts get neither SIGINT nor SIGTERM.

    For worker processes: a terminal sends Ctrl-C to them too, and Slurm SIGTERM, but the process
    that they work for decides when they end.
    """

    def __enter__(self) -> None:
        self._previous = signal.pthread_sigmask(signal.SIG_BLOCK, Signals.numbers)

    def __exit__(self, *_) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous)


def end_with_parent() -> None:
    """Ends this worker process when the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write(line: str) -> None:
    """Writes a line to standard error, past Python's locks, which the main thread may hold."""
    with contextlib.suppress(OSError):  # it is closed
        begin = "\n" if os.isatty(2) else ""  # a progress bar or the terminal's ^C may stand there
        os.write(2, f"{begin}{line}\n".encode(errors="backslashreplace"))


def end(status: int) -> NoReturn:
    """Ends the process and its worker processes at once, without Python's tidying.

    With threads of XLA and Grain at work that may take long, or end in a segmentation fault.
    """
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)
