"""The embedded dataset is written once and is the same every time."""

import os

import pytest
import tensorflow_datasets as tfds

from dit_jax.datasets import digits


def test_written_once_and_identically(digits_dir, tmp_path):
    directory = digits.prepare(digits_dir)
    files = sorted(f for f in os.listdir(directory) if "array_record" in f)
    assert len(files) == 2
    before = os.stat(os.path.join(directory, files[0])).st_mtime_ns
    assert digits.prepare(digits_dir) == directory
    assert os.stat(os.path.join(directory, files[0])).st_mtime_ns == before

    again = tfds.builder_from_directory(digits.prepare(tmp_path)).as_data_source(split="train")
    first = tfds.builder_from_directory(directory).as_data_source(split="train")
    for i in (0, 7, 1616):
        assert again[i]["label"] == first[i]["label"]
        assert (again[i]["image"] == first[i]["image"]).all()


def test_digits_command_builds_the_dataset(run_command, tmp_path):
    assert f"digits: {tmp_path}/digits/1.0.0" in run_command(
        "datasets.digits", "--data_dir", tmp_path
    )


def test_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the dataset .*/file/digits/1\.0\.0: "):
        digits.prepare(tmp_path / "file")


def test_full_disk_of_array_record_is_an_os_error(tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(digits.Digits, "download_and_prepare", fail)
    with pytest.raises(OSError, match="No space left on device"):
        digits.prepare(tmp_path)
