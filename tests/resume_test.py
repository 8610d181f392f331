"""Whole processes: killed, asked to stop, run as two; the result is the uninterrupted one's."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close

from dit_jax.training import programs
from dit_jax.workdirs import checkpoint


def _flags(workdir, digits_dir, *flags, steps):
    """Of `dit_jax.train` on the smoke config."""
    own = ["--config", "configs/smoke.py", "--workdir", workdir]
    own += [f"--config.data.data_dir={digits_dir}", "--config.sample_every_steps=0"]
    return [*own, f"--config.total_steps={steps}", "--config.checkpoint_every_steps=4", *flags]


def _start(workdir, digits_dir, *flags, devices, steps):
    flags = _flags(workdir, digits_dir, *flags, steps=steps)
    return conftest.start("train", *flags, devices=devices)


def _start_pair(workdir, digits_dir, *flags, devices, steps):
    flags = _flags(workdir, digits_dir, *flags, steps=steps)
    return conftest.start_pair("train", *flags, devices=devices)


def _finish(process, *statuses):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode in (statuses or [0]), stderr
    return stdout + stderr


def _wait_for_step(workdir, process, step):
    """Until the log of a run has reached a step; the log is every step."""
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise TimeoutError(f"{workdir} did not reach step {step}")


def _final(workdir, config):
    """All of a finished run that must repeat: every bit of the state, and the log."""
    program = programs.make_program(config, jax.devices()[:1])
    with checkpoint.open_manager(workdir, config) as manager:
        state, data_state = checkpoint.restore_latest(manager, program.state)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("img_per_s", None)
    return jax.device_get(state), data_state, lines


DISTANCE = ["--config.fid.every_steps=5", "--config.fid.num_images=80", "--config.fid.steps=2"]
DISTANCE += ["--config.checkpoint_best_metric=fd_pixels_80"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "devices", "more"), [("fsdp", 2, DISTANCE), ("tensor", 1, [])], ids=["fsdp", "tensor"]
)
def test_two_processes_train_as_one(tmp_path, digits_dir, smoke_config, axis, devices, more):
    """Five steps on a mesh with an axis that spans the processes; both save one checkpoint.

    And the one with the least distance, where it is measured.
    """
    flags = ["--config.optim.warmup_steps=2", *more]
    flags += [f"--config.mesh.{axis}={2 * devices}", "--config.log_every_steps=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    outputs = [_finish(p) for p in _start_pair(two, digits_dir, *flags, devices=devices, steps=5)]
    assert f"{2 * devices} x cpu in 2 processes" in outputs[0]
    _finish(_start(one, digits_dir, *flags, devices=2 * devices, steps=5))

    smoke_config.update(total_steps=5)
    smoke_config.optim.warmup_steps = 2
    expected, actual = _final(one, smoke_config), _final(two, smoke_config)
    if more:
        distances = [run[2][-1].pop("fd_pixels_80") for run in (actual, expected)]
        assert_close(*distances, 1e-3)
        saved = [checkpoint.saved_values(workdir / "best")["value"] for workdir in (two, one)]
        assert saved == distances
    for line, other in zip(actual[2], expected[2], strict=True):
        assert_trees_close(line, other, 1e-5)
    parameters = (jax.flatten_util.ravel_pytree(run[0].params)[0] for run in (actual, expected))
    assert_close(*parameters, 1e-5)
    assert actual[1] == expected[1]


STOPPED = ["--config.log_every_steps=1", "--config.eval_every_steps=0", "--config.mesh.fsdp=2"]


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory, digits_dir):
    """A finished run of two processes. Do not change."""
    workdir = tmp_path_factory.mktemp("pair") / "whole"
    for process in _start_pair(workdir, digits_dir, *STOPPED, devices=1, steps=24):
        _finish(process)
    return workdir


@pytest.mark.slow
def test_two_processes_stop_together_and_agree_on_what_is_damaged(
    tmp_path, digits_dir, smoke_config, whole_pair
):
    """A signal reaches one process only; then a file that one of them wrote is cut."""
    broken = tmp_path / "broken"
    pair = _start_pair(broken, digits_dir, *STOPPED, devices=1, steps=24)
    _wait_for_step(broken, pair[0], 10)
    pair[1].send_signal(signal.SIGINT)
    outputs = [_finish(process, 143, 130) for process in pair]
    stopped_at = max(int(p.name) for p in (broken / "checkpoints").iterdir())
    assert 10 <= stopped_at < 24
    assert f"SIGTERM: step {stopped_at} is saved" in outputs[0]

    newest = broken / "checkpoints" / str(stopped_at) / "ema_params" / "ocdbt.process_1" / "d"
    path = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    outputs = [_finish(p) for p in _start_pair(broken, digits_dir, *STOPPED, devices=1, steps=24)]
    assert f"checkpoint {stopped_at} cannot be read" in outputs[0]
    assert (broken / "corrupt_checkpoints" / str(stopped_at)).is_dir()

    smoke_config.total_steps = 24
    expected, actual = _final(whole_pair, smoke_config), _final(broken, smoke_config)
    jax.tree.map(np.testing.assert_array_equal, actual[0], expected[0])
    assert actual[1:] == expected[1:]


def _start_with_workers(workdir, digits_dir):
    """(process, the log of its group): a run with two worker processes that has begun to compile.

    A terminal sends Ctrl-C to the process and its workers, as os.killpg does.
    """
    flags = _flags(workdir, digits_dir, "--config.data.num_workers=2", steps=100_000)
    command = [sys.executable, "-m", "dit_jax.train", *map(str, flags)]
    log = workdir.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=conftest.ROOT, stdout=file, stderr=file, start_new_session=True
        )
    _wait_until(lambda: "batch: 16" in log.read_text(), process)
    _wait_until(lambda: len(_children(process)) == 3, process)  # and Python's resource tracker
    return process, log


def _wait_until(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _children(process):
    path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    others = path.parents[1].glob("*/children")
    return [int(pid) for path in others for pid in path.read_text().split()]


def _wait_for_the_end_of(pids):
    deadline = time.monotonic() + 30
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_with_worker_processes_saves(tmp_path, digits_dir):
    process, log = _start_with_workers(tmp_path / "run", digits_dir)
    workers = _children(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(240) == 130
    assert "Traceback" not in log.read_text()
    assert re.search(r"^Ctrl-C: step \d+ is saved in ", log.read_text(), re.MULTILINE)
    _wait_for_the_end_of(workers)


@pytest.mark.slow
def test_second_ctrl_c_leaves_no_worker_processes(tmp_path, digits_dir):
    process, log = _start_with_workers(tmp_path / "run", digits_dir)
    workers = _children(process)
    os.killpg(process.pid, signal.SIGINT)
    _wait_until(lambda: "Ctrl-C: ending this step" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    _wait_for_the_end_of(workers)
    assert log.read_text().endswith("Ctrl-C again: ended at once.\n")


@pytest.mark.slow
def test_worker_processes_end_with_a_run_that_is_killed(tmp_path, digits_dir):
    process, _ = _start_with_workers(tmp_path / "run", digits_dir)
    workers = _children(process)
    time.sleep(10)  # they have begun
    process.kill()
    process.wait()
    _wait_for_the_end_of(workers)
