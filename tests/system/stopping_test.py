"""The first signal ends a process in order, a second Ctrl-C at once; workers get no signals."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dit_jax.system import stopping

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers():
    """Yields the signal handlers of this process, and restores them."""
    before = {number: signal.getsignal(number) for number in BOTH}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def _wait(seconds=5.0, until=lambda: False):
    """Waits, so that signal handlers and the thread can run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.01)


@pytest.mark.parametrize("number", BOTH)
def test_deferred_signal_only_sets_received(number, handlers, capfd):
    called = []
    with stopping.Deferring("ending this step.", at_first=lambda: called.append(1)) as signals:
        assert signals.received is None
        for _ in range(3):  # as schedulers repeat SIGTERM
            os.kill(os.getpid(), number if not signals.received else signal.SIGTERM)
            _wait(until=lambda: called)
        assert signals.received == number
    assert called == [1]
    assert {number: signal.getsignal(number) for number in BOTH} == handlers
    hint = " Ctrl-C again ends at once." if number == signal.SIGINT else ""
    assert capfd.readouterr().err == f"{stopping.NAMES[number]}: ending this step.{hint}\n"


@pytest.mark.parametrize("number", BOTH)
def test_raised_signal_ends_a_command_after_its_finally_blocks(number, capfd):
    cleaned_up = []

    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # must not interrupt this block
            time.sleep(0.05)
            cleaned_up.append(1)

    with pytest.raises(stopping.Stopped) as stopped, stopping.Raising():
        work()
    assert cleaned_up == [1]
    assert (stopped.value.number, stopped.value.status) == (number, 128 + number)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # until the process is gone
    assert capfd.readouterr().err == ""  # it ended before NOTICE_SECONDS


def test_command_that_ends_slowly_prints_a_notice(monkeypatch, capfd):
    monkeypatch.setattr(stopping.Raising, "notice_seconds", 0.05)

    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        finally:
            time.sleep(0.5)

    with pytest.raises(stopping.Stopped), stopping.Raising():
        work()
    assert "Ctrl-C: ending as soon as" in capfd.readouterr().err


@pytest.mark.parametrize("number", BOTH)
def test_signal_during_a_finalizer_is_not_lost(number):
    """Python drops exceptions that `__del__` raises."""

    class Closing:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(60)

    def work():
        Closing()
        time.sleep(60)

    with pytest.raises(stopping.Stopped) as stopped, stopping.Raising():
        work()
    assert stopped.value.number == number


def test_inner_context_receives_the_signals():
    with stopping.Raising() as outer:
        with stopping.Deferring("ending this step.") as inner:
            os.kill(os.getpid(), signal.SIGINT)
            _wait(until=lambda: inner.received)
        assert inner.received == signal.SIGINT
        outer.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
        _wait(0.05)


def test_ctrl_c_that_the_shell_has_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.Deferring("ending."):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_do_not_set_handlers(handlers):
    def check():
        with stopping.Deferring("ending.") as signals:
            assert {number: signal.getsignal(number) for number in BOTH} == handlers
            actual.append(signals.received)

    actual = []
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert actual == [None]


def _run(code, *numbers):
    """Runs code in a new process, and sends it a signal after each line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for number in numbers:
        lines.append(process.stdout.readline())
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, "".join(lines) + out, err


COMPILING = """
import hashlib, time
from dit_jax.system import stopping
with stopping.Deferring("ending this step.", at_end=lambda: print("at end")) as signals:
    print("begun")
    while not signals.received:
        time.sleep(0.01)
    print("compiling")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as in XLA, no handler of Python runs
print("not reached")
"""


def test_second_ctrl_c_ends_the_process_while_it_compiles():
    status, out, err = _run(COMPILING, signal.SIGINT, signal.SIGINT)
    assert status == 130
    assert "at end" in out
    assert "not reached" not in out
    assert err.splitlines() == [
        "Ctrl-C: ending this step. Ctrl-C again ends at once.",
        "Ctrl-C again: ended at once.",
    ]


WORKER = """
import multiprocessing, time
from dit_jax.system import stopping

def work():
    time.sleep(5)
    print("goes on")

multiprocessing.get_context("fork").Process(target=work).start()
with stopping.Deferring("ending this step.") as signals:
    print("begun")
    while not signals.received:
        time.sleep(0.01)
    print("ending")
    time.sleep(60)
"""


def test_second_ctrl_c_ends_worker_processes_too():
    status, out, _ = _run(WORKER, signal.SIGINT, signal.SIGINT)
    assert (status, out) == (130, "begun\nending\n")


def _report_whether_blocked(queue):
    queue.put(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_process_that_is_started_while_signals_are_blocked_gets_no_ctrl_c():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with stopping.block_signals():
        process = context.Process(target=_report_whether_blocked, args=(queue,))
        process.start()
    assert queue.get(timeout=60) is True
    process.join()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(BOTH)


PARENT = """
import multiprocessing, time
from dit_jax.system import stopping

def work():
    stopping.end_with_parent()
    time.sleep(60)

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
print(process.pid)
time.sleep(60)
"""


def test_worker_ends_with_its_parent():
    status, out, _ = _run(PARENT, signal.SIGKILL)
    assert status == -signal.SIGKILL
    worker = int(out)

    def ended():
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{worker}/stat") as file:  # Z: ended, but no process has waited for it
            return file.read().rpartition(")")[2].split()[0] == "Z"

    _wait(20, ended)
    assert ended()
