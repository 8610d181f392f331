"""Ctrl-C and SIGTERM: the first signal ends the work in order, a second Ctrl-C kills the process.

Python calls a signal handler only between two bytecode instructions. While XLA compiles, for
minutes perhaps, no handler runs. But Python's C code writes the number of a signal to a pipe at
once. A thread reads this pipe, prints the notice and, after a second Ctrl-C, ends the process.
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
NOTICE_SECONDS = 1.0  # after a signal, until a command that still runs prints a notice


class Stopped(KeyboardInterrupt):
    """Exception raised when the signal `number` ends the work.

    Attributes:
      kept: a text for the user that says what is saved, such as 'step 3 is saved'.
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
    # The message is searched, because on CPUs JAX may report the status INTERNAL.
    texts = ("RESOURCE_EXHAUSTED", "Out of memory allocating")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def raise_wrapped(error: BaseException | None) -> None:
    """Raises the `Stopped` that a library turned into this error, if there is one."""
    while error is not None:
        if isinstance(error, Stopped):
            raise error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def attach_kept_message(kept: Callable[[], str]) -> Iterator[None]:
    """Sets the attribute `kept` of an OSError or ValueError that is raised inside the context.

    Args:
      kept: returns a text for the user that says what is saved. It is called after all work has
        ended, because a checkpoint may still be in progress when the error is raised.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # After a LostError the directory is gone, so `kept` cannot look into it.
        if not isinstance(error, files.LostError):
            error.kept = kept
        raise


class Signals:
    """Context manager that receives SIGINT and SIGTERM; outside the main thread it does nothing.

    A second SIGINT ends the process and its worker processes at once. Further SIGTERMs are ignored,
    because schedulers repeat SIGTERM until the process is gone.

    Args:
      notice: a text for the user that says what happens after the first signal.
      at_first: called at the first signal, in the thread that reads the pipe.
      at_end: called in the same thread, before a second Ctrl-C ends the process.

    Attributes:
      received: the number of the first signal, or None.
    """

    signal_numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)  # that are received
    notice_seconds = 0.0  # between the first signal and the notice

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
            os.set_blocking(self._pipe[1], False)  # set_wakeup_fd needs this
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            self._old_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._old_handlers = {}
            self.install()
        return self

    def install(self) -> None:
        """Sets the signal handlers; a second call replaces those that a library set meanwhile."""
        for number in self.signal_numbers if self._thread else ():
            # A shell starts background commands with Ctrl-C ignored, and Ctrl-C must stay ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                handler = signal.signal(number, self._handle)
                self._old_handlers.setdefault(number, handler)

    def __exit__(self, *_) -> None:
        if not self._thread:
            return
        signal.set_wakeup_fd(self._old_pipe)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._pipe[1])  # ends the thread
        self._thread.join()
        os.close(self._pipe[0])

    def _handle(self, number, _):
        """Handles a signal; runs in the main thread, between two bytecode instructions."""
        self.received = self.received or number

    def _watch(self):
        """Reads the numbers of signals from the pipe until it is closed; runs in a thread."""
        first_number, timeout = None, None
        while True:
            # A timeout means that `notice_seconds` have passed and the command still runs.
            if not select.select(self._pipe[:1], [], [], timeout)[0]:
                self._print_notice(first_number)
                timeout = None
                continue
            numbers = os.read(self._pipe[0], 64)
            if not numbers:  # the pipe is closed
                return
            for number in numbers:
                # Python writes the numbers of all signals that have a handler, not only of these.
                if number not in self.signal_numbers:
                    continue
                if first_number is None:
                    first_number, timeout = number, self.notice_seconds or None
                    self.received = self.received or number
                    if not self.notice_seconds:
                        self._print_notice(first_number)
                    self._at_first()
                elif number == signal.SIGINT:
                    write("Ctrl-C again: ended at once.")
                    self._at_end()
                    end(128 + number)

    def _print_notice(self, number):
        """Prints the notice for a signal."""
        hint = " Ctrl-C again ends at once." if number == signal.SIGINT else ""
        write(f"{NAMES[number]}: {self._notice}{hint}")


class Raising(Signals):
    """Signals that raise `Stopped` in the main thread, whatever it executes; for commands.

    Only the first signal raises. Afterwards SIGTERM is ignored until the process is gone, and
    Ctrl-C ends the process at once.
    """

    notice_seconds = NOTICE_SECONDS

    def __init__(self):
        super().__init__("ending as soon as the devices are free.")
        self._is_ending = False
        self._last_handler = signal.SIG_DFL  # of Ctrl-C, until Python has ended

    def __enter__(self) -> "Raising":
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._report_unraisable
        return super().__enter__()

    def ignore(self) -> None:
        """Stops raising at later signals, because the command is already ending."""
        self._is_ending = True

    def finish(self) -> None:
        """Ignores all signals until Python has ended, because the work is done."""
        self._is_ending, self._last_handler = True, signal.SIG_IGN

    def _handle(self, number, _):
        # A second exception would interrupt the removal of temporary files.
        if not self._is_ending:
            self._is_ending = True
            self.received = self.received or number
            raise Stopped(self.received)

    def _report_unraisable(self, unraisable):
        """Signals again if Python dropped a `Stopped`; the previous hook gets other exceptions.

        Python drops exceptions in `__del__`, and when garbage collection closes a file.
        """
        if not isinstance(unraisable.exc_value, Stopped):
            return self._old_hook(unraisable)
        # A hook cannot raise. So a new signal is sent a moment later, when `__del__` has ended.
        self._is_ending = False
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def __exit__(self, *exception) -> None:
        sys.unraisablehook = self._old_hook
        if self._is_ending:  # these handlers stay until Python has ended
            self._old_handlers = {signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: self._last_handler}
        super().__exit__(*exception)


class Deferring(Signals):
    """Signals that only set `received`, so that a loop can finish its step and save.

    If a run has several processes, they must stop at the same step. JAX's own handler of SIGTERM
    makes them agree on this step. So Ctrl-C becomes a SIGTERM, and the loop must use
    `reached_preemption` of Orbax's manager instead of `received`.
    """

    def __init__(self, notice: str, **callbacks: Callable[[], object]):
        super().__init__(notice, **callbacks)
        if jax.process_count() > 1:
            self.signal_numbers = (signal.SIGINT,)
            self._at_first = lambda: os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Context manager that hides SIGINT and SIGTERM from threads and processes started inside it.

    A terminal sends Ctrl-C to worker processes too, and Slurm sends them SIGTERM. But only the
    parent process may decide when its workers end.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, Signals.signal_numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def end_with_parent() -> None:
    """Ends this worker process as soon as its parent process is gone, for any reason."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write(line: str) -> None:
    """Writes a line to standard error without sys.stderr, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):  # standard error is closed
        # The current line of a terminal may hold a progress bar or the ^C.
        newline = "\n" if os.isatty(2) else ""
        os.write(2, f"{newline}{line}\n".encode(errors="backslashreplace"))


def end(status: int) -> NoReturn:
    """Kills the worker processes and ends this process at once, without Python's finalization.

    Finalization may take long, or crash, while threads of XLA and Grain are still running.
    """
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)
