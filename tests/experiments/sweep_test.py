"""A sweep checks its cells before they start, runs them, and records which have died."""

import fcntl
import shlex
import sys

import pytest
from helpers import tiny_sweep

from dit_jax.system import files
from experiments.scaling.cells import cell_run, grid, sweep


@pytest.fixture
def config(digits_dir):
    return tiny_sweep.make_sweep(digits_dir)


@pytest.fixture
def run_cells(config, swept):
    """run_cells(workdir): its cells, after copying the sweep's directory there, to change."""
    return lambda workdir: tiny_sweep.copy_cells(swept, workdir, config)


def test_cells_of_another_config_are_told_and_left_alone(run_cells, config, tmp_path):
    run_cells(tmp_path)
    config.base.optim.learning_rate = 0.01
    cells = grid.make_cells(config)
    before = [(tmp_path / cell.name / "cell.json").read_text() for cell in cells]
    with pytest.raises(ValueError, match=r"(?s)optim.learning_rate: .*optim.learning_rate: "):
        sweep.check(config.evaluate, cells, tmp_path)
    with pytest.raises(ValueError, match=r"optim\.learning_rate: workdir 0\.003, now 0\.01"):
        cell_run.run(cells[0], config.evaluate, tmp_path / cells[0].name)
    assert [(tmp_path / cell.name / "cell.json").read_text() for cell in cells] == before


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
    message = rf"trained to step 20 and has kept \[10, 20\], not the compute points \[{steps[0]}\]"
    with pytest.raises(ValueError, match=message):
        sweep.check(config.evaluate, grid.make_cells(config), tmp_path)


def test_sweep_whose_directory_goes_writes_nothing_there(config, tmp_path):
    """Also if something else, such as a checkpoint, has made a new directory of that name."""
    cell, *_ = grid.make_cells(config)
    workdir = tmp_path / "sweep"
    move = "import os, sys; os.rename(*sys.argv[1:]); os.makedirs(sys.argv[1] + '/x'); sys.exit(1)"
    commands = {cell.name: [sys.executable, "-c", move, str(workdir), str(tmp_path / "moved")]}
    with pytest.raises(files.LostError, match="sweep is gone"):
        sweep.run(config, [cell], commands, workdir, parallel=1)
    assert [path.name for path in workdir.iterdir()] == ["x"]


def test_process_that_dies_is_a_failure_and_an_interrupted_one_is_not(config, tmp_path):
    cells = grid.make_cells(config)
    ends = [9, cell_run.INTERRUPTED]
    commands = {
        cell.name: [sys.executable, "-c", f"print('hello'); raise SystemExit({end})"]
        for cell, end in zip(cells, ends, strict=True)
    }
    sweep.run(config, cells, commands, tmp_path, parallel=1)
    states = [cell_run.get_state(cell, config.evaluate, tmp_path / cell.name) for cell in cells]
    assert states == ["failed", "waiting"]
    assert "status 9" in cell_run.get_error(tmp_path / cells[0].name)
    assert (tmp_path / cells[0].name / "log.txt").read_text() == "hello\n"


def test_cell_that_another_process_runs_is_told(config, tmp_path, caplog):
    cells = grid.make_cells(config)
    held = tmp_path / cells[1].name / cell_run.LOCK
    held.parent.mkdir()
    commands = {cell.name: [sys.executable, "-c", ""] for cell in cells}
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep.run(config, cells, commands, tmp_path, parallel=1)
    (warning,) = [line for line in caplog.messages if "another process runs it" in line]
    assert warning.startswith(f"{cells[1].name}: ")
    caplog.clear()
    sweep.run(config, cells, commands, tmp_path, parallel=1)
    assert "another process" not in caplog.text


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
