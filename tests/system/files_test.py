"""Atomic writes, paths in flags, names in messages, and damaged or hostile JSON and .npz files."""

import concurrent.futures
import errno
import json
import os
import pathlib
import threading
import time
import zipfile

import numpy as np
import pytest

from dit_jax.errors import UserFileError
from dit_jax.system import files, json_files, npz_files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blocks.0.attn.qkv.weight (3, 4)", None),
        ("猫 café 🐈 a\\b 'x'", None),
        ("e\u0301 \u0939\u093f \u00a0", None),  # marks that belong to letters, a wide space
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\nerror: b\r\t\0\x7f", r"a\nerror: b\r\t\x00\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        (
            "a\u202egnp\u2066\u2069\u200b\u200f\ufeff\u2028",
            r"a\u202egnp\u2066\u2069\u200b\u200f\ufeff\u2028",
        ),
        ("\ud800 \udcff", r"\ud800 \udcff"),
    ],
)
def test_control_characters_are_escaped_and_all_other_text_is_kept(text, expected):
    shown = files.printable(text)
    assert shown == (text if expected is None else expected)
    assert files.printable(shown) == shown
    shown.encode()


def test_path_is_made_printable(tmp_path):
    assert files.printable(tmp_path / "a\x1b[2J") == f"{tmp_path}/a\\x1b[2J"


def test_a_few_of_many_names_are_shown():
    names = [f"name{i}" for i in range(1000)]
    assert files.list_some(names) == "name0, name1, name2, name3, name4 and 995 more"
    assert files.list_some(names[:5]) == "name0, name1, name2, name3, name4"
    assert files.list_some([]) == "none"
    assert files.list_some(["a\nb" + "x" * 10_000]) == "a\\nb" + "x" * 197


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True, "é\n"], "b": {"c": {}}, "d": float("inf"), "e": 10**4000}
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())  # with a byte order mark
    assert json_files.read_json(path, "a value") == value
    path.write_text("[" * 100 + "]" * 100)
    assert json_files.read_json(path, "a value")


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "it ends too early: Expecting value"),
        (b'{"a": 1, "b', "it ends too early: Unterminated string"),
        (b'{"a": 1,\n "b": ]', "line 2, column 7: Expecting value"),
        (b"<!DOCTYPE html>", "line 1, column 1: Expecting value"),
        (b'{"a": "\xff"}', r"it is not in UTF-8, with b'\\xff' at byte 7"),
        (b"{}\0", "line 1, column 3: Extra data"),
        (b"[" * 101 + b"]" * 101, "it is nested more than 100 deep"),
        (b"[" * 500_000, "it is nested more than 100 deep"),
        (b'{"a":' * 500_000, "it is nested more than 100 deep"),
        (b'{"a": ' + b"9" * 10**6 + b"}", r"Exceeds the limit \(4300 digits\)"),
        (
            b'{"a": {"b\\u001b": 1, "c": 2, "b\\u001b": 1}}',
            r"the key 'b\\x1b' is in one object twice",
        ),
        (b'{"a' + b"a" * 10_000 + b'": 1, "a": 2, "a": 3}', "the key 'a' is in one object twice"),
    ],
)
def test_damaged_json_ends_in_one_line(tmp_path, contents, reason):
    path = tmp_path / "x\x1b.json"
    path.write_bytes(contents)
    message = rf"^cannot read {tmp_path}/x\\x1b\.json: {reason}.*\. It must be a value\.$"
    with pytest.raises(ValueError, match=message) as error:
        json_files.read_json(path, "a value")
    assert "\n" not in str(error.value)


def test_json_that_is_too_large_or_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_BYTES", 2**20)
    path = tmp_path / "x.json"
    path.write_text(" " * 2**20 + "1")
    with pytest.raises(ValueError, match="it has more than 1 MiB"):
        json_files.read_json(path, "a value")
    with pytest.raises(ValueError, match="it has more than 1 MiB"):
        json_files.parse_json(path.read_text(), "x", "a value")
    os.truncate(path, 2**40)  # does not fit into memory, so the test fails if all of it is read
    with pytest.raises(ValueError, match="it has more than 1 MiB"):
        json_files.read_json(path, "a value")
    assert json_files.read_bytes(path, 9) == b" " * 9
    for missing in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=r"^no .*: it must be a value\.$"):
            json_files.read_json(missing, "a value")


