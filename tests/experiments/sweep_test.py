"""A sweep end to end: run, killed and continued, failed and retried, here or as jobs."""

import concurrent.futures
import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.close import assert_close

from dit_jax.evaluation import rows
from dit_jax.system import files, json_files, stopping
from experiments.scaling.cells import cell, collect, executors, grid, sweep
from experiments.scaling.configs import smoke
from experiments.scaling.fits import table


@pytest.fixture
def config(digits_dir):
    """Two cells of configs/smoke.py of sweeps, free to change."""
    config = smoke.get_config().unlock()
    config.base.data.data_dir = str(digits_dir)
    config.grids = dict(main=dict(size=("XS",), model=dict(patch_size=(2, 4))))
    config.steps = (10, 20)
    return config


@pytest.fixture
def run_cells(config, swept):
    """run_cells(workdir): its cells, after copying the sweep's directory there, to change."""

    def copy(workdir):
        shutil.copytree(swept, workdir, dirs_exist_ok=True)
        return grid.make_cells(config)

    return copy


def test_cells_are_trained_and_evaluated_at_every_compute_point(swept, config):
    for one in grid.make_cells(config):
        directory = swept / one.name
        assert cell.get_state(one, config.evaluate, directory) == "done"
        rows = json_files.read_json_lines(directory / "evaluations.jsonl")
        assert [row["step"] for row in rows] == [10, 20]
        assert {row["sample"]["num"] for row in rows} == {100}
        losses = json_files.read_json_lines(directory / "metrics.jsonl")
        assert [line["step"] for line in losses if "eval_loss" in line] == [10, 20]
    assert sweep.list_waiting(config, grid.make_cells(config), swept) == []


