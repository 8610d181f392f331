"""The commands as a user types them, and what they say to a typing error."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax import sample

ROOT = pathlib.Path(__file__).parents[1]


def _run(*arguments, fails=False):
    """Output of `python -m dit_jax.<arguments>`; standard error too if it is to fail."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    result = subprocess.run(
        [sys.executable, "-m", f"dit_jax.{arguments[0]}", *map(str, arguments[1:])],
        cwd=ROOT,
        env=environment | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else result.stdout


def test_sample_writes_npz_and_grid(workdir, tmp_path):
    flags = ["--workdir", workdir, "--labels", "0,3,9", "--num", 6, "--steps", 4]
    flags += ["--sampler", "ddim", "--cfg_scale", 1.5, "--seed", 0]
    out = _run("sample", *flags, "--out", tmp_path / "new" / "s.npz")
    assert "6 samples of step 40" in out
    with np.load(tmp_path / "new" / "s.npz") as file:
        assert file["label"].tolist() == [0, 0, 3, 3, 9, 9]
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((6, 8, 8, 1), np.uint8)
        images = file["arr_0"]
    _run("sample", *flags, "--out", tmp_path / "grid.png", "--batch_size", 2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 50 - 2, 3 * 50 - 2, 3)
    difference = grid[:48:6, :48:6, 0].astype(int) - images[0, :, :, 0]
    assert np.abs(difference).max() <= 1  # batches of 2: the last bit may round another way
    _run("sample", *flags, "--step", 20, "--raw", "--out", tmp_path / "old.npz")
    with np.load(tmp_path / "old.npz") as file:
        assert not np.array_equal(file["arr_0"], images)


def test_evaluate_prints_the_line_and_the_picture(workdir):
    out = _run("evaluate", "--workdir", workdir, "--num", 20, "--steps", 2)
    assert f"picture: {workdir}/evaluation_40.png" in out
    for name in ("label_accuracy", "fd_pixels", "img_per_s", "steps 40", "seconds"):
        assert name in out


def test_flops_of_a_name_a_config_and_the_table():
    row = json.loads(_run("flops", "DiT-XL/2", "--image_size", 256, "--json"))
    assert row["params_with_pos_embed"] == 675_129_632
    assert row.keys() == {
        "params",
        "params_with_pos_embed",
        "tokens",
        "gmacs",
        "gflops",
        "train_gflops_per_image",
    }
    table = _run("flops").splitlines()
    assert len(table) == 13
    assert table[-1].split()[0] == "DiT-XL/2"
    assert json.loads(_run("flops", "--config", "configs/smoke.py", "--json"))["tokens"] == 16


def test_benchmarks_say_what_they_measured():
    flags = ["--config", "configs/smoke.py", "--json"]
    row = json.loads(_run("benchmark", "train", *flags, "--steps", 2))
    assert row["img_per_s"] == pytest.approx(16e3 / row["ms_per_step"])
    assert row["tflop_per_s"] > 0
    assert (row["device"], row["data"], row["attention"]) == ("cpu", "synthetic", "xla")
    row = json.loads(_run("benchmark", "sample", *flags, "--steps", 3, "--batch_size", 8))
    assert row["ms_per_batch"] == pytest.approx(3 * row["ms_per_sampler_step"])
    assert row["batch_size"] == 8


def test_benchmarks_of_real_data_and_of_the_loop(digits_dir):
    flags = ["--config", "configs/smoke.py", f"--config.data.data_dir={digits_dir}", "--json"]
    assert json.loads(_run("benchmark", "train", *flags, "--steps", 5, "--data"))["data"] == "real"
    row = json.loads(_run("benchmark", "loop", *flags, "--steps", 20))
    ratio = row["loop_ms_per_step"] / row["ms_per_step"]
    assert row["loop_overhead_percent"] == pytest.approx(100 * (ratio - 1))


def test_digits_command_builds_the_dataset(tmp_path):
    assert f"digits: {tmp_path}/digits/1.0.0" in _run("datasets.digits", "--data_dir", tmp_path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.modle.depth=3", 'Did you mean "model" instead of "modle"'),
        ("--config.model.depht=3", 'Did you mean "depth" instead of "depht"'),
        ("--config.total_steps=many", "--config.total_steps=many"),
        ("--confg=x", "confg"),
    ],
)
def test_unknown_flags_and_keys_are_named_without_a_traceback(flag, message, tmp_path):
    error = _run("train", "--config", "configs/smoke.py", "--workdir", tmp_path, flag, fails=True)
    assert message in error
    assert "Traceback" not in error


def test_every_command_has_help():
    for command in ("train", "sample", "evaluate", "flops", "benchmark", "datasets.digits"):
        result = subprocess.run(
            [sys.executable, "-m", f"dit_jax.{command}", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert f"python -m dit_jax.{command}" in result.stdout
        assert "--" in result.stdout


def test_labels_are_given_in_equal_blocks():
    assert sample.parse_labels("0,3,9", 6, 10).tolist() == [0, 0, 3, 3, 9, 9]
    assert sample.parse_labels("", 4, 2).tolist() == [0, 0, 1, 1]
    assert sample.parse_labels("7", 2, 10).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [("0,10", r"\[10\] outside 0\.\.9"), ("-1", r"\[-1\] outside"), ("cat", "numbers with commas")],
)
def test_labels_that_are_no_class_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sample.parse_labels(text, 4, 10)


def test_sample_refuses_other_files_and_directories(workdir, tmp_path):
    error = _run("sample", "--workdir", tmp_path, fails=True)
    assert "must be a directory that dit_jax.train has written" in error
    error = _run("sample", "--workdir", workdir, "--out", "x.gif", fails=True)
    assert "must end in .png (a grid) or .npz" in error
