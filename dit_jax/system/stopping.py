"""Ctrl-C and SIGTERM: the first one ends the work in order, a second Ctrl-C kills the process.

Python calls a signal handler only between two bytecode instructions, so not while XLA compiles,
which may take minutes. But Python's C code writes the number of a signal to a pipe at once. A
thread reads this pipe. It prints the notice and, if needed, ends the process.
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
PATIENCE = 1.0  # seconds after a signal; if the command still runs then, it prints a notice


class Stopped(KeyboardInterrupt):
    """Exception for the signal `number`, which ended the work.

    Attributes:
      kept: what is saved of the work, for the user, such as 'step 3 is saved'.
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(f"{NAMES[number]}: {kept}")
        self.number, self.kept = number, kept

    @property
    def status(self) -> int:
        """The exit status that shells report for this signal: 130 or 143."""
        return 128 + self.number


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that host or device memory is exhausted."""
    # By the message: on CPUs JAX may report it with the status INTERNAL.
    texts = ("RESOURCE_EXHAUSTED", "Out of memory allocating")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def raise_wrapped(error: BaseException | None) -> None:
    """Raises the `Stopped` from which a library has raised this error, if there is one."""
    while error is not None:
        if isinstance(error, Stopped):
            raise error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def attach_kept_message(kept: Callable[[], str]) -> Iterator[None]:
    """Sets the attribute `kept` of an OSError or ValueError raised inside the context.

    `kept` returns what is saved of the work, for the user. It is called when everything has ended,
    because a checkpoint may still be being written now.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # After a LostError the directory is gone, so `kept` cannot look into it.
        if not isinstance(error, files.LostError):
            error.kept = kept
        raise


class Signals:
    """Context that receives SIGINT and SIGTERM; outside the main thread it does nothing.

    A second SIGINT ends the process and its worker processes at once. Further SIGTERMs are ignored,
    because schedulers send them until the process is gone.

    Args:
      notice: a text for the user about what happens after the first signal.
      at_first: called at the first signal, in the thread that reads the pipe.
      at_end: called there before a second Ctrl-C ends the process.

    Attributes:
      received: the number of the first signal, or None.
    """

    numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)  # the signals that are received
    patience = 0.0  # seconds between the first signal and the notice

    def __init__(
        self,
        notice: str,
        at_first: Callable[[], object] = lambda: None,
        at_end: Callable[[], object] = lambda: None,
    ):
        self.received: int | None = None
        self._notice, self._at_first, self._at_end = notice, at_first, at_end
        self._thread = None

    def __enter__(self) -> "Signals":
        # Python allows only the main thread to set handlers.
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)  # set_wakeup_fd demands it
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._previous = {}
            self.install()
        return self

    def install(self) -> None:
        """Sets the handlers; called again, it replaces handlers that a library has set since."""
        for number in self.numbers if self._thread else ():
            # A shell starts background commands with Ctrl-C ignored; that must stay so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def __exit__(self, *_) -> None:
        if not self._thread:
            return
        signal.set_wakeup_fd(self._previous_pipe)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        os.close(self._pipe[1])  # ends the thread
        self._thread.join()
        os.close(self._pipe[0])

    def _handle(self, number, _):
        """Handles a signal; runs in the main thread, between two bytecode instructions."""
        self.received = self.received or number

    def _watch(self):
        """Reads the numbers of signals from the pipe until it is closed; runs in a thread."""
        first, timeout = None, None
        while True:
            # A timeout means that `patience` is over and the command still runs.
            if not select.select(self._pipe[:1], [], [], timeout)[0]:
                self._say(first)
                timeout = None
                continue
            numbers = os.read(self._pipe[0], 64)
            if not numbers:  # the pipe is closed
                return
            # Python writes the numbers of all signals that have a handler, also of other ones.
            for number in filter(self.numbers.__contains__, numbers):
                if first is None:
                    first, timeout = number, self.patience or None
                    self.received = self.received or number
                    if not self.patience:
                        self._say(first)
                    self._at_first()
                elif number == signal.SIGINT:
                    write("Ctrl-C again: ended at once.")
                    self._at_end()
                    end(128 + number)

    def _say(self, number):
        """Prints the notice for a signal."""
        again = " Ctrl-C again ends at once." if number == signal.SIGINT else ""
        write(f"{NAMES[number]}: {self._notice}{again}")


class Raising(Signals):
    """Signals that raise `Stopped` in the main thread, wherever it is; for commands.

    Only the first signal raises. After it, SIGTERM is ignored until the process is gone, and Ctrl-C
    ends the process at once.
    """

    patience = PATIENCE

    def __init__(self):
        super().__init__("ending as soon as the devices let go.")
        self._ending, self._at_exit = False, signal.SIG_DFL

    def __enter__(self) -> "Raising":
        self._hook, sys.unraisablehook = sys.unraisablehook, self._report
        return super().__enter__()

    def ignore(self) -> None:
        """Makes later signals raise nothing, because the command is already ending."""
        self._ending = True

    def finish(self) -> None:
        """Makes all signals ignored until Python has ended, because the work is done."""
        self._ending, self._at_exit = True, signal.SIG_IGN

    def _handle(self, number, _):
        # A second exception would interrupt the removal of temporary files.
        if not self._ending:
            self._ending = True
            self.received = self.received or number
            raise Stopped(self.received)

    def _report(self, unraisable):
        """Raises a `Stopped` again that Python dropped; other exceptions go to the previous hook.

        Python drops exceptions in `__del__`, and where a file is closed by garbage collection.
        """
        if not isinstance(unraisable.exc_value, Stopped):
            return self._hook(unraisable)
        # A hook cannot raise. So a new signal is sent a moment later, when `__del__` has ended.
        self._ending = False
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def __exit__(self, *exception) -> None:
        sys.unraisablehook = self._hook
        if self._ending:  # the handlers for the time until Python has ended
            self._previous = {signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: self._at_exit}
        super().__exit__(*exception)


class Deferring(Signals):
    """Signals that only set `received`, so that a loop can finish its step and save.

    Several processes of a run must stop at the same step. JAX's own handler of SIGTERM makes them
    agree on it: Ctrl-C becomes a SIGTERM, and the loop must use `reached_preemption` of Orbax's
    manager instead of `received`.
    """

    def __init__(self, notice: str, **calls: Callable[[], object]):
        super().__init__(notice, **calls)
        if jax.process_count() > 1:
            self.numbers = (signal.SIGINT,)
            self._at_first = lambda: os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Context in which this thread starts threads and processes without SIGINT and SIGTERM.

    A terminal sends Ctrl-C to worker processes too, and Slurm sends them SIGTERM. But the process
    that they work for must decide when they end.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, Signals.numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def end_with_parent() -> None:
    """Makes this worker process end as soon as its parent process is gone, for any reason."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write(line: str) -> None:
    """Writes a line to the descriptor of standard error.

    sys.stderr has a lock that the main thread may hold.
    """
    with contextlib.suppress(OSError):  # standard error is closed
        # The current line of a terminal may hold a progress bar or the ^C.
        begin = "\n" if os.isatty(2) else ""
        os.write(2, f"{begin}{line}\n".encode(errors="backslashreplace"))


def end(status: int) -> NoReturn:
    """Kills the worker processes and ends this process at once, without Python's finalization.

    Finalization may take long, or crash, while threads of XLA and Grain are still running.
    """
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)
