"""Locks: one owner at a time, none after its process, and a lost one is noticed."""

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
    """A process that holds the lock."""
    code = (
        "import pathlib, sys, time; from dit_jax.system import locks\n"
        "with locks.hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_second_holder_is_refused_and_told_who_holds_it(path):
    with locks.hold(path):
        assert locks.is_held(path)
        with (
            pytest.raises(OSError, match=f"process {os.getpid()} on .*, since .* writes into it"),
            locks.hold(path),
        ):
            pytest.fail("held twice")
        assert locks.is_held(path)  # the refused one has not released it
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


def test_waits_for_the_holder_to_end(path, caplog):
    process = _start_holder(path)
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    began = time.monotonic()
    with locks.hold(path, wait=True):
        assert time.monotonic() - began > 0.2
    process.wait()
    assert f"waiting for another command: process {process.pid}" in caplog.text


def test_who_looks_at_a_lock_hinders_no_holder_and_sees_none(path):
    """Two processes look again and again while this one holds the lock a thousand times."""
    code = (
        "import pathlib, sys; from dit_jax.system import locks\nprint('looks', flush=True)\n"
        "while True: locks.is_held(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, path]
    lookers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in lookers:
            assert process.stdout.readline() == b"looks\n"
        for _ in range(1000):
            with locks.hold(path):
                assert locks.is_held(path)
    finally:
        for process in lookers:
            process.kill()
            process.communicate()
    path.touch()  # as a killed holder leaves it
    with path.open() as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        assert not locks.is_held(path)


def test_who_opened_a_lock_before_it_was_removed_does_not_hold_it(path, monkeypatch):
    """Its file is no longer the one that the next process will lock."""
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
        path.parent.mkdir()  # by whoever had something to write into it still
        path.touch()
        with pytest.raises(OSError, match=r"run is gone: it was removed or moved"):
            lock.check()


def test_lock_that_another_command_has_taken_over_stays_its_own(path):
    """Its file was removed and made anew; who lost it must not remove that one."""
    with contextlib.ExitStack() as others:
        with locks.hold(path):
            path.unlink()
            lock = others.enter_context(locks.hold(path))
        lock.check()
        assert locks.is_held(path)
        with pytest.raises(OSError, match="writes into it"), locks.hold(path):
            pytest.fail("held twice")
    assert not path.exists()


def test_what_cannot_be_written_into_a_vanished_directory_says_that_it_vanished(path):
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


def test_file_system_without_locks_is_said(path, monkeypatch, caplog):
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
def test_file_instead_of_a_directory_is_said(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="a file: choose another"), locks.hold(tmp_path / name / "l"):
        pytest.fail("held")


@pytest.mark.parametrize("contents", [b"\xff{", b"[" * 10**5, b"9" * 10**5, b"[]"])
def test_damaged_lock_file_names_no_holder(path, contents):
    with locks.hold(path):
        path.write_bytes(contents)
        with pytest.raises(OSError, match="another command writes into it"), locks.hold(path):
            pytest.fail("held twice")


def test_no_command_writes_into_the_workdir_of_a_run(workdir, smoke_config):
    """Nothing there changes while another command holds it."""
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
    """It does not make the directory anew, without what was in it."""
    run, plain = tmp_path / "run", train.metric_log.MetricWriter.scalars

    def scalars(self, step, values):
        plain(self, step, values)
        if not (tmp_path / "moved").exists():  # moved a second time, it would hide a new one
            run.rename(tmp_path / "moved")

    monkeypatch.setattr(train.metric_log.MetricWriter, "scalars", scalars)
    with pytest.raises(OSError, match=r"run is gone: it was removed or moved"):
        train.train_and_evaluate(smoke_config, run)
    assert not run.exists()


@pytest.mark.parametrize(
    "write",
    ["checkpoint", *(pytest.param(w, marks=pytest.mark.slow) for w in ("log", "eval", "sample"))],
)
def test_training_whose_lock_is_lost_writes_nothing_more(
    smoke_config, tmp_path, monkeypatch, write
):
    """Another command may train there by then."""
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
