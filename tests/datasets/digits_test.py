"""The digits are written once, always with the same records; a damaged dataset is refused."""

import concurrent.futures
import os
import shutil
import subprocess
import time

import pytest
import tensorflow_datasets as tfds

from dit_jax.datasets import digits, writing
from dit_jax.system import locks


def test_written_once_and_identically(digits_dir, tmp_path):
    directory = digits.prepare(digits_dir)
    files = sorted(f for f in os.listdir(directory) if "array_record" in f)
    assert len(files) == 2
    before = os.stat(os.path.join(directory, files[0])).st_mtime_ns
    assert digits.prepare(digits_dir) == directory
    assert os.stat(os.path.join(directory, files[0])).st_mtime_ns == before

    first, second = (
        tfds.builder_from_directory(path).as_data_source(split="train")
        for path in (directory, digits.prepare(tmp_path))
    )
    for i in (0, 7, 1616):
        assert second[i]["label"] == first[i]["label"]
        assert (second[i]["image"] == first[i]["image"]).all()


def test_digits_command_builds_the_dataset(run_command, tmp_path):
    assert f"digits: {tmp_path}/digits/1.0.0" in run_command(
        "datasets.digits", "--data_dir", tmp_path
    )


def test_second_writer_waits_for_the_first(tmp_path, caplog):
    lock = tmp_path / "digits" / writing.LOCK
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with caplog.at_level("INFO", logger="dit_jax"), locks.hold(lock):
            waiting = threads.submit(digits.prepare, tmp_path)
            while "waiting for another command" not in caplog.text:
                assert not waiting.done()
                time.sleep(0.01)
            assert [path.name for path in lock.parent.iterdir()] == [lock.name]
        assert waiting.result() == str(tmp_path / "digits" / "1.0.0")
    assert [path.name for path in lock.parent.iterdir()] == ["1.0.0"]


def _shard(directory, split="train"):
    (path,) = directory.glob(f"digits-{split}.array_record*")
    return path


def _flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def _change_count(directory):
    path = directory / "dataset_info.json"
    path.write_text(path.read_text().replace('"1617"', '"1700"'))


DAMAGES = {
    "foreign": (
        lambda d: [shutil.rmtree(d), d.mkdir(), (d / "notes.txt").touch()],
        "it has no features.json and no dataset_info.json",
    ),
    "file": (lambda d: [shutil.rmtree(d), d.touch()], "it has no features.json and no "),
    "link": (
        lambda d: [shutil.rmtree(d), d.symlink_to("nowhere")],
        "it has no features.json and no ",
    ),
    "lost shard": (lambda d: _shard(d).unlink(), "1 of 1 files of .* such as digits-train"),
    "cut shard": (
        lambda d: os.truncate(_shard(d), 300_000),
        "cannot read .*/digits-train",
    ),
    "empty shard": (lambda d: os.truncate(_shard(d, "test"), 0), "test"),
    "changed shard": (lambda d: _flip(_shard(d)), "record .* of split 'train' of"),
    "other count": (_change_count, "holds 1,617 records, but .* counts 1,700"),
    "no info": (lambda d: (d / "dataset_info.json").unlink(), "it has no dataset_info.json"),
    "no features": (lambda d: (d / "features.json").unlink(), "it has no features.json"),
    "empty info": (
        lambda d: os.truncate(d / "dataset_info.json", 0),
        r"cannot read .*dataset_info\.json: it ends too early",
    ),
    "other info": (lambda d: (d / "dataset_info.json").write_text("{}"), "version|split"),
    "empty features": (
        lambda d: os.truncate(d / "features.json", 0),
        r"cannot read .*features\.json: it ends too early",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_dataset_is_refused_with_the_command_that_rewrites_it(
    digits_dir, tmp_path, damage
):
    directory = tmp_path / "digits" / "1.0.0"
    shutil.copytree(digits_dir / "digits" / "1.0.0", directory)
    change, message = DAMAGES[damage]
    change(directory)
    before = sorted(directory.iterdir()) if directory.is_dir() else None
    command = f"rm -r {directory}; python -m dit_jax.datasets.digits --data_dir {tmp_path}"
    expected = f"1.0.0 exists but is not complete: .*({message})"
    with pytest.raises(ValueError, match=expected) as error:
        digits.prepare(tmp_path)
    assert str(error.value).count(f"`{command}`") == 1
    assert "\n" not in str(error.value)
    assert before == (sorted(directory.iterdir()) if directory.is_dir() else None)
    subprocess.run(["rm", "-r", directory], check=True)
    assert digits.prepare(tmp_path) == str(directory)


def test_command_refuses_an_incomplete_dataset_without_a_traceback(
    run_command, digits_dir, tmp_path
):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    os.truncate(tmp_path / "digits" / "1.0.0" / "dataset_info.json", 0)
    error = run_command("datasets.digits", "--data_dir", tmp_path, fails=True)
    assert error.startswith("error: the dataset ")
    assert "Traceback" not in error


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
