"""The run of a cell: trained, evaluated, interrupted, damaged and continued."""

import errno
import json
import signal
import threading
import time

import pytest
from helpers import tiny_sweep
from helpers.close import assert_close

from dit_jax.evaluation import rows
from dit_jax.system import files, json_files, stopping
from experiments.scaling.cells import cell_run, collect, grid, sweep


@pytest.fixture
def config(digits_dir):
    return tiny_sweep.make_sweep(digits_dir)


@pytest.fixture
def run_cells(config, swept):
    """run_cells(workdir): its cells, after copying the sweep's directory there, to change."""
    return lambda workdir: tiny_sweep.copy_cells(swept, workdir, config)


def test_cells_are_trained_and_evaluated_at_every_compute_point(swept, config):
    for cell in grid.make_cells(config):
        directory = swept / cell.name
        assert cell_run.get_state(cell, config.evaluate, directory) == "done"
        evaluations = json_files.read_json_lines(directory / "evaluations.jsonl")
        assert [row["step"] for row in evaluations] == [10, 20]
        assert {row["sample"]["num"] for row in evaluations} == {100}
        losses = json_files.read_json_lines(directory / "metrics.jsonl")
        assert [line["step"] for line in losses if "eval_loss" in line] == [10, 20]
    assert sweep.list_waiting(config, grid.make_cells(config), swept) == []


