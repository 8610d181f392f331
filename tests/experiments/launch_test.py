"""The scripts that take a sweep to other machines, with the machines' commands faked."""

import json
import os
import shlex
import subprocess
import sys

import conftest
import pytest

FAKE = """#!/bin/sh
cat >/dev/null  # as ssh reads what there is
exec {python} -c 'import json, sys; open("{log}", "a").write(json.dumps(sys.argv[1:]) + "\\n")' "$@"
"""


@pytest.fixture
def launch(tmp_path, digits_dir):
    """launch("tpu_pod.sh", "gcloud", **variables): (flags of the sweep, calls of gcloud)."""

    def run(script, program, **variables):
        (tmp_path / "bin").mkdir()
        fake, log = tmp_path / "bin" / program, tmp_path / "calls"
        fake.write_text(FAKE.format(python=sys.executable, log=log))
        fake.chmod(0o755)
        flags = ["--config=experiments/scaling/configs/smoke.py", f"--workdir={tmp_path}"]
        path = f"{fake.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [conftest.ROOT / "experiments" / "launch" / script, *flags],
            env=os.environ | {"PATH": path, "PYTHON": sys.executable, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        calls = log.read_text().splitlines() if log.exists() else []
        return done, flags, [json.loads(line) for line in calls]

    return run


CELLS = ["XS-patch_size=4", "XS-patch_size=2", "S-patch_size=4", "S-patch_size=2"]


def _cells(commands):
    return [shlex.split(c)[-3].removeprefix("--name=") for c in commands]


def test_every_host_of_a_slice_runs_every_cell(launch):
    done, flags, calls = launch("tpu_pod.sh", "gcloud", TPU="slice", ZONE="here")
    assert done.returncode == 0, done.stderr
    for call in calls:
        ssh = ["compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=here", "--worker=all"]
        assert call[:-1] == ssh
    commands = [call[-1].removeprefix("--command=") for call in calls]
    assert _cells(commands) == CELLS
    start = "cd dit_jax && PATH=$PWD/.venv/bin:$PATH python -m experiments.scaling.cell "
    assert all(command.startswith(start) for command in commands)
    assert all(command.endswith(f"{flags[1]} --distributed") for command in commands)


def test_every_cell_is_a_workload(launch):
    variables = dict(CLUSTER="c", TPU_TYPE="v5litepod-16", IMAGE="image", STORAGE="share")
    done, _, calls = launch("gke_xpk.sh", "xpk", **variables)
    assert done.returncode == 0, done.stderr
    assert [call[-2] for call in calls] == [f"--workload=dit-{i}" for i in range(4)]
    assert _cells([call[-1].removeprefix("--command=") for call in calls]) == CELLS
    assert all(call[:2] == ["workload", "create"] for call in calls)
    assert {"--cluster=c", "--docker-image=image", "--storage=share"} <= set(calls[0])


@pytest.mark.parametrize(
    ("script", "message"),
    [("tpu_pod.sh", "TPU: is the name of the slice"), ("gke_xpk.sh", "CLUSTER")],
)
def test_missing_variables_are_told(launch, script, message):
    done, _, calls = launch(script, "gcloud")
    assert done.returncode != 0
    assert message in done.stderr
    assert calls == []
