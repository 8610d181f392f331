"""Whole processes: killed, asked to stop, run as two; the result is the uninterrupted one's."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dit_jax import checkpoint, train

ROOT = pathlib.Path(__file__).parents[1]


def _start(workdir, digits_dir, *flags, devices=1):
    """Begins `python -m dit_jax.train` on the smoke config, 60 steps."""
    command = [sys.executable, "-m", "dit_jax.train", "--config", "configs/smoke.py"]
    command += ["--workdir", str(workdir), f"--config.data.data_dir={digits_dir}"]
    command += ["--config.total_steps=60", "--config.checkpoint_every_steps=4"]
    command += ["--config.sample_every_steps=0", *flags]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _finish(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
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
    program = train.make_program(config, jax.devices()[:1])
    with checkpoint.open_manager(workdir, config) as manager:
        state, data_state = checkpoint.restore_latest(manager, program.state)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("img_per_s", None)
    return jax.device_get(state), data_state, lines


def test_killed_and_stopped_runs_end_as_the_uninterrupted_one(tmp_path, digits_dir, smoke_config):
    flags = ["--config.log_every_steps=1", "--config.eval_every_steps=0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(_start(whole, digits_dir, *flags))

    process = _start(broken, digits_dir, *flags)
    step = random.randrange(6, 30)  # any step must do: the test says which it was
    _wait_for_step(broken, process, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = len((broken / "metrics.jsonl").read_text().splitlines())
    print(f"killed at step {killed_at}")
    assert killed_at < 60

    process = _start(broken, digits_dir, *flags)
    _wait_for_step(broken, process, killed_at + 8)
    process.send_signal(signal.SIGTERM)
    output = _finish(process)  # exit status 0
    assert "SIGTERM: saving step" in output
    assert "resuming from checkpoint" in output
    stopped_at = max(int(p.name) for p in (broken / "checkpoints").iterdir())
    assert killed_at < stopped_at < 60
    assert f"SIGTERM: saving step {stopped_at};" in output

    output = _finish(_start(broken, digits_dir, *flags))
    assert f"resuming from checkpoint {stopped_at}" in output

    smoke_config.total_steps = 60
    expected, actual = _final(whole, smoke_config), _final(broken, smoke_config)
    jax.tree.map(np.testing.assert_array_equal, actual[0], expected[0])
    assert actual[1:] == expected[1:]
    assert [line["step"] for line in actual[2]] == list(range(1, 61))


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one(tmp_path, digits_dir, smoke_config):
    """Five steps on a mesh whose fsdp axis spans the processes; both save one checkpoint."""
    flags = ["--config.total_steps=5", "--config.optim.warmup_steps=2", "--config.mesh.fsdp=4"]
    flags += ["--config.log_every_steps=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    address = f"localhost:{_free_port()}"
    pair = [
        _start(
            two,
            digits_dir,
            *flags,
            f"--coordinator_address={address}",
            "--num_processes=2",
            f"--process_id={i}",
            devices=2,
        )
        for i in range(2)
    ]
    outputs = [_finish(process) for process in pair]
    assert "4 x cpu in 2 processes" in outputs[0]
    _finish(_start(one, digits_dir, *flags, devices=4))

    smoke_config.update(total_steps=5)
    smoke_config.optim.warmup_steps = 2
    expected, actual = _final(one, smoke_config), _final(two, smoke_config)
    for line, other in zip(actual[2], expected[2], strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5),
        actual[0].params,
        expected[0].params,
    )
    assert actual[1] == expected[1]
