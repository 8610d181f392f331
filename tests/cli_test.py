"""Commands as a user types them: typing errors, signals, full disks, and closed readers."""

import errno
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import types

import conftest
import jax
import numpy as np
import pytest
import setuptools
from helpers.xla_flags import ONE_DEVICE

from dit_jax import cli
from dit_jax.errors import UserFileError
from dit_jax.system import files, stopping

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = [
    "train",
    "encode",
    "sample",
    "evaluate",
    "plot",
    "convert",
    "flops",
    "benchmark",
    "datasets.digits",
    "datasets.openmoji",
    "reconstruct",
]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.modle.depth=3", 'Did you mean "model" instead of "modle"'),
        ("--config.model.depht=3", 'Did you mean "depth" instead of "depht"'),
        ("--config.größe=3", "größe"),
        ("--config.total_steps=many", "--config.total_steps=many"),
        ("--confg=x", "confg"),
    ],
)
def test_unknown_flags_and_keys_are_named_without_a_traceback(run_command, flag, message, tmp_path):
    error = run_command(
        "train", "--config", "configs/smoke.py", "--workdir", tmp_path, flag, fails=True
    )
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("configs/missing.py", "cannot load --config=configs/missing.py: /.* is not there"),
        ("configs/imagenet256.py:DiT-Z/2", "error: unknown model 'DiT-Z/2'"),
    ],
)
def test_error_of_a_config_that_cannot_be_loaded_is_one_line(run_command, file, message, tmp_path):
    error = run_command("train", "--config", file, "--workdir", tmp_path, fails=True)
    assert re.search(message, error)
    assert "Traceback" not in error


def test_unknown_key_in_a_config_file_is_an_error_with_its_line(run_command, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import smoke\ndef get_config():\n  smoke.get_config().modle = 1\n"
    )
    error = run_command("train", "--config", path, "--workdir", tmp_path, fails=True)
    assert f'error: {path}:3: Key "modle" does not exist' in error
    assert error.strip().endswith('Did you mean "model" instead of "modle"?')


def test_other_bug_in_a_config_file_keeps_its_traceback(run_command, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n  return {}['size']\n")
    error = run_command("train", "--config", path, "--workdir", tmp_path, fails=True)
    assert f'"{path}", line 2, in get_config' in error
    assert error.strip().endswith("KeyError: 'size'")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, run_command):
    output = run_command(command, "--help")
    assert f"python -m dit_jax.{command}" in output
    assert "--" in output


@pytest.mark.parametrize("columns", ["1", "-1", "many", "10000"])
def test_help_is_shown_at_any_width(zygote, columns):
    answer, output, error = zygote("train", "--help", COLUMNS=columns)
    assert (answer["status"], error) == (0, "")
    assert "python -m dit_jax.train" in output
    assert "--config" in output


@pytest.mark.parametrize(
    ("path", "text", "shown"),
    [
        ("/lib/orbax/checkpoint/read.py", "cannot read", False),
        ("/lib/other/read.py", "cannot read", True),
        ("/lib/other/read.py", "Event loop is closed", False),
    ],
)
def test_coroutines_of_a_failed_read_are_not_reported(monkeypatch, path, text, shown):
    names, reported = {}, []
    exec(compile("async def read(): pass", path, "exec"), names)
    coroutine = names["read"]()
    monkeypatch.setattr(sys, "__unraisablehook__", reported.append)
    unraisable = types.SimpleNamespace(object=coroutine, exc_value=Exception(text))
    cli._report_unraisable(unraisable)
    assert bool(reported) == shown
    unraisable.object = None
    cli._report_unraisable(unraisable)
    assert len(reported) == shown + (text == "cannot read")
    coroutine.close()


