"""The commands as a user types them, and what they say to a typing error."""

import pathlib
import re
import subprocess
import sys

import pytest

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
        ("configs/missing.py", "cannot load --config: .*No such file.*configs/missing.py"),
        ("configs/imagenet256.py:DiT-Z/2", "error: unknown model 'DiT-Z/2'"),
    ],
)
def test_config_that_cannot_be_loaded_is_one_line(run_command, file, message, tmp_path):
    error = run_command("train", "--config", file, "--workdir", tmp_path, fails=True)
    assert re.search(message, error)
    assert "Traceback" not in error


def test_unknown_key_in_a_config_file_is_shown_where_it_is(run_command, tmp_path):
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


@pytest.mark.slow
def test_every_command_has_help():
    for command in COMMANDS:
        result = subprocess.run(
            [sys.executable, "-m", f"dit_jax.{command}", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert f"python -m dit_jax.{command}" in result.stdout
        assert "--" in result.stdout


def test_missing_accelerator_wheel_says_what_to_install(run_command):
    error = run_command("flops", "DiT-S/2", fails=True, JAX_PLATFORMS="cuda")
    assert "cannot start JAX_PLATFORMS='cuda'" in error
    assert "make install ACCELERATOR=cuda13" in error
    assert "Traceback" not in error
