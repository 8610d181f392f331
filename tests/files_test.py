"""Files that are whole, paths from flags and config keys, names that are safe to show."""

import errno
import json
import pathlib

import pytest

from dit_jax import files


def test_control_characters_of_a_name_are_shown_as_escapes():
    name = "a\nb\x1b[31m\r\t\x7f\x9b\u202e\u200b\u2028\udc80"
    expected = r"a\nb\x1b[31m\r\t\x7f\x9b\u202e\u200b\u2028\udc80"
    assert files.printable(name) == expected
    assert files.printable("é 漢字 😀 a b") == "é 漢字 😀 a b"


def test_home_directories_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.to_path("~/runs/a", "--workdir") == pathlib.Path("/home/me/runs/a")
    assert files.to_path("~root/a", "--workdir").is_absolute()
    assert files.to_path("a/~/b", "--workdir") == pathlib.Path("a/~/b")
    assert files.to_path("imagenet2012:train", "--reference") == pathlib.Path("imagenet2012:train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://bucket/x", "latents.vae=gs://bucket/x: remote paths are not read or written yet"),
        ("s3://x", "remote paths"),
        ("file:///x", "remote paths"),
        ("", "latents.vae is empty"),
        ("a\0b", r"latents.vae=a\\x00b has a NUL character"),
        ("~no-such-user/x", "~no-such-user has no home directory; write ./~no-such-user/x"),
    ],
)
def test_texts_that_are_no_local_path_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        files.to_path(text, "latents.vae")


def test_full_disk_names_the_file_and_leaves_no_temporary(tmp_path):
    def write(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
        files.replace(tmp_path / "a.json", write)
    assert not list(tmp_path.iterdir())


def test_text_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.replace_text(path, json.dumps([1]))

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, write)
    assert path.read_text() == "[1]"
    assert list(tmp_path.iterdir()) == [path]