def _run(command, *words, shell="exec", **options):
    """Runs a command in bash; `shell` is the line, in which 'exec' stands for the command."""
    line = shlex.join([sys.executable, "-m", f"dit_jax.{command}", *map(str, words)])
    before, _, after = shell.partition("exec")
    return subprocess.run(
        ["bash", "-c", f"{before}{line}{after}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def test_error_for_missing_flags_is_one_line(run_command):
    error = run_command("train", fails=True)
    assert error == "error: --config and --workdir are missing; --help lists the flags.\n"


@pytest.mark.parametrize(
    "words", [["stray"], ["--no-such-flag=1"], ["--traceback=maybe"], ["--notraceback"] * 2]
)
@pytest.mark.parametrize("command", sorted({*COMMANDS, "edit"} - {"flops"}))
def test_every_command_refuses_wrong_words(command, words, run_command):
    positionals = {"edit": ["invert"], "benchmark": ["train"], "convert": ["dit", "a", "b"]}
    required = ["--config", "configs/smoke.py", "--rows", "a", "--x", "a", "--y", "a"]
    error = run_command(
        command, *positionals.get(command, []), *words, "stray", *required, fails=True
    )
    assert re.match(r"error: .*(stray|no-such-flag|maybe|--config|--rows)", error)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes=2", "--process_id=0"], "--num_processes, --process_id: give"),
        (["--coordinator_bind_address=localhost:1"], "--coordinator_bind_address: give"),
        (["--coordinator_address=localhost"], "--coordinator_address=localhost must be HOST:PORT"),
        (["--coordinator_address=localhost:1", "--num_processes=2"], "needs both --num_processes"),
        (["--coordinator_address=localhost:1", "--process_id=0"], "needs both --num_processes"),
        (["--distributed", "--num_processes=2", "--process_id=2"], "must be below"),
        (["--distributed", "--num_processes=2"], "cannot connect the processes"),
    ],
    ids=str,
)
def test_flags_that_cannot_connect_processes_are_refused(words, message, run_command):
    error = run_command("flops", "DiT-S/2", *words, fails=True)
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_names_are_printed_without_control_characters():
    result = _run("flops", "DiT\x1b[31m\u202eé", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 1
    assert result.stderr.startswith(r"error: unknown model 'DiT\x1b[31m\u202e\xe9'")


@pytest.mark.parametrize(
    ("shell", "status", "error"),
    [
        ("set -o pipefail; exec | true", 0, ""),
        ("exec >&-", 0, ""),
        ("exec 2>&-", 0, ""),
        ("exec > /dev/full", 1, "error: <stdout>: No space left on device\n"),
    ],
)
def test_closed_output_gives_no_traceback(shell, status, error):
    result = _run("flops", "DiT-S/2", shell=shell)
    assert result.returncode == status
    assert result.stderr.startswith(error)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_errors_of_the_operating_system_are_messages_and_bugs_are_not(tmp_path):
    long_name = OSError(errno.ENAMETOOLONG, "File name too long", "x\x1b" * 1000)
    assert cli._is_user_error(long_name)
    shortened = r"(x\\x1b)+.{0,4}\.\.\..{0,4}(x\\x1b)+: File name too long"
    assert re.fullmatch(shortened, cli._format_error(long_name))
    with pytest.raises(NotADirectoryError) as error:
        (pathlib.Path(__file__) / "x").read_text()
    assert cli._format_error(error.value) == f"{__file__}/x: Not a directory"
    assert cli._is_user_error(OSError(errno.ENOSPC, "No space left on device"))
    assert not cli._is_user_error(OSError("a bug"))
    assert not cli._is_user_error(BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_missing_temporary_directory_is_an_error_for_the_user():
    """Python's error names no file."""
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert cli._is_user_error(error)
    message = (
        "No usable temporary directory found in ['/tmp']: make room in one of them, or set TMP"
    )
    assert cli._format_error(error).startswith(message)


def test_name_that_is_too_long_for_the_temporary_file_is_refused_before_the_work(tmp_path):
    cli.check_out(tmp_path / f"{'a' * 247}.png", (".png",))
    for name in ("a" * 248, "é" * 124, "a" * 400):  # bytes count, not characters
        with pytest.raises(OSError, match=r"name( is)? too long"):
            cli.check_out(tmp_path / f"{name}.png", (".png",))


def test_dataset_that_cannot_be_written_is_an_error_for_the_user(tmp_path):
    result = _run("datasets.digits", "--data_dir", tmp_path, shell="ulimit -f 0; exec")
    assert result.returncode == 1
    assert re.match("error: (No usable temporary directory|.*File too large)", result.stderr)
    assert "Traceback" not in result.stderr


def _attach_kept_message(error, text):
    """Raises an error inside `stopping.attach_kept_message`, and returns it."""
    with pytest.raises(type(error)), stopping.attach_kept_message(lambda: text):
        raise error
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("of 9 TiB"), "error: out of memory: of 9 TiB\nTake a smaller batch"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TiB\nmore"),
            "error: out of memory: RESOURCE_EXHAUSTED: 9 TiB\nTake a smaller batch",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 9"),
            "error: out of memory: INTERNAL: Error dispatching: Out of memory allocating 9\nTake",
        ),
        (
            files.LostError("runs/a is gone.\nNothing more is written."),
            "error: runs/a is gone.\nNothing more is written. To go on, run: python -m a 'b c'\n",
        ),
        (
            _attach_kept_message(
                UserFileError("cannot read a.png: it is empty."), "step 3 is kept"
            ),
            "error: cannot read a.png: it is empty.\nStep 3 is kept. To go on, run: python -m a ",
        ),
        (
            _attach_kept_message(
                OSError(errno.ENOSPC, "No space left on device"), "step 3 is kept"
            ),
            "error: No space left on device\nNothing is kept. To go on, run: python -m a ",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: a bug"), None),
    ],
    ids=str,
)
def test_error_for_the_user_is_two_lines_and_a_bug_of_xla_keeps_its_traceback(
    monkeypatch, capsys, error, message
):

    def start(_):
        raise error

    monkeypatch.setattr(cli, "FLAGS", types.SimpleNamespace(traceback=False))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "a", "b c"])
    with pytest.raises(SystemExit if message else type(error)):
        cli._explain_errors(start, [], lambda: "nothing is kept")
    assert capsys.readouterr().err.startswith(message or "")


