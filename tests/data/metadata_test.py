"""What metadata.jsonl may hold, and that the line which is wrong is named."""

import json

import pytest
from PIL import Image

from dit_jax import latents
from dit_jax.data import metadata


@pytest.fixture
def config(captioned_config):
    return captioned_config


def _metadata(config, root, contents):
    """An image folder with such a metadata.jsonl."""
    (root / "train").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("L", (8, 8)).save(root / "train" / name)
    if contents is not None:
        (root / "train" / "metadata.jsonl").write_bytes(contents)
    config.data.name = str(root)
    return config


ONE, TWO = b'{"file_name": "0.png", "text": "a zero"}', b'{"file_name": "1.png", "text": ["one"]}'
CAPTION = "JSON with text, a caption or a list of captions, at least one: '{"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, r"no .*metadata.jsonl: the config reads text of each image from there. Write one"),
        (b'{"file_name": "0.png"}', rf"line 1 of .*metadata.jsonl must be {CAPTION}"),
        (b'\n\n{"text": "a zero"}', r"line 3 of .*metadata.jsonl must be JSON with file_name, a t"),
        (ONE + b"\n1.png a one", r"line 2 of .*jsonl must be JSON with file_name, a text: '1"),
        (
            b'[["file_name", "0.png"], ["text", "a"]]',
            r"line 1 of .*jsonl must be JSON with file_name, a text: '\[\[",
        ),
        (b'{"file_name": 0, "text": "a"}', r"line 1 of .*jsonl must be JSON with file_name, a te"),
        (b'{"file_name": "0.png", "text": []}', rf"line 1 of .*jsonl must be {CAPTION}"),
        (b'{"file_name": "0.png", "text": null}', rf"line 1 of .*jsonl must be {CAPTION}"),
        (b'{"file_name": "0.png", "text": ["a", 1]}', rf"line 1 of .*jsonl must be {CAPTION}"),
        (
            ONE + b"\n" + TWO.replace(b"one", b"\xe9t\xe9"),
            r"line 2 of .*jsonl is not in UTF-8: .*xe9",
        ),
    ],
    ids=str,
)
def test_damaged_metadata_is_refused(config, tmp_path, contents, message):
    with pytest.raises((ValueError, OSError), match=message):
        latents.open_split(_metadata(config, tmp_path, contents), "train")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"], ids=str)
def test_metadata_of_other_editors(config, tmp_path, end):
    """A byte order mark, blank lines, and what Python takes for the end of a line in a caption."""
    first = ONE.replace(b"a zero", "a\u2028z\u00e9ro\x85".encode())
    contents = b"\xef\xbb\xbf" + first + end + b"  " + end + TWO + end
    source = latents.open_split(_metadata(config, tmp_path, contents), "train")
    assert [source.captions(i) for i in range(2)] == [2 * ["a\u2028z\u00e9ro\x85"], 2 * ["one"]]


def _read(tmp_path, rows, known=("0.png", "sub/1.png")):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    path, names = tmp_path / "metadata.jsonl", metadata.ImageNames(known)
    return metadata.read(path, {"text": metadata.parse_captions}, names)


def _row(name):
    return {"file_name": name, "text": "a"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../other/train/0.png", 'line 2 of .* names "../../other/.*", which leads out of the'),
        ("sub/../../0.png", "which leads out of the folder: only what is inside is read"),
        ("..\\0.png", "which leads out of the folder"),
        ("/etc/0.png", "an absolute path: names are relative to the folder of metadata.jsonl"),
        ("C:\\images\\0.png", "an absolute path"),
        ("c:/images/0.png", "an absolute path"),
        ("\\\\server\\share\\0.png", "an absolute path"),
        ("sub\\1.png", 'names "sub.1.png", with a backslash: write folders with "/"'),
        ("2.png", "which is not there"),
        ("sub", "which does not end as an image that is read: .bmp .jpeg .jpg .png .webp"),
        ("a.gif", "which does not end as an image that is read"),
        ("._0.png", "a hidden file or one of the system's, which are left out"),
        ("__MACOSX/0.png", "a hidden file or one of the system's"),
        ("0.png", 'lists "0.png" again, as line 1 does; remove one'),
        ("./0.png", 'lists "0.png" again, as line 1 does'),
        ("2\x1b[31m\n.png", r"names \"2\\x1b\[31m\\n.png\", which is not there"),
    ],
)
def test_names_that_are_no_image_of_the_folder(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, [_row("0.png"), _row(name)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"file_name": "0.png", "text": "a", "text": "b"}',
            "line 1 of .*: the key 'text' is in one object twice",
        ),
        (b'{"file_name": "0.png", "text": NaN}', "must be JSON with text, a caption or a list of"),
        (b'{"file_name": "0.png", "text": "\\ud83e"}', "has a caption with half a character"),
        (b"[" * 100_000, "must be JSON with file_name"),
        (
            b'{"file_name": "0.png", "text": "a", "size": ' + b"9" * 5000 + b"}",
            "must be JSON with f",
        ),
        (b"\xff\xfe{\0", "line 1 of .* is not in UTF-8"),
    ],
    ids=["twice", "NaN", "surrogate", "deep", "long number", "UTF-16"],
)
def test_lines_that_are_no_caption(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, [line])


def test_all_lines_that_are_wrong_are_listed_with_their_numbers(tmp_path):
    rows = [_row("0.png"), b"", *(_row(f"{i}.gif") for i in range(14)), {"text": "a"}]
    with pytest.raises(ValueError, match="15 of 16 lines are wrong in") as error:
        _read(tmp_path, rows)
    lines = str(error.value).splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == [str(i) for i in range(3, 13)]
    assert lines[-1] == "  and 5 more"


def test_captions_that_are_too_long_together_are_refused(tmp_path, monkeypatch):
    rows = [{"file_name": name, "text": "x" * 900} for name in ("0.png", "sub/1.png")]
    monkeypatch.setattr(metadata.json_files, "MAX_BYTES", 1000)
    monkeypatch.setattr(metadata, "MAX_BYTES_PER_IMAGE", 500)
    assert list(_read(tmp_path, rows).values()) == [{"text": "x" * 900}] * 2
    monkeypatch.setattr(metadata, "MAX_BYTES_PER_IMAGE", 400)
    with pytest.raises(ValueError, match=r"1,800 bytes up to line 2, the most .* of 2 images"):
        _read(tmp_path, rows)
    with pytest.raises(ValueError, match=r"line 1 of .*: it has more than 0 MiB"):
        _read(tmp_path, [{"file_name": "0.png", "text": "x" * 2000}])


def test_names_are_found_as_the_folder_has_them(tmp_path):
    """In other spellings of a path, and of é; a name that is strange but there is no fault."""
    known = ["0.png", "sub/1.png", "cafe\u0301.png", "odd\\name.png"]
    rows = ["./0.png", "sub//1.png", "caf\u00e9.png", "odd\\name.png"]
    read = _read(tmp_path, [_row(name) | {"width": None} for name in rows], known)
    assert list(read) == known
    assert list(read.values()) == [{"text": "a"}] * 4


def test_empty_captions_and_other_keys_are_allowed(tmp_path):
    line = b'{"score": NaN, "file_name": "0.png", "more": {"text": 1}, "text": ""}'
    assert _read(tmp_path, [line]) == {"0.png": {"text": ""}}