def test_done_cell_is_left_alone_and_changed_one_continues(run_cells, config, tmp_path):
    one, other = run_cells(tmp_path / "sweep")
    directory = tmp_path / "sweep" / one.name
    before = (directory / "evaluations.jsonl").read_text()
    cell.run(one, config.evaluate, directory)
    assert (directory / "evaluations.jsonl").read_text() == before
    config.evaluate.num = 50
    assert cell.get_state(one, config.evaluate, directory) == "begun"
    cell.run(one, config.evaluate, directory)
    rows = json_files.read_json_lines(directory / "evaluations.jsonl")
    assert [(row["step"], row["sample"]["num"]) for row in rows[2:]] == [(10, 50), (20, 50)]
    table = collect.collect(tmp_path / "sweep", cells=[one.name])
    assert [(row["step"], row["num"]) for row in table] == [(10, 50), (20, 50)]
    with pytest.raises(ValueError, match="num: 100 in 2 rows, 50 in 2 rows"):  # other is as before
        collect.collect(tmp_path / "sweep")
    assert len(collect.collect(tmp_path / "sweep", cells=[other.name])) == 2
    config.steps = (10, 20, 30)  # longer training: the same run goes on
    one, *_ = grid.make_cells(config)
    cell.run(one, config.evaluate, directory)
    steps = [line["step"] for line in json_files.read_json_lines(directory / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert steps[-1] == 30


def test_done_cell_that_lost_its_rows_or_pictures_is_measured_again(
    run_cells, config, tmp_path, caplog
):
    one, *_ = run_cells(tmp_path / "sweep")
    directory = tmp_path / "sweep" / one.name
    path = directory / "evaluations.jsonl"
    before = path.read_text()
    measured = [rows.get_measures(json.loads(line)) for line in before.splitlines()]
    path.unlink()
    assert cell.get_state(one, config.evaluate, directory) == "begun"
    cell.run(one, config.evaluate, directory)
    assert [
        rows.get_measures(json.loads(line)) for line in path.read_text().splitlines()
    ] == measured
    assert f"{one.name} has lost evaluations/10-" in caplog.text
    next(directory.glob("evaluations/20-*.png")).unlink()
    assert cell.get_state(one, config.evaluate, directory) == "begun"
    cell.run(one, config.evaluate, directory)
    assert cell.get_state(one, config.evaluate, directory) == "done"
    collect.collect(tmp_path / "sweep")
    assert "has lost the held-out loss" not in caplog.text
    (directory / "metrics.jsonl").unlink()
    collect.collect(tmp_path / "sweep")
    assert "metrics.jsonl has lost the held-out loss of steps 10, 20" in caplog.text


def test_failed_cell_is_recorded_left_alone_and_retried(config, tmp_path):
    config.evaluate.reference = str(tmp_path / "no.npz")
    one, *others = cells = grid.make_cells(config)
    with pytest.raises(FileNotFoundError):
        cell.run(one, config.evaluate, tmp_path / one.name)
    assert cell.get_state(one, config.evaluate, tmp_path / one.name) == "failed"
    assert "no.npz" in cell.get_error(tmp_path / one.name)
    assert sweep.list_waiting(config, cells, tmp_path) == others
    assert sweep.list_waiting(config, cells, tmp_path, retry_failed=True) == cells
    assert "failed: " in sweep.format_cells(config, cells, tmp_path)
    config.evaluate.reference = ""  # mended: another cell now, which has begun
    assert cell.get_state(one, config.evaluate, tmp_path / one.name) == "begun"


def test_sweep_of_losses_alone_draws_no_samples(run_cells, config, tmp_path):
    one, *_ = run_cells(tmp_path / "sweep")
    directory = tmp_path / "sweep" / one.name
    (directory / "evaluations.jsonl").unlink()
    config.evaluate.num = 0
    cell.run(one, config.evaluate, directory)
    assert cell.get_state(one, config.evaluate, directory) == "done"
    assert not (directory / "evaluations.jsonl").exists()


def test_cells_of_another_config_are_told_and_left_alone(run_cells, config, tmp_path):
    run_cells(tmp_path)
    config.base.optim.learning_rate = 0.01
    cells = grid.make_cells(config)
    before = [(tmp_path / one.name / "cell.json").read_text() for one in cells]
    with pytest.raises(ValueError, match=r"(?s)optim.learning_rate: .*optim.learning_rate: "):
        sweep.check(config.evaluate, cells, tmp_path)
    with pytest.raises(ValueError, match=r"optim\.learning_rate: workdir 0\.003, now 0\.01"):
        cell.run(cells[0], config.evaluate, tmp_path / cells[0].name)
    assert [(tmp_path / one.name / "cell.json").read_text() for one in cells] == before


def test_extractor_that_is_not_there_is_told_before_training(config, tmp_path):
    config.evaluate.extractor = "clip"
    cells = grid.make_cells(config)
    with pytest.raises(ValueError, match="unknown extractor='clip'; choose one of"):
        sweep.check(config.evaluate, cells, tmp_path)
    config.evaluate.num = 0
    sweep.check(config.evaluate, cells, tmp_path)


def test_other_draws_of_the_held_out_loss_are_another_config(run_cells, config, tmp_path):
    run_cells(tmp_path)
    config.base.eval_draws = 16
    with pytest.raises(ValueError, match="eval_draws: workdir 2, now 16"):
        sweep.check(config.evaluate, grid.make_cells(config), tmp_path)


@pytest.mark.parametrize("steps", [(5, 20), (15, 30)], ids=str)
def test_compute_points_that_are_gone_are_told_before_training(run_cells, config, tmp_path, steps):
    run_cells(tmp_path)
    config.steps = steps
    told = rf"trained to step 20 and has kept \[10, 20\], not the compute points \[{steps[0]}\]"
    with pytest.raises(ValueError, match=told):
        sweep.check(config.evaluate, grid.make_cells(config), tmp_path)


def test_wall_time_adds_up_over_runs_and_outlives_a_death(run_cells, config, tmp_path):
    one, *_ = run_cells(tmp_path)
    path = tmp_path / one.name / "cell.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"wall_seconds": 1000.0, "state": "begun"}))
    cell.run(one, config.evaluate, tmp_path / one.name)
    record = json.loads(path.read_text())
    assert 1000 < record["wall_seconds"] < 1300
    path.write_text(json.dumps(record | {"state": "begun"}))
    cell.record_failure(one, config.evaluate, tmp_path / one.name, "out of memory")
    assert json.loads(path.read_text())["wall_seconds"] == record["wall_seconds"]
    assert cell.get_error(tmp_path / one.name) == "out of memory"
    cell.forget_failure(one, config.evaluate, tmp_path / one.name)
    assert cell.get_state(one, config.evaluate, tmp_path / one.name) == "begun"
    cell.record_failure(one, config.evaluate, tmp_path / one.name, "of another kind")
    assert cell.get_error(tmp_path / one.name) == "of another kind"


STRANGE = (None, [], [1], {}, "x", True, -1, 1e400, {"a": [{}]})


def test_damaged_records_are_made_again(run_cells, config, tmp_path, caplog):
    one, *_ = run_cells(tmp_path)
    directory = tmp_path / one.name
    path = directory / "cell.json"
    text = path.read_text()
    record = json.loads(text)
    for key in record:
        for value in STRANGE:
            path.write_text(json.dumps(record | {key: value}))
            state = cell.get_state(one, config.evaluate, directory)
            assert state in ("waiting", "begun", "done")
            if state == "waiting":
                told = f"{path} is damaged: it is no record of a cell, with a wrong {key}; the cell"
                assert told in caplog.text
    path.write_text(json.dumps(record | {"state": {}, "wall_seconds": "x"}))
    assert sweep.list_waiting(config, [one], tmp_path) == [one]
    assert "waiting" in sweep.format_cells(config, [one], tmp_path)
    cell.run(one, config.evaluate, directory)
    made = json.loads(path.read_text())
    assert made["state"] == "done"
    assert made["pictures"] == record["pictures"]
    assert made["wall_seconds"] >= 0


def test_two_processes_do_not_run_a_cell_at_once(run_cells, config, tmp_path, monkeypatch):
    one, *_ = run_cells(tmp_path)
    config.evaluate.num = 0  # is not done
    began, waited = threading.Event(), []

    def train_and_evaluate(*_):
        began.set()
        time.sleep(1.0)
        waited.append(time.monotonic())
        return type("State", (), {"step": 20})()

    monkeypatch.setattr(cell.train, "train_and_evaluate", train_and_evaluate)
    directory = tmp_path / one.name
    first = threading.Thread(target=cell.run, args=(one, config.evaluate, directory))
    first.start()
    assert began.wait(60)
    cell.run(one, config.evaluate, directory)
    assert time.monotonic() >= waited[0]
    first.join()
    assert len(waited) == 1  # the second found it done


def test_cell_whose_training_was_stopped_is_not_done(config, tmp_path, monkeypatch):
    one, *_ = grid.make_cells(config)

    def stop(*_):
        raise stopping.Stopped(signal.SIGTERM, "step 10 is saved")

    monkeypatch.setattr(cell.train, "train_and_evaluate", stop)
    with pytest.raises(stopping.Stopped):
        cell.run(one, config.evaluate, tmp_path / one.name)
    assert cell.get_state(one, config.evaluate, tmp_path / one.name) == "begun"


def test_cell_on_a_full_disk_has_not_failed(config, tmp_path, monkeypatch):
    one, *_ = grid.make_cells(config)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoints")

    monkeypatch.setattr(cell.train, "train_and_evaluate", fail)
    with pytest.raises(OSError, match="No space left"):
        cell.run(one, config.evaluate, tmp_path / one.name)
    assert cell.get_state(one, config.evaluate, tmp_path / one.name) == "begun"


def test_sweep_whose_directory_goes_writes_nothing_there(config, tmp_path):
    """Also where a checkpoint, say, has made one of its name since."""
    one, *_ = grid.make_cells(config)
    workdir = tmp_path / "sweep"
    move = "import os, sys; os.rename(*sys.argv[1:]); os.makedirs(sys.argv[1] + '/x'); sys.exit(1)"
    commands = {one.name: [sys.executable, "-c", move, str(workdir), str(tmp_path / "moved")]}
    with pytest.raises(files.LostError, match="sweep is gone"):
        sweep.run(config, [one], commands, workdir, parallel=1)
    assert [path.name for path in workdir.iterdir()] == ["x"]


def test_cell_whose_directory_goes_writes_nothing_there(config, tmp_path, monkeypatch):
    one, *_ = grid.make_cells(config)

    def move(_, directory):
        directory.rename(tmp_path / "moved")
        directory.mkdir()  # by another command
        raise ValueError("this config cannot be")

    monkeypatch.setattr(cell.train, "train_and_evaluate", move)
    with pytest.raises(files.LostError, match=f"{one.name} is gone"):
        cell.run(one, config.evaluate, tmp_path / one.name)
    assert not list((tmp_path / one.name).iterdir())


def test_cell_of_a_sweep_that_was_moved_is_not_begun_anew(config, tmp_path):
    one, *_ = grid.make_cells(config)
    with pytest.raises(files.LostError, match=f"{one.name} is gone"):
        cell.run(one, config.evaluate, tmp_path / one.name, made=True)
    assert not list(tmp_path.iterdir())


def test_process_that_dies_is_a_failure_and_an_interrupted_one_is_not(config, tmp_path):
    cells = grid.make_cells(config)
    ends = [9, cell.INTERRUPTED]
    commands = {
        one.name: [sys.executable, "-c", f"print('hello'); raise SystemExit({end})"]
        for one, end in zip(cells, ends, strict=True)
    }
    sweep.run(config, cells, commands, tmp_path, parallel=1)
    states = [cell.get_state(one, config.evaluate, tmp_path / one.name) for one in cells]
    assert states == ["failed", "waiting"]
    assert "status 9" in cell.get_error(tmp_path / cells[0].name)
    assert (tmp_path / cells[0].name / "log.txt").read_text() == "hello\n"


def test_cell_that_another_process_runs_is_told(config, tmp_path, caplog):
    cells = grid.make_cells(config)
    held = tmp_path / cells[1].name / cell.LOCK
    held.parent.mkdir()
    commands = {one.name: [sys.executable, "-c", ""] for one in cells}
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep.run(config, cells, commands, tmp_path, parallel=1)
    (warning,) = [line for line in caplog.messages if "another process runs it" in line]
    assert warning.startswith(f"{cells[1].name}: ")
    caplog.clear()
    sweep.run(config, cells, commands, tmp_path, parallel=1)
    assert "another process" not in caplog.text


def _sleepers(tmp_path, count, seconds):
    """Commands that write when and on which cores they ran."""
    code = (
        "import json, os, sys, time; began = time.time(); time.sleep(float(sys.argv[2]));"
        "open(sys.argv[1], 'w').write(json.dumps([began, time.time(),"
        " sorted(os.sched_getaffinity(0)), os.environ.get('CUDA_VISIBLE_DEVICES')]))"
    )
    names = [f"cell{i}" for i in range(count)]
    commands = {name: [sys.executable, "-c", code, tmp_path / name, str(seconds)] for name in names}
    logs = {name: tmp_path / f"{name}.log" for name in names}
    return {name: list(map(str, words)) for name, words in commands.items()}, logs


def _overlap(one, other):
    return one[0] < other[1] and other[0] < one[1]


def test_one_cell_at_a_time_has_all_cores(tmp_path):
    commands, logs = _sleepers(tmp_path, 2, 0.1)
    assert dict(executors.run_local(commands, logs, 1)) == {"cell0": 0, "cell1": 0}
    ran = [json.loads((tmp_path / name).read_text()) for name in commands]
    assert not _overlap(*ran)
    assert {tuple(cores) for _, _, cores, _ in ran} == {tuple(sorted(os.sched_getaffinity(0)))}


@pytest.mark.parametrize("kind", ["GPU", "core"])
def test_cells_at_once_have_devices_of_their_own(tmp_path, monkeypatch, kind):
    if kind == "GPU":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    elif len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    commands, logs = _sleepers(tmp_path, 3, 0.5)
    before = os.sched_getaffinity(0)
    assert dict(executors.run_local(commands, logs, 2)) == dict.fromkeys(commands, 0)
    assert os.sched_getaffinity(0) == before
    ran = [json.loads((tmp_path / name).read_text()) for name in commands]
    pairs = [(a, b) for i, a in enumerate(ran) for b in ran[i + 1 :] if _overlap(a, b)]
    assert pairs
    own = 3 if kind == "GPU" else 2
    for one, other in pairs:
        assert not set(one[own]) & set(other[own])
    assert {one[3] for one in ran} == ({"3", "5"} if kind == "GPU" else {None})


def test_more_cells_at_once_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match="parallel=3 cells at a time need as many GPUs, not 2"):
        executors.split_devices(3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_signals_end_what_runs_by_sigterm_and_begin_nothing_more(tmp_path, number):
    """Ctrl-C too, which a terminal sends to all: a run saves at SIGTERM alone."""
    commands, logs = _sleepers(tmp_path, 3, 60)
    runs = executors.run_local(commands, logs, 1)
    previous = signal.getsignal(number)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    assert dict(runs) == {"cell0": -signal.SIGTERM}
    assert runs.stopped == number
    assert signal.getsignal(number) == previous


def test_what_runs_has_a_terminal_of_its_own(tmp_path):
    code = "import os; open(os.sys.argv[1], 'w').write(f'{os.getsid(0)} {os.getpid()}')"
    commands = {"cell": [sys.executable, "-c", f"import sys; {code}", str(tmp_path / "cell")]}
    assert dict(executors.run_local(commands, {"cell": tmp_path / "log"}, 1)) == {"cell": 0}
    session, process = (tmp_path / "cell").read_text().split()
    assert session == process


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
    assert "exit status 3" in next(folder.glob(f"{jobs['bad']}*err")).read_text()


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


def test_commands_for_another_scheduler_name_every_cell(run_command, tmp_path, digits_dir):
    flags = ["--config=experiments/scaling/configs/smoke.py", "--config.evaluate.num=77"]
    data_dir = f"--config.base.data.data_dir={digits_dir}"
    printed = run_command(
        "experiments.scaling.sweep", *flags, data_dir, f"--workdir={tmp_path}", "--executor=print"
    )
    words = [shlex.split(line) for line in printed.splitlines()]
    assert len(words) == 4
    assert words[0][:3] == ["python", "-m", "experiments.scaling.cell"]
    assert set(words[0][3:]) == {
        *flags,
        data_dir,
        "--name=XS-patch_size=4",
        f"--workdir={tmp_path}",
    }


def _run_flags(digits_dir, workdir):
    return [
        "--config=experiments/scaling/configs/smoke.py",
        "--config.grids.main.size=('XS',)",
        f"--config.base.data.data_dir={digits_dir}",
        f"--workdir={workdir}",
    ]


@pytest.mark.slow
def test_two_processes_run_a_cell_as_one_does(swept, config, digits_dir, tmp_path, run_pair):
    """As on a pod, where every host starts the cell's command."""
    (name,) = [one.name for one in grid.make_cells(config) if "patch_size=4" in one.name]
    flags = [*_run_flags(digits_dir, tmp_path), "--config.steps=(10, 20)", f"--name={name}"]
    run_pair("experiments.scaling.cell", *flags)
    rows = collect.collect(tmp_path)
    expected = [row for row in collect.collect(swept) if row["cell"] == name]
    assert len(rows) == len(expected) == 2
    for row, other in zip(rows, expected, strict=True):
        assert_close(row["eval_loss"], other["eval_loss"], 1e-4)
        assert_close(row["fd_pixels"], other["fd_pixels"], 1e-3)


def test_table_is_read_as_it_was_written(swept, tmp_path):
    rows = collect.collect(swept)
    table.write(tmp_path / "table.csv", rows)
    assert table.to_rows(table.read(tmp_path / "table.csv")) == rows
