"""What metadata.jsonl may hold, and that the line which is wrong is named."""

import pytest
from PIL import Image

from dit_jax import sources


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
CAPTION = "JSON with text, a caption or a list of captions, at least one, not '{"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, r"no .*metadata.jsonl: with data.caption_feature='text' a folder needs one line"),
        (b'{"file_name": "0.png"}', rf"line 1 of .*metadata.jsonl must be {CAPTION}"),
        (b'\n\n{"text": "a zero"}', r"line 3 of .*metadata.jsonl must be JSON with file_name, a t"),
        (ONE + b"\n1.png a one", r"line 2 of .*jsonl must be JSON with file_name, a text, not '1"),
        (
            b'[["file_name", "0.png"], ["text", "a"]]',
            r"line 1 of .*jsonl must be JSON with file_name, a text, not",
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
        sources.open_split(_metadata(config, tmp_path, contents), "train")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"], ids=str)
def test_metadata_of_other_editors(config, tmp_path, end):
    """A byte order mark, blank lines, and what Python takes for the end of a line in a caption."""
    first = ONE.replace(b"a zero", "a\u2028z\u00e9ro\x85".encode())
    contents = b"\xef\xbb\xbf" + first + end + b"  " + end + TWO + end
    source = sources.open_split(_metadata(config, tmp_path, contents), "train")
    assert [source.captions(i) for i in range(2)] == [2 * ["a\u2028z\u00e9ro\x85"], 2 * ["one"]]