def test_file_without_permission_is_an_error_for_the_user(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("1")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    for read in (lambda: json_files.read_json(path, "a"), lambda: npz_files.describe_npz(path)):
        with pytest.raises(UserFileError, match=rf"^cannot read {path}: Permission denied$"):
            read()


def test_npz_is_described_and_read(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "label": np.zeros((3,), np.uint8),
        "metadata": np.array("text"),
        "scalar": np.float16(2),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        actual = npz_files.read_npz(tmp_path / "x.npz")
        assert actual.keys() == arrays.keys()
        for name, array in arrays.items():
            assert actual[name].dtype == array.dtype
            np.testing.assert_array_equal(actual[name], array)
        assert npz_files.read_npz(tmp_path / "x.npz", ["b"]).keys() == {"b"}
        described = npz_files.describe_npz(tmp_path / "x.npz")
        assert (described["a"].shape, described["a"].dtype) == ((2, 3), np.float32)
        assert (described["a"].fortran_order, described["b"].fortran_order) == (False, True)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("a.npy") as file:
        file.seek(described["a"].offset)
        np.testing.assert_array_equal(np.frombuffer(file.read(), np.float32), np.arange(6))
        assert described["a"].crc == archive.getinfo("a.npy").CRC
    with pytest.raises(ValueError, match=r"has no none; it holds a, b, label, metadata, scalar\."):
        npz_files.read_npz(tmp_path / "x.npz", ["a", "none"])


def _npy(shape, dtype="<f4", data=b"", version=b"\x01\x00"):
    """Returns the bytes of an .npy file whose header and data need not match."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    size = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + header.encode() + data


def _zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (_npy((2**40,)), r"'x.npy' in it has \d+ bytes, which do not match a float32 of shape"),
        (_npy((10**30, 10**30)), r"which do not match a float32 of shape \(1000000"),
        (_npy((-2, -3), data=b"0" * 24), r"not match a float32 of shape \(-2, -3\)"),
        (_npy((-1,), data=b""), r"not match a float32 of shape \(-1,\)"),
        (_npy((10**15,), "|V0"), "not match a"),
        (_npy((2,), data=b"0" * 9), "not match a float32"),
        (_npy((1,), "|O", b"cos\nsystem\n."), "holds Python objects, which could run code"),
        (_npy((1,), [("a", "|O")], b"N."), "holds Python objects, which could run code"),
        (
            _npy("(" * 2000),
            "TokenError|Cannot parse header|invalid header",
        ),
        (_npy("-" * 9000 + "1"), "invalid header|Cannot parse|shape is not valid"),
        (_npy((1,), data=b"1234", version=b"\x09\x00"), r"version \(9, 0\)"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{" + b" " * 10**6, "EOF: reading array header"),
        (b"no array", "magic string is not correct"),
    ],
)
def test_hostile_npz_is_refused(tmp_path, member, message):
    path = tmp_path / "x.npz"
    _zip(path, [("y.npy", _npy((1,), data=b"1234")), ("x.npy", member)])
    for read in (npz_files.describe_npz, npz_files.read_npz):
        with pytest.raises(npz_files.DamagedFileError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"cannot read {path}: ")


@pytest.mark.parametrize(
    ("members", "compression", "message"),
    [
        ([("a.txt", b"")], zipfile.ZIP_STORED, "'a.txt' in it is no .npy"),
        ([("a\n.txt", b"")], zipfile.ZIP_STORED, r"'a\\n.txt' in it is no .npy"),
        ([("a.npy", _npy((1,), data=b"1234"))] * 2, zipfile.ZIP_STORED, "'a' is in it twice"),
        ([("a.npy", _npy((0,)))], zipfile.ZIP_BZIP2, "compressed in a way that NumPy does not"),
        ([("a.npy", _npy((0,)))], zipfile.ZIP_LZMA, "compressed in a way that NumPy does not"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_numpy_does_not_write_are_refused(tmp_path, members, compression, message):
    _zip(tmp_path / "x.npz", members, compression)
    with pytest.raises(npz_files.DamagedFileError, match=message):
        npz_files.read_npz(tmp_path / "x.npz")


def test_compressed_zeros_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, zeros=np.zeros(2**25, np.uint8), ones=np.ones(9))
    assert npz_files.read_npz(path)["zeros"].shape == (2**25,)  # 1 GiB is always allowed
    monkeypatch.setattr(npz_files, "FREE_BYTES", 2**20)
    with pytest.raises(
        ValueError, match=r"would take 33,554,504 bytes, but the file has 3\d,\d+ bytes\. "
    ):
        npz_files.read_npz(path)
    assert npz_files.read_npz(path, ["ones"])["ones"].sum() == 9
    assert npz_files.describe_npz(path)["zeros"].shape == (2**25,)
    np.savez(path, zeros=np.zeros(2**25, np.uint8))
    assert npz_files.read_npz(path)["zeros"].shape == (2**25,)


def test_flipped_bit_in_an_npz_is_noticed(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(10_000, np.float32))
    contents = bytearray(path.read_bytes())
    contents[20_000] ^= 1
    path.write_bytes(contents)
    assert npz_files.describe_npz(path)
    with pytest.raises(npz_files.DamagedFileError, match="Bad CRC-32"):
        npz_files.read_npz(path)


def test_last_json_line_that_was_cut_is_skipped(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    assert json_files.read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n\n{"a": "\xe2\x80\xa8"}\n{"a": 3')
    assert json_files.read_json_lines(path) == [{"a": 1}, {"a": "\u2028"}]
    assert not caplog.records


def test_json_line_that_is_too_long_is_skipped_and_the_next_is_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(json_files, "MAX_BYTES", 20)
    path = tmp_path / "a.jsonl"
    rows = [{"a": "x" * size} for size in (11, 12, 13, 32, 33, 34, 1000)]  # of size + 9 bytes
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n{}\r\n[]\n" for row in rows))
    assert json_files.read_json_lines(path) == [rows[0], *[{}] * len(rows)]
    assert "13 damaged lines of" in caplog.text
    assert "the first is line 3." in caplog.text
    path.write_bytes(b"{}\n" + b"x" * 41)  # a last line that a kill has cut
    caplog.clear()
    assert json_files.read_json_lines(path) == [{}]
    assert not caplog.records


def test_too_many_json_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINES_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 2**10 + b"x\n" * 2**10 + b"{}\n" * 2**14)
    assert len(json_files.read_json_lines(path)) == 2**14  # skipped lines do not count
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl has more than 1 MiB .*: line 18433 exceeds"):
        json_files.read_json_lines(path)


def test_home_directories_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.to_path("~/runs/a", "--workdir") == pathlib.Path("/home/me/runs/a")
    assert files.to_path("~root/a", "--workdir").is_absolute()
    assert files.to_path("a/~/b", "--workdir") == pathlib.Path("a/~/b")
    assert files.to_path("imagenet2012:train", "--reference") == pathlib.Path("imagenet2012:train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://bucket/x", "latents.vae=gs://bucket/x: remote paths are not supported"),
        ("s3://x", "remote paths"),
        ("file:///x", "remote paths"),
        ("", "latents.vae is empty"),
        ("a\0b", r"latents.vae=a\\x00b has a NUL character"),
        ("~no-such-user/x", r"~no-such-user has no home directory\. .* write ./~no-such-user/x"),
    ],
)
def test_text_that_is_no_local_path_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        files.to_path(text, "latents.vae")


def test_full_disk_names_the_file_and_leaves_no_temporary(tmp_path):
    def write(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
        files.replace(tmp_path / "a.json", write)
    assert not list(tmp_path.iterdir())


def test_interrupted_write_keeps_the_old_contents(tmp_path):
    path = tmp_path / "a.json"
    files.replace_text(path, json.dumps([1]))

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, write)
    assert path.read_text() == "[1]"
    assert list(tmp_path.iterdir()) == [path]


def test_write_into_a_lost_directory_is_refused(tmp_path):
    (run := tmp_path / "run").mkdir()

    def write(file):
        file.write(b"x")
        run.rename(tmp_path / "moved")

    with pytest.raises(files.LostError, match=r"run is gone: it was removed or moved"):
        files.replace(run / "x", write)
    with pytest.raises(files.LostError, match=r"run is gone"):
        files.replace_text(run / "x", "x")
    assert not run.exists()


def test_commands_that_replace_one_file_wait_for_each_other(tmp_path):
    """No command writes to the temporary file of another, or removes it; the last file stays."""
    path, begun, go = tmp_path / "x.bin", threading.Event(), threading.Event()

    def slowly(file):
        file.write(b"first")
        begun.set()
        go.wait(10)
        file.write(b" whole")

    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(files.replace, path, slowly)
        begun.wait(10)
        second = threads.submit(files.replace, path, lambda file: file.write(b"second"))
        failing = threads.submit(files.replace, path, lambda _: 1 / 0)
        time.sleep(0.1)
        assert not second.done()
        assert not failing.done()
        assert not path.exists()
        go.set()
        first.result()
        second.result()
        assert isinstance(failing.exception(), ZeroDivisionError)
    assert path.read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_contents_are_on_the_disk_before_the_file_is_renamed(tmp_path, monkeypatch):
    """Otherwise a power cut could leave an empty file in place of the old one."""
    path, calls, fsync, replace = tmp_path / "x.bin", [], os.fsync, os.replace

    def record(name, call, *arguments):
        calls.append((name, os.stat(arguments[0]).st_size))
        call(*arguments)

    monkeypatch.setattr(files.os, "fsync", lambda *a: record("fsync", fsync, *a))
    monkeypatch.setattr(files.os, "replace", lambda *a: record("replace", replace, *a))
    files.replace(path, lambda file: file.write(b"whole"))
    assert calls == [("fsync", 5), ("replace", 5)]  # all five bytes, no longer in a buffer
    assert path.read_bytes() == b"whole"


def test_temporary_file_of_a_killed_command_is_overwritten(tmp_path):
    (tmp_path / "x.bin.tmp").write_bytes(b"longer than the new contents")
    files.replace(tmp_path / "x.bin", lambda file: file.write(b"whole"))
    assert (tmp_path / "x.bin").read_bytes() == b"whole"


def test_directory_that_another_command_removes_meanwhile_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    plain = os.scandir

    def scan(path):
        entries = plain(path)
        if str(path) == str(tmp_path / "a"):
            (tmp_path / "a" / "b").rmdir()
            raise FileNotFoundError(path)
        return entries

    monkeypatch.setattr(files.os, "scandir", scan)
    files.check_tree(tmp_path)


def test_tree_with_a_pipe_in_any_folder_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cycle").symlink_to(tmp_path)
    files.check_tree(tmp_path)  # ends, although the links form a cycle
    os.mkfifo(tmp_path / "a" / "b" / "pipe")
    with pytest.raises(OSError, match="/a/b/pipe is a pipe, socket or device"):
        files.check_tree(tmp_path)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, IsADirectoryError])
def test_error_of_the_system_is_an_error_for_the_user(tmp_path, error):
    def read(path):
        raise error(1, "as the system says", str(path))

    message = r"^cannot read \S+/a.npz: as the system says$"
    with pytest.raises(UserFileError, match=message) as actual:
        files.read_or_explain(tmp_path / "a.npz", read)
    assert isinstance(actual.value, FileNotFoundError) == (error is FileNotFoundError)
