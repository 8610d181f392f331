"""Commands of a sweep run here, with devices of their own, and end at a signal."""

import json
import os
import signal
import sys

import pytest

from experiments.scaling.cells import executors


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


def _overlap(first, second):
    return first[0] < second[1] and second[0] < first[1]


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
    devices = 3 if kind == "GPU" else 2
    for first, second in pairs:
        assert not set(first[devices]) & set(second[devices])
    assert {run[3] for run in ran} == ({"3", "5"} if kind == "GPU" else {None})


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
