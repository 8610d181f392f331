"""Cells of a sweep become jobs of Slurm, which is faked."""

import concurrent.futures
import os
import subprocess
import sys
import time

import pytest

from experiments.scaling.cells import executors, sweep
from experiments.scaling.configs import smoke


@pytest.fixture
def config():
    return smoke.get_config().unlock()


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """sbatch that keeps its script, and sacct that says what the file 'state' does."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "sbatch": f'cp "$1" {tmp_path}/script; echo "Submitted batch job 12"',
        "sacct": f'echo "JobID|State|NodeList"; echo "12_1|$(cat {tmp_path}/state)|n1"',
        "srun": "exit 1",
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def test_slurm_is_asked_for_what_the_config_says(fake_slurm, config):
    config.slurm.update(partition="gpu", gpus_per_node=4, timeout_min=90, jobs_at_once=1)
    folder = fake_slurm / "slurm"
    jobs = executors.submit({"a": ["true"], "b": ["true"]}, folder, config.slurm)
    assert jobs == {"a": "12_0", "b": "12_1"}
    script = (fake_slurm / "script").read_text()
    for line in ("array=0-1%1", "partition=gpu", "gpus-per-node=4", "time=90", "cpus-per-task=8"):
        assert f"#SBATCH --{line}" in script
    for state, ended in (("PENDING", False), ("RUNNING", False), ("COMPLETED", True)):
        (fake_slurm / "state").write_text(state)
        assert executors.has_ended("12_1", folder) == ended


def test_cells_whose_jobs_wait_or_run_are_not_submitted_again(fake_slurm, config, capsys):
    config.slurm.update(nodes=2)
    (fake_slurm / "state").write_text("PENDING")
    commands = {"a": ["python", "a"], "b": ["python", "b"]}
    sweep.submit(config, commands, fake_slurm)
    assert [(fake_slurm / name / "job").read_text() for name in commands] == ["12_0", "12_1"]
    pickled = [path.read_bytes() for path in (fake_slurm / "slurm").glob("*submitted.pkl")]
    assert pickled
    assert all(b"--distributed" in job for job in pickled)
    (fake_slurm / "script").unlink()
    sweep.submit(config, commands, fake_slurm)
    assert not (fake_slurm / "script").exists()
    assert "a: queued or running" in capsys.readouterr().out
    (fake_slurm / "state").write_text("COMPLETED")  # 12_1, which is b's
    sweep.submit(config, {"b": commands["b"]}, fake_slurm)
    assert (fake_slurm / "script").exists()


@pytest.mark.parametrize("contents", [b"", b"--help", b"\xff", b"1" * 100], ids=str)
def test_file_that_holds_no_job_is_named(fake_slurm, config, contents):
    (fake_slurm / "a").mkdir()
    (fake_slurm / "a" / "job").write_bytes(contents)
    if contents == b"1" * 100:
        os.truncate(fake_slurm / "a" / "job", 2**40)  # sparse: as large as no memory
    with pytest.raises(ValueError, match=f"{fake_slurm}/a/job holds .*, which is no id of a Slurm"):
        sweep.submit(config, {"a": ["python", "a"]}, fake_slurm)


def test_jobs_run_through_submitit(tmp_path, config):
    """Slurm's executor, with submitit's own scheduler in its place."""
    config.slurm.update(timeout_min=5)
    commands = {
        "good": [sys.executable, "-c", f"open({str(tmp_path / 'good')!r}, 'w').write('done')"],
        "bad": [sys.executable, "-c", "raise SystemExit(3)"],
    }
    folder = tmp_path / "slurm"
    jobs = executors.submit(commands, folder, config.slurm, cluster="local")
    assert jobs.keys() == commands.keys()
    until = time.monotonic() + 60
    while len(list(folder.glob("*_result.pkl"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert (tmp_path / "good").read_text() == "done"
    (log,) = folder.glob(f"{jobs['bad']}*err")
    while "exit status 3" not in log.read_text():  # a job writes its result before its error
        assert time.monotonic() < until
        time.sleep(0.2)


def test_job_saves_at_submitit_s_signal_and_waits_again(tmp_path):
    """And ignores the signal itself, which Slurm sends to the command too."""
    code = (
        "import os, signal, sys, time\n"
        "def save(*_):\n"
        "    open(sys.argv[1], 'w').write('saved')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "with open(sys.argv[1] + '.runs', 'w') as file:\n"  # closed here, where save may raise
        "    file.write('yes')\n"
        "time.sleep(60)\n"
    )
    job = executors.Job([sys.executable, "-c", code, str(tmp_path / "cell")])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        call = pool.submit(job)
        while not (tmp_path / "cell.runs").exists():
            assert not call.done()
            time.sleep(0.05)
        again = job.checkpoint()
        with pytest.raises(subprocess.CalledProcessError, match="status 75"):
            call.result()
    assert (tmp_path / "cell").read_text() == "saved"
    assert isinstance(again.function, executors.Job)


def test_slurm_that_is_not_there_is_told(tmp_path, config):
    with pytest.raises(ValueError, match=r"needs Slurm's commands.*--executor print"):
        executors.submit({"cell": ["true"]}, tmp_path, config.slurm)