def test_done_cell_is_left_alone_and_changed_one_continues(run_cells, config, tmp_path):
    cell, other_cell = run_cells(tmp_path / "sweep")
    directory = tmp_path / "sweep" / cell.name
    before = (directory / "evaluations.jsonl").read_text()
    cell_run.run(cell, config.evaluate, directory)
    assert (directory / "evaluations.jsonl").read_text() == before
    config.evaluate.num = 50
    assert cell_run.get_state(cell, config.evaluate, directory) == "begun"
    cell_run.run(cell, config.evaluate, directory)
    evaluations = json_files.read_json_lines(directory / "evaluations.jsonl")[2:]
    assert [(row["step"], row["sample"]["num"]) for row in evaluations] == [(10, 50), (20, 50)]
    table = collect.collect(tmp_path / "sweep", cells=[cell.name])
    assert [(row["step"], row["num"]) for row in table] == [(10, 50), (20, 50)]
    with pytest.raises(ValueError, match="num: 100 in 2 rows, 50 in 2 rows"):  # of other_cell
        collect.collect(tmp_path / "sweep")
    assert len(collect.collect(tmp_path / "sweep", cells=[other_cell.name])) == 2
    config.steps = (10, 20, 30)  # longer training: the same run goes on
    cell, *_ = grid.make_cells(config)
    cell_run.run(cell, config.evaluate, directory)
    steps = [line["step"] for line in json_files.read_json_lines(directory / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert steps[-1] == 30


def test_done_cell_that_lost_its_rows_or_pictures_is_measured_again(
    run_cells, config, tmp_path, caplog
):
    cell, *_ = run_cells(tmp_path / "sweep")
    directory = tmp_path / "sweep" / cell.name
    path = directory / "evaluations.jsonl"
    before = path.read_text()
    measured = [rows.get_measures(json.loads(line)) for line in before.splitlines()]
    path.unlink()
    assert cell_run.get_state(cell, config.evaluate, directory) == "begun"
    cell_run.run(cell, config.evaluate, directory)
    again = [rows.get_measures(json.loads(line)) for line in path.read_text().splitlines()]
    assert again == measured
    assert f"{cell.name} has lost evaluations/10-" in caplog.text
    next(directory.glob("evaluations/20-*.png")).unlink()
    assert cell_run.get_state(cell, config.evaluate, directory) == "begun"
    cell_run.run(cell, config.evaluate, directory)
    assert cell_run.get_state(cell, config.evaluate, directory) == "done"
    collect.collect(tmp_path / "sweep")
    assert "has lost the held-out loss" not in caplog.text
    (directory / "metrics.jsonl").unlink()
    collect.collect(tmp_path / "sweep")
    assert "metrics.jsonl has lost the held-out loss of steps 10, 20" in caplog.text


def test_failed_cell_is_recorded_left_alone_and_retried(config, tmp_path):
    config.evaluate.reference = str(tmp_path / "no.npz")
    cell, *other_cells = cells = grid.make_cells(config)
    with pytest.raises(FileNotFoundError):
        cell_run.run(cell, config.evaluate, tmp_path / cell.name)
    assert cell_run.get_state(cell, config.evaluate, tmp_path / cell.name) == "failed"
    assert "no.npz" in cell_run.get_error(tmp_path / cell.name)
    assert sweep.list_waiting(config, cells, tmp_path) == other_cells
    assert sweep.list_waiting(config, cells, tmp_path, retry_failed=True) == cells
    assert "failed: " in sweep.format_cells(config, cells, tmp_path)
    config.evaluate.reference = ""  # another evaluation, so the record counts as begun
    assert cell_run.get_state(cell, config.evaluate, tmp_path / cell.name) == "begun"


def test_sweep_of_losses_alone_draws_no_samples(run_cells, config, tmp_path):
    cell, *_ = run_cells(tmp_path / "sweep")
    directory = tmp_path / "sweep" / cell.name
    (directory / "evaluations.jsonl").unlink()
    config.evaluate.num = 0
    cell_run.run(cell, config.evaluate, directory)
    assert cell_run.get_state(cell, config.evaluate, directory) == "done"
    assert not (directory / "evaluations.jsonl").exists()


def test_wall_time_adds_up_over_runs_and_outlives_a_death(run_cells, config, tmp_path):
    cell, *_ = run_cells(tmp_path)
    path = tmp_path / cell.name / "cell.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"wall_seconds": 1000.0, "state": "begun"}))
    cell_run.run(cell, config.evaluate, tmp_path / cell.name)
    record = json.loads(path.read_text())
    assert 1000 < record["wall_seconds"] < 1300
    path.write_text(json.dumps(record | {"state": "begun"}))
    cell_run.record_failure(cell, config.evaluate, tmp_path / cell.name, "out of memory")
    assert json.loads(path.read_text())["wall_seconds"] == record["wall_seconds"]
    assert cell_run.get_error(tmp_path / cell.name) == "out of memory"
    cell_run.forget_failure(cell, config.evaluate, tmp_path / cell.name)
    assert cell_run.get_state(cell, config.evaluate, tmp_path / cell.name) == "begun"
    cell_run.record_failure(cell, config.evaluate, tmp_path / cell.name, "of another kind")
    assert cell_run.get_error(tmp_path / cell.name) == "of another kind"


STRANGE = (None, [], [1], {}, "x", True, -1, 1e400, {"a": [{}]})


def test_damaged_records_are_made_again(run_cells, config, tmp_path, caplog):
    cell, *_ = run_cells(tmp_path)
    directory = tmp_path / cell.name
    path = directory / "cell.json"
    text = path.read_text()
    record = json.loads(text)
    for key in record:
        for value in STRANGE:
            path.write_text(json.dumps(record | {key: value}))
            state = cell_run.get_state(cell, config.evaluate, directory)
            assert state in ("waiting", "begun", "done")
            if state == "waiting":
                message = (
                    f"{path} is damaged: it is no record of a cell, with a wrong {key}; the cell"
                )
                assert message in caplog.text
    path.write_text(json.dumps(record | {"state": {}, "wall_seconds": "x"}))
    assert sweep.list_waiting(config, [cell], tmp_path) == [cell]
    assert "waiting" in sweep.format_cells(config, [cell], tmp_path)
    cell_run.run(cell, config.evaluate, directory)
    made = json.loads(path.read_text())
    assert made["state"] == "done"
    assert made["pictures"] == record["pictures"]
    assert made["wall_seconds"] >= 0


def test_two_processes_do_not_run_a_cell_at_once(run_cells, config, tmp_path, monkeypatch):
    cell, *_ = run_cells(tmp_path)
    config.evaluate.num = 0  # is not done
    began, waited = threading.Event(), []

    def train_and_evaluate(*_):
        began.set()
        time.sleep(1.0)
        waited.append(time.monotonic())
        return type("State", (), {"step": 20})()

    monkeypatch.setattr(cell_run.train, "train_and_evaluate", train_and_evaluate)
    directory = tmp_path / cell.name
    first = threading.Thread(target=cell_run.run, args=(cell, config.evaluate, directory))
    first.start()
    assert began.wait(60)
    cell_run.run(cell, config.evaluate, directory)
    assert time.monotonic() >= waited[0]
    first.join()
    assert len(waited) == 1  # the second found it done


def test_cell_whose_training_was_stopped_is_not_done(config, tmp_path, monkeypatch):
    cell, *_ = grid.make_cells(config)

    def stop(*_):
        raise stopping.Stopped(signal.SIGTERM, "step 10 is saved")

    monkeypatch.setattr(cell_run.train, "train_and_evaluate", stop)
    with pytest.raises(stopping.Stopped):
        cell_run.run(cell, config.evaluate, tmp_path / cell.name)
    assert cell_run.get_state(cell, config.evaluate, tmp_path / cell.name) == "begun"


def test_cell_on_a_full_disk_has_not_failed(config, tmp_path, monkeypatch):
    cell, *_ = grid.make_cells(config)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoints")

    monkeypatch.setattr(cell_run.train, "train_and_evaluate", fail)
    with pytest.raises(OSError, match="No space left"):
        cell_run.run(cell, config.evaluate, tmp_path / cell.name)
    assert cell_run.get_state(cell, config.evaluate, tmp_path / cell.name) == "begun"


def test_cell_whose_directory_goes_writes_nothing_there(config, tmp_path, monkeypatch):
    cell, *_ = grid.make_cells(config)

    def move(_, directory):
        directory.rename(tmp_path / "moved")
        directory.mkdir()  # by another command
        raise ValueError("this config cannot be")

    monkeypatch.setattr(cell_run.train, "train_and_evaluate", move)
    with pytest.raises(files.LostError, match=f"{cell.name} is gone"):
        cell_run.run(cell, config.evaluate, tmp_path / cell.name)
    assert not list((tmp_path / cell.name).iterdir())


def test_cell_of_a_sweep_that_was_moved_is_not_begun_anew(config, tmp_path):
    cell, *_ = grid.make_cells(config)
    with pytest.raises(files.LostError, match=f"{cell.name} is gone"):
        cell_run.run(cell, config.evaluate, tmp_path / cell.name, made_by_sweep=True)
    assert not list(tmp_path.iterdir())


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
    (name,) = [cell.name for cell in grid.make_cells(config) if "patch_size=4" in cell.name]
    flags = [*_run_flags(digits_dir, tmp_path), "--config.steps=(10, 20)", f"--name={name}"]
    run_pair("experiments.scaling.cell", *flags)
    rows = collect.collect(tmp_path)
    expected = [row for row in collect.collect(swept) if row["cell"] == name]
    assert len(rows) == len(expected) == 2
    for row, other in zip(rows, expected, strict=True):
        assert_close(row["eval_loss"], other["eval_loss"], 1e-4)
        assert_close(row["fd_pixels"], other["fd_pixels"], 1e-3)
