"""The workdir of a conversion: complete or missing, and never in place of other files."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from dit_jax.convert import destination


def _fill(workdir):
    with destination.fill(workdir) as new:
        assert not workdir.exists() or not any(workdir.iterdir())
        (new / "checkpoints").mkdir()
        (new / "config.json").write_text("{}")


def test_new_and_empty_directories_are_filled(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "a/b/new", "name.with.dots", "link"):
        _fill(type(tmp_path)(name))
        assert sorted(os.listdir(tmp_path / name)) == ["checkpoints", "config.json"]
    assert sorted(os.listdir(tmp_path)) == ["a", "elsewhere", "empty", "link", "name.with.dots"]
    assert (tmp_path / "link").is_symlink()


def test_link_at_the_partial_workdir_is_refused(tmp_path):
    """Other users may write beside the destination."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes").write_text("mine")
    (tmp_path / ".run.partial").symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"\.run\.partial is a link: remove it"):
        _fill(tmp_path / "run")
    assert os.listdir(tmp_path / "elsewhere") == ["notes"]


def test_existing_files_are_kept(tmp_path):
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("mine")
    full.mkdir()
    (full / "notes").write_text("mine")
    (tmp_path / "dangling").symlink_to("none")
    for check in (destination.check, _fill):
        with pytest.raises(ValueError, match="full is not empty: choose a new directory, or rem"):
            check(full)
        for name in ("file", "dangling"):
            with pytest.raises(ValueError, match=f"{name} is no directory: choose a new dir"):
                check(tmp_path / name)
        with pytest.raises(OSError, match=r"cannot write to .*/file/a/b: .*/file is no directory"):
            check(file / "a" / "b")
    assert (file.read_text(), (full / "notes").read_text()) == ("mine", "mine")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "full"]


def test_unwritable_parent_is_refused_before_a_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OSError, match=rf"cannot write to {tmp_path}/x/y: {tmp_path} is no dir"):
        destination.check(tmp_path / "x" / "y")


def _fill_and_call(workdir, function):
    with destination.fill(workdir) as new:
        (new / "config.json").write_text("ours")
        function()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_conversion_leaves_nothing(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(error):
        _fill_and_call(tmp_path / "new", fail)
    assert not os.listdir(tmp_path)


def test_directory_that_another_process_filled_is_kept(tmp_path):
    def fill():
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.json").write_text("theirs")

    with pytest.raises(OSError, match=r"cannot make .*new: Directory not empty\. Choose"):
        _fill_and_call(tmp_path / "new", fill)
    assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "config.json").read_text() == "theirs"


def test_running_process_locks_the_workdir_and_a_killed_one_does_not(tmp_path):
    code = f"""
import pathlib, sys
from dit_jax.convert import destination
with destination.fill(pathlib.Path({str(tmp_path / "new")!r})) as new:
    (new / "half").mkdir()
    (new / "half" / "a").write_text("half")
    print("begun", flush=True)
    sys.stdin.read()
"""
    pipe = subprocess.PIPE
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe)
    try:
        assert first.stdout.readline() == b"begun\n"
        with pytest.raises(OSError, match=r"another process is converting to .*new: wait for it"):
            _fill(tmp_path / "new")
        assert (tmp_path / ".new.partial" / "half" / "a").read_text() == "half"
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert os.listdir(tmp_path) == [".new.partial"]
    _fill(tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]
    assert sorted(os.listdir(tmp_path / "new")) == ["checkpoints", "config.json"]