def test_process_says_how_to_go_on_after_another_process_has_ended(monkeypatch, capsys):
    """XLA raises the same error as for a bug."""

    def start(_):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo: timed out\nmore")

    monkeypatch.setattr(cli, "FLAGS", types.SimpleNamespace(traceback=False))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "a", "b c"])
    with pytest.raises(SystemExit) as error:
        cli._explain_errors(start, [], lambda: "step 3 is kept")
    assert error.value.code == 1
    assert capsys.readouterr().err == (
        "error: UNKNOWN: Gloo: timed out\nAnother process may have ended first: see its output. "
        f"{cli.TRACEBACK_HINT}\nStep 3 is kept. To go on, run: python -m a 'b c'\n"
    )


@pytest.mark.slow
def test_environment_does_not_change_the_samples_of_a_seed(workdir, tmp_path, run_command):
    flags = ["--workdir", workdir, "--num", 2, "--steps", 2, "--out"]
    run_command("sample", *flags, tmp_path / "a.npz", as_users=True)
    variables = dict(JAX_DEFAULT_PRNG_IMPL="rbg", JAX_ENABLE_X64="1", JAX_RANDOM_SEED_OFFSET="3")
    variables["JAX_THREEFRY_PARTITIONABLE"] = "0"
    process = conftest.start("sample", *flags, tmp_path / "b.npz", **variables)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    for name in variables:
        assert re.search(rf"^{name}=\S+ is not used: results would differ\.$", error, re.MULTILINE)
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(a, b)


def test_full_disk_says_what_is_kept_and_how_to_go_on(workdir, tmp_path):
    flags = ["--workdir", workdir, "--num", 400, "--steps", 2, "--out", tmp_path / "a.npz"]
    result = _run("sample", *flags, shell="ulimit -f 4; exec")
    assert result.returncode == 1
    assert "cannot write --out=" in result.stderr
    assert "File too large" in result.stderr
    last = result.stderr.splitlines()[-1]
    line = shlex.join([sys.executable, "-m", "dit_jax.sample", *map(str, flags)])
    assert last == f"Nothing is kept. To go on, run: {line}"
    assert not list(tmp_path.glob("a.npz*"))


def _stop(command, *words, ready, number=signal.SIGINT, **options):
    """Stops a command by a signal when `ready()` is true; returns (status, standard error)."""
    process = conftest.start(command, *words, **options)
    deadline = time.monotonic() + 240
    try:
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=240)
    finally:
        process.kill()  # does nothing if the process has ended
    assert "Traceback" not in error
    return process.returncode, error


