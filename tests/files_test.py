"""Files that are whole or not there, and those that a disk or a hand has damaged."""

import pytest

from dit_jax import files


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}}', b"\0" * 40], ids=str
)
def test_damaged_json_is_named(tmp_path, contents):
    path = tmp_path / "a.json"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.json is damaged: "):
        files.read_json(path)


def test_json_lines_without_the_one_that_was_cut(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    assert files.read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n\n{"a": "\xe2\x80\xa8"}\n{"a": 3')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": "\u2028"}]
    assert not caplog.records
