"""The commands that the campaign interrupts, and all of their results that must repeat."""

import hashlib
import json
import pathlib
import socket
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dit_jax import workdirs
from dit_jax.training import programs
from dit_jax.workdirs import checkpoint

OTHERS = ("img_per_s", "seconds", "git_revision")  # of a line of metrics or a row: may differ
STEPS = 24


class Job(NamedTuple):
    """A command that writes into a directory."""

    # (the directory, the inputs) -> the words of each of its processes
    words: Callable[[pathlib.Path, pathlib.Path], list[list[str]]]
    # directory -> {name of a result: what it is}
    results: Callable[[pathlib.Path], dict[str, str]]
    devices: int = 1  # of all processes
    begins_with: str = ""  # the input that its directory is a copy of


def _train(directory, inputs):
    words = ["dit_jax.train", "--config=configs/smoke.py", f"--workdir={directory}"]
    words += [f"--config.data.data_dir={inputs / 'data'}", f"--config.total_steps={STEPS}"]
    words += ["--config.checkpoint_every_steps=5", "--config.log_every_steps=3"]
    words += ["--config.eval_every_steps=12", "--config.sample_every_steps=12"]
    return [[*words, "--config.sample.steps=2", "--config.data.eval_split=test[:32]"]]


def _train_pair(directory, inputs):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    (words,) = _train(directory, inputs)
    words += ["--config.mesh.fsdp=2", *flags]
    return [[*words, f"--process_id={i}"] for i in range(2)]


def _encode(directory, inputs):
    words = ["dit_jax.encode", "--config=configs/smoke.py", f"--vae={inputs / 'vae'}"]
    words += [f"--config.data.data_dir={inputs / 'data'}", f"--out={directory}"]
    words += ["--config.data.flip=True", "--shard_images=16", "--batch_size=4"]
    return [[*words, "--config.data.eval_split=test[:64]"]]


def _evaluate(directory, inputs):
    words = ["dit_jax.evaluate", f"--workdir={directory}", "--extractor=pixels", "--steps=2"]
    return [[*words, "--num=600", "--batch_size=8", f"--reference={inputs / 'reference.npz'}"]]


def _sweep(directory, inputs):
    words = ["experiments.scaling.sweep", "--config=experiments/scaling/configs/smoke.py"]
    words += [f"--workdir={directory}", f"--config.base.data.data_dir={inputs / 'data'}"]
    words += ["--config.grids.main.size=('XS',)", "--config.steps=(4,8)", "--retry_failed"]
    words += ["--config.base.optim.warmup_steps=2", "--config.base.checkpoint_every_steps=2"]
    return [[*words, "--config.evaluate.num=32"]]


def _lines(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OTHERS} for line in lines]


def _hash(contents):
    return hashlib.sha256(contents).hexdigest()[:16]


def _of_run(directory, samples=True):
    """Every bit of the final state, the log, the pictures."""
    config = workdirs.load_config(directory)
    program = programs.make_program(config, jax.devices()[: max(1, config.mesh.fsdp)])
    with checkpoint.open_manager(directory, config) as manager:
        state, data_state = checkpoint.restore_latest(manager, program.state)
    actual = {
        f"state{jax.tree_util.keystr(path)}": _hash(np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    }
    actual["data"] = json.dumps(data_state)
    for line in _lines(directory / "metrics.jsonl"):
        actual[f"metrics.jsonl {line['step']} {sorted(line)}"] = json.dumps(line)
    for path in sorted(directory.glob("samples/*")):
        actual[f"samples/{path.name}"] = _hash(path.read_bytes())
    return actual


def _of_encode(directory):
    return {
        str(path.relative_to(directory)): _hash(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def _of_evaluate(directory):
    # Where code is not committed a row is measured again, and written again.
    rows = {json.dumps(line): None for line in _lines(directory / "evaluations.jsonl")}
    actual = {f"evaluations.jsonl {i}": row for i, row in enumerate(rows)}
    for path in sorted(directory.glob("evaluations/*")):
        actual[f"evaluations/{path.name}"] = _hash(path.read_bytes())
    return actual


def _of_sweep(directory):
    actual = {"table.csv": (directory / "table.csv").read_text()}
    for cell in sorted(directory.glob("XS-*")):
        for results in (_of_run, _of_evaluate):
            actual |= {f"{cell.name}/{name}": value for name, value in results(cell).items()}
    return actual


JOBS = {
    "train": Job(_train, _of_run),
    "encode": Job(_encode, _of_encode),
    "evaluate": Job(_evaluate, _of_evaluate, begins_with="run"),
    "sweep": Job(_sweep, _of_sweep),
    "two processes": Job(_train_pair, _of_run, devices=2),
}