def test_ctrl_c_in_training_saves_and_says_how_to_go_on(tmp_path, digits_dir):
    run = tmp_path / "a run"
    words = ["--config", "configs/smoke.py", "--workdir", run]
    words += [f"--config.data.data_dir={digits_dir}", "--config.total_steps=100000"]
    words += ["--config.eval_every_steps=0", "--config.sample_every_steps=0"]
    words += ["--config.log_every_steps=1", "--config.checkpoint_every_steps=100000"]
    log = run / "metrics.jsonl"
    status, error = _stop(
        "train", *words, ready=lambda: log.exists() and log.read_text(), XLA_FLAGS=ONE_DEVICE
    )
    assert status == 130
    assert "Ctrl-C: ending this step, then saving. Ctrl-C again ends at once." in error
    (step,) = [int(path.name) for path in (run / "checkpoints").iterdir()]
    assert step < 100_000
    *_, saved, hint = error.splitlines()
    assert saved == f"Ctrl-C: step {step} is saved in {run}."
    assert shlex.split(hint.removeprefix("To go on, run: ")) == [
        *(sys.executable, "-m", "dit_jax.train"),
        *map(str, words),
    ]


WRAPPED = """
import os, signal, time
from dit_jax import cli

def main(_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException as error:
        raise ValueError("while reading an array") from error

cli.run(main)
"""


def test_signal_that_a_library_turns_into_another_error_ends_the_command():
    result = subprocess.run([sys.executable, "-c", WRAPPED], cwd=ROOT, capture_output=True)
    assert result.returncode == 143
    assert result.stderr.decode().splitlines()[0] == "SIGTERM: nothing is kept."


@pytest.mark.parametrize("module", ["dit_jax.sample", "experiments.scaling.fit"])
def test_ctrl_c_during_imports_ends_a_command_without_output(module):
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while "numpy" not in maps.read_text():  # it has begun to import
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == ""
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_other_commands_say_what_is_kept(workdir, tmp_path, digits_dir, vae_dir):
    data = [f"--config.data.data_dir={digits_dir}", "--config", "configs/smoke.py"]
    out = tmp_path / "moments"
    shards = ["--shard_images", 8, "--batch_size", 8]
    cases = {
        "encode": (["--vae", vae_dir, "--out", out, *data, *shards], f"kept in {out}"),
        "evaluate": (["--workdir", workdir, "--num", 5000, "--batch_size", 8], "batches that are"),
        "sample": (["--workdir", workdir, "--num", 50_000, "--steps", 4], "nothing is kept"),
    }
    is_ready = {
        "encode": lambda: len(list(out.glob("moments-train*"))) > 2,
        "evaluate": lambda: len(list(workdir.glob("evaluations/*/*.npz"))) > 2,
        "sample": lambda: time.monotonic() > start + 15,
    }
    number = signal.SIGTERM
    name = stopping.NAMES[number]
    for command, (words, saved) in cases.items():
        start = time.monotonic()
        status, error = _stop(command, *words, ready=is_ready[command], number=number)
        assert status == 128 + number
        assert re.search(rf"^{name}: .*{re.escape(saved)}", error, re.MULTILINE)
        assert f"To go on, run: {sys.executable} -m dit_jax.{command} " in error
    assert not list(tmp_path.rglob("*.tmp"))


def test_configs_and_experiments_are_installed():
    """So commands run in any directory, where config files import each other."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_namespace_packages(str(ROOT), **settings["packages"]["find"])
    assert {"dit_jax.convert", "configs", "experiments.scaling.configs"} <= set(packages)
    assert not {"tests", "docs"} & set(packages)
    assert {"*.md", "*.csv"} <= set(settings["package-data"]["*"])  # that experiments read


def test_missing_accelerator_wheel_says_what_to_install(run_command):
    error = run_command("flops", "DiT-S/2", fails=True, JAX_PLATFORMS="cuda")
    assert "cannot start JAX_PLATFORMS='cuda'" in error
    assert "make install ACCELERATOR=cuda13" in error
    assert "Traceback" not in error
