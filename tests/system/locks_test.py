"""A lock has one holder at a time, ends with its process, and a lost lock is noticed."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dit_jax import train, workdirs
from dit_jax.system import files, locks
from dit_jax.workdirs import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "train.lock"


def _start_holder(path):
    """Starts a process that holds the lock."""
    code = (
        "import pathlib, sys, time; from dit_jax.system import locks\n"
        "with locks.hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_second_holder_is_refused_with_a_description_of_the_first(path):
    with locks.hold(path):
        assert locks.is_held(path)
        with (
            pytest.raises(OSError, match=f"process {os.getpid()} on .*, since .* writes into it"),
            locks.hold(path),
        ):
            pytest.fail("held twice")
        assert locks.is_held(path)  # the refused process has not released it
    assert not path.exists()
    assert not locks.is_held(path)
    with locks.hold(path):
        pass


def test_lock_of_a_dead_process_does_not_block(path):
    process = _start_holder(path)
    with pytest.raises(OSError, match=f"process {process.pid} "), locks.hold(path):
        pytest.fail("held twice")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()  # nobody was left to remove it
    with locks.hold(path):
        assert locks.is_held(path)


def test_wait_ends_with_the_holder(path, caplog):
    process = _start_holder(path)
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    began = time.monotonic()
    with locks.hold(path, wait=True):
        assert time.monotonic() - began > 0.2
    process.wait()
    assert f"waiting for another command: process {process.pid}" in caplog.text


def test_testing_a_lock_does_not_prevent_holding_it(path):
    """Two processes test the lock all the time, while this process holds it a thousand times."""
    code = (
        "import pathlib, sys; from dit_jax.system import locks\nprint('testing', flush=True)\n"
        "while True: locks.is_held(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, path]
    testers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in testers:
            assert process.stdout.readline() == b"testing\n"
        for _ in range(1000):
            with locks.hold(path):
                assert locks.is_held(path)
    finally:
        for process in testers:
            process.kill()
            process.communicate()


def test_shared_lock_of_a_tester_does_not_count_as_held(path):
    path.parent.mkdir()
    path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not locks.is_held(path)


def test_lock_file_that_is_removed_before_it_is_locked_is_opened_again(path, monkeypatch):
    """The next process would lock a new file at the path."""
    plain, removed = locks._try_lock, []

    def try_lock(file):
        if not removed:
            removed.append(path.unlink())
        return plain(file)

    monkeypatch.setattr(locks, "_try_lock", try_lock)
    with locks.hold(path) as lock:
        lock.check()
        assert locks.is_held(path)


def test_lost_lock_and_vanished_directory_are_noticed(path):
    with locks.hold(path) as lock:
        lock.check()
        path.unlink()
        with pytest.raises(files.LostError, match=r"train\.lock was removed .*\n.*is kept"):
            lock.check()
        path.touch()
        with pytest.raises(OSError, match="removed or replaced"):
            lock.check()
        shutil.rmtree(path.parent)
        with pytest.raises(OSError, match=r"run is gone: it was removed or moved"):
            lock.check()
        assert not path.parent.exists()
        path.parent.mkdir()  # another command may recreate the directory
        path.touch()
        with pytest.raises(OSError, match=r"run is gone: it was removed or moved"):
            lock.check()


def test_lost_lock_does_not_remove_the_lock_of_another_command(path):
    with contextlib.ExitStack() as other_command:
        with locks.hold(path):
            path.unlink()
            lock = other_command.enter_context(locks.hold(path))
        lock.check()
        assert locks.is_held(path)
        with pytest.raises(OSError, match="writes into it"), locks.hold(path):
            pytest.fail("held twice")
    assert not path.exists()


def test_error_in_a_vanished_directory_becomes_a_lost_error(path):
    def fail(message):
        with locks.hold(path):
            if message == "cannot write a checkpoint":
                path.parent.rename(path.parent.with_name("moved"))
            raise OSError(message)

    with pytest.raises(files.LostError, match="run is gone") as error:
        fail("cannot write a checkpoint")
    assert "cannot write a checkpoint" in str(error.value.__cause__)
    with pytest.raises(OSError, match="no space") as error:
        fail("no space")
    assert not isinstance(error.value, files.LostError)


def test_file_system_without_locks_is_a_warning(path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(locks.UNSUPPORTED_ERRNOS[0], "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.hold(path) as lock:
        lock.check()
        path.parent.rename(path.parent.with_name("moved"))
        with pytest.raises(files.LostError, match=r"run is gone: it was removed or moved"):
            lock.check()
    assert "cannot be locked (No locks available): make sure that no other command" in caplog.text


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_file_instead_of_a_directory_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="a file: choose another"), locks.hold(tmp_path / name / "l"):
        pytest.fail("held")


@pytest.mark.parametrize("contents", [b"\xff{", b"[" * 10**5, b"9" * 10**5, b"[]"])
def test_damaged_lock_file_is_refused_without_a_description_of_the_holder(path, contents):
    with locks.hold(path):
        path.write_bytes(contents)
        with pytest.raises(OSError, match="another command writes into it"), locks.hold(path):
            pytest.fail("held twice")


def test_commands_write_nothing_into_a_workdir_that_another_command_holds(workdir, smoke_config):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    smoke_config.total_steps = 50
    with locks.hold(workdir / workdirs.LOCK):
        with pytest.raises(OSError, match=f"cannot write into {workdir}: process"):
            train.train_and_evaluate(smoke_config, workdir)
        with pytest.raises(OSError, match=f"cannot write into {workdir}: process"):
            checkpoint.replace_params(workdir, smoke_config, {}, 40, {})
        (workdir / workdirs.LOCK).unlink()
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    assert after.keys() == before.keys()
    del after[workdir / "checkpoints"], before[workdir / "checkpoints"]
    assert after == before


def test_training_stops_when_its_workdir_vanishes(smoke_config, tmp_path, monkeypatch):
    """Otherwise it would recreate the directory without the earlier files."""
    run, plain = tmp_path / "run", train.metric_log.MetricWriter.scalars

    def scalars(self, step, values):
        plain(self, step, values)
        if not (tmp_path / "moved").exists():  # a second rename would hide a recreated directory
            run.rename(tmp_path / "moved")

    monkeypatch.setattr(train.metric_log.MetricWriter, "scalars", scalars)
    with pytest.raises(OSError, match=r"run is gone: it was removed or moved"):
        train.train_and_evaluate(smoke_config, run)
    assert not run.exists()


@pytest.mark.parametrize(
    "write",
    ["checkpoint", *(pytest.param(w, marks=pytest.mark.slow) for w in ("log", "eval", "sample"))],
)
def test_training_writes_nothing_after_its_lock_is_lost(smoke_config, tmp_path, monkeypatch, write):
    """Another command may train there meanwhile."""
    due = {f"{name}_every_steps": 100 for name in ("log", "sample", "eval", "checkpoint")}
    smoke_config.update({**due, f"{write}_every_steps": 2, "checkpoint_best_metric": "eval_loss"})
    plain = train.loader.TrainIterator.__next__

    def lose(batches):
        (tmp_path / workdirs.LOCK).unlink(missing_ok=True)
        return plain(batches)

    monkeypatch.setattr(train.loader.TrainIterator, "__next__", lose)
    smoke_config.total_steps = 11  # the warm-up must be shorter
    with pytest.raises(files.LostError, match=r"train\.lock was removed or replaced"):
        train.train_and_evaluate(smoke_config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "best").exists()
    assert not list((tmp_path / "checkpoints").iterdir())
