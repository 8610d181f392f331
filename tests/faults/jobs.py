"""The commands that the campaign interrupts, and the results that they must reproduce."""

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

VARYING_KEYS = ("img_per_s", "seconds", "git_revision")  # of a metrics line or a row
STEPS = 24


class Job(NamedTuple):
    """A command that writes into a directory."""

    # (directory, inputs) -> the command line of each process, after `python -m`
    make_words: Callable[[pathlib.Path, pathlib.Path], list[list[str]]]
    # directory -> {name of a result: its contents or their hash}
    read_results: Callable[[pathlib.Path], dict[str, str]]
    devices: int = 1  # of all processes together
    initial_input: str = ""  # the input that is copied to the directory first


def _make_train(directory, inputs):
    words = ["dit_jax.train", "--config=configs/smoke.py", f"--workdir={directory}"]
    words += [f"--config.data.data_dir={inputs / 'data'}", f"--config.total_steps={STEPS}"]
    words += ["--config.checkpoint_every_steps=5", "--config.log_every_steps=3"]
    words += ["--config.eval_every_steps=12", "--config.sample_every_steps=12"]
    return [[*words, "--config.sample.steps=2", "--config.data.eval_split=test[:32]"]]


def _make_train_pair(directory, inputs):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    (words,) = _make_train(directory, inputs)
    words += ["--config.mesh.fsdp=2", *flags]
    return [[*words, f"--process_id={i}"] for i in range(2)]


def _make_encode(directory, inputs):
    words = ["dit_jax.encode", "--config=configs/smoke.py", f"--vae={inputs / 'vae'}"]
    words += [f"--config.data.data_dir={inputs / 'data'}", f"--out={directory}"]
    words += ["--config.data.flip=True", "--shard_images=16", "--batch_size=4"]
    return [[*words, "--config.data.eval_split=test[:64]"]]


def _make_evaluate(directory, inputs):
    words = ["dit_jax.evaluate", f"--workdir={directory}", "--extractor=pixels", "--steps=2"]
    return [[*words, "--num=600", "--batch_size=8", f"--reference={inputs / 'reference.npz'}"]]


def _make_sweep(directory, inputs):
    words = ["experiments.scaling.sweep", "--config=experiments/scaling/configs/smoke.py"]
    words += [f"--workdir={directory}", f"--config.base.data.data_dir={inputs / 'data'}"]
    words += ["--config.grids.main.size=('XS',)", "--config.steps=(4,8)", "--retry_failed"]
    words += ["--config.base.optim.warmup_steps=2", "--config.base.checkpoint_every_steps=2"]
    return [[*words, "--config.evaluate.num=32"]]


def _read_lines(path):
    """Reads JSON lines without the keys that vary between runs."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in VARYING_KEYS} for line in lines
    ]


def _hash(contents):
    return hashlib.sha256(contents).hexdigest()[:16]


def _read_run(directory):
    """Returns hashes of the final state and the pictures, and the lines of the log."""
    config = workdirs.load_config(directory)
    program = programs.make_program(config, jax.devices()[: max(1, config.mesh.fsdp)])
    with checkpoint.open_manager(directory, config) as manager:
        state, data_state = checkpoint.restore_latest(manager, program.state)
    results = {
        f"state{jax.tree_util.keystr(path)}": _hash(np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    }
    results["data"] = json.dumps(data_state)
    for line in _read_lines(directory / "metrics.jsonl"):
        results[f"metrics.jsonl {line['step']} {sorted(line)}"] = json.dumps(line)
    for path in sorted(directory.glob("samples/*")):
        results[f"samples/{path.name}"] = _hash(path.read_bytes())
    return results


def _read_encode(directory):
    return {
        str(path.relative_to(directory)): _hash(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def _read_evaluate(directory):
    # As dict keys, equal rows count once: if code is not committed, a row is written again.
    rows = {json.dumps(line): None for line in _read_lines(directory / "evaluations.jsonl")}
    results = {f"evaluations.jsonl {i}": row for i, row in enumerate(rows)}
    for path in sorted(directory.glob("evaluations/*")):
        results[f"evaluations/{path.name}"] = _hash(path.read_bytes())
    return results


def _read_sweep(directory):
    results = {"table.csv": (directory / "table.csv").read_text()}
    for cell in sorted(directory.glob("XS-*")):
        for name, value in (_read_run(cell) | _read_evaluate(cell)).items():
            results[f"{cell.name}/{name}"] = value
    return results


JOBS = {
    "train": Job(_make_train, _read_run),
    "encode": Job(_make_encode, _read_encode),
    "evaluate": Job(_make_evaluate, _read_evaluate, initial_input="run"),
    "sweep": Job(_make_sweep, _read_sweep),
    "two processes": Job(_make_train_pair, _read_run, devices=2),
}
