"""Tokens of captions: hashed words, and CLIP's byte pairs as transformers does; what is lost."""

import json
import logging
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tokenizers
from conftest import ROOT
from helpers import bpe

from dit_jax.data import text

# Of tests/helpers/bpe.py's vocabulary, between 533 and 534, from transformers 5.23's CLIPTokenizer.
RECORDED = {
    "": [],
    "The cat": [513, 515],
    "  a\tphoto\n of\u3000the  CAT ": [320, 530, 78, 325, 513, 515],
    "the cat's on": [513, 515, 520, 516],
    "they're here": [512, 68, 344, 521, 71, 68, 522],
    "'RE I'LL": [521, 328, 6, 75, 331],
    "cafe\u0301 CAFÉ café": [514, 69, 523, 514, 69, 523, 514, 69, 523],
    "🐈 🐈\u200d⬛": [524, 525, 238, 230, 158, 222, 235, 158, 105, 505],
    "cat123": [515, 272, 273, 274],
    "(the, cat)... wow!!": [263, 513, 267, 515, 8, 531, 269, 86, 78, 342, 532],
    "“cat”": [158, 222, 506, 515, 158, 222, 507],
    "a<|endoftext|>b <|startoftext|>": [320, 534, 321, 533],
    "<|ENDOFTEXT|>": [27, 347, 68, 77, 67, 78, 69, 83, 68, 87, 339, 91, 285],
    "x_y\x00z": [343, 318, 344, 444, 345],
    "Straße İ ﬁ": [82, 83, 81, 64, 127, 253, 324, 328, 136, 485, 171, 105, 479],
    "猫 cat": [163, 234, 360, 515],
}


@pytest.fixture
def warnings(caplog, monkeypatch):
    """warnings(): the lines that the package has logged, none of them before."""
    monkeypatch.setattr(text, "_warned", set())
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def files(tmp_path):
    return bpe.write(tmp_path / "tokenizer")


def test_words_are_known_by_their_crc(warnings):
    tokens = text.WordTokenizer(4, 4096)(["Red heart", "", "red-heart", " HEART\x00🐈 "])
    assert tokens.dtype == np.int32
    words = ("red", "heart", "-", "\x00", "🐈")
    red, heart, dash, zero, cat = (1 + zlib.crc32(word.encode()) % 4095 for word in words)
    np.testing.assert_array_equal(
        tokens,
        [[red, heart, 0, 0], [text.PAD] * 4, [red, dash, heart, 0], [heart, zero, cat, 0]],
    )
    assert text.WordTokenizer(6, 4096)([]).shape == (0, 6)
    assert not warnings()


def test_words_are_the_same_whichever_way_their_letters_are_composed():
    one, other = text.WordTokenizer(2, 4096)(["caf\u00e9", "Cafe\u0301"])
    np.testing.assert_array_equal(one, other)


def test_marks_belong_to_their_letters():
    tokenize = text.WordTokenizer(4, 4096)
    tokens = tokenize(["\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u093f", "snake_case2"])
    assert (tokens != text.PAD).sum(axis=1).tolist() == [2, 1]  # of which the first word is hindi
    again = pickle.loads(pickle.dumps(tokenize))
    np.testing.assert_array_equal(again(["a red heart"]), tokenize(["a red heart"]))


def test_hashes_fill_the_vocabulary_without_padding():
    tokens = text.WordTokenizer(300, 8)([" ".join(map(str, range(300)))])
    assert set(tokens[0]) == set(range(1, 8))
    assert set(text.WordTokenizer(3, 2)(["a b"])[0]) == {1, text.PAD}


def test_a_caption_of_many_words_keeps_the_first(warnings):
    tokenize = text.WordTokenizer(3, 4096)
    tokens = tokenize(["a black cat", "a black cat, asleep", "one 🐈 or two"])
    np.testing.assert_array_equal(tokens[1], tokens[0])
    assert warnings() == [
        "caption cut to 3 tokens; lost: ', asleep' of 'a black cat, asleep'",
        "caption cut to 3 tokens; lost: 'two' of 'one 🐈 or two'",
    ]


@pytest.mark.parametrize(("pad", "pad_id"), [(text.END, 534), ("!", 0)])
def test_clip_s_tokens_are_the_recorded_ones(files, pad, pad_id, warnings):
    tokenizer = text.ClipTokenizer.from_files(
        files / "vocab.json", files / "merges.txt", length=16, pad=pad
    )
    assert (tokenizer.length, tokenizer.vocab_size) == (16, 535)
    tokens = tokenizer(list(RECORDED))
    assert (tokens.shape, tokens.dtype) == ((len(RECORDED), 16), np.int32)
    for row, (caption, expected) in zip(tokens, RECORDED.items(), strict=True):
        padding = [pad_id] * (14 - len(expected))
        assert row.tolist() == [533, *expected, 534, *padding], caption
    assert tokenizer([]).shape == (0, 16)
    assert not warnings()


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_tokenizer_files_as_editors_save_them(files, end):
    paths = files / "vocab.json", files / "merges.txt"
    tokens = text.ClipTokenizer.from_files(*paths)(list(RECORDED))
    for path in paths:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", end))
    np.testing.assert_array_equal(text.ClipTokenizer.from_files(*paths)(list(RECORDED)), tokens)


def test_exclamation_mark_is_a_word_where_it_is_padding_too():
    tokens = text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 6, "!")(["wow ! !!", "!"])
    assert bpe.TOKENS[256] == "!</w>"
    np.testing.assert_array_equal(tokens, [[533, 86, 78, 342, 256, 534], [533, 256, 534, 0, 0, 0]])


def test_long_caption_keeps_its_end_token_and_the_words_lost_are_named(warnings):
    captions = ["the cat on", "Thé CAT's cafe\u0301 on it", "the cat on it"]
    tokens = text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 5)(captions)
    np.testing.assert_array_equal(tokens[0], [533, 513, 515, 516, 534])
    np.testing.assert_array_equal(tokens[1], [533, 512, 523, 515, 534])
    np.testing.assert_array_equal(tokens[2], tokens[0])
    assert warnings() == [
        f"caption cut to 5 tokens; lost: {lost!r} of {caption!r}"
        for lost, caption in [("CAT's cafe\u0301 on it", captions[1]), ("it", captions[2])]
    ]


def test_shortest_length_has_no_words(warnings):
    tokens = text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 2)(["", "a cat"])
    np.testing.assert_array_equal(tokens, [[533, 534]] * 2)
    assert warnings() == ["caption cut to 2 tokens; lost: 'a cat' of 'a cat'"]
    with pytest.raises(ValueError, match="length=1 must be 2 or more"):
        text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 1)
    with pytest.raises(ValueError, match="length=0 must be 1 or more, vocab_size=9 2 or more"):
        text.WordTokenizer(0, 9)
    with pytest.raises(ValueError, match="vocab_size=1 2 or more"):
        text.WordTokenizer(1, 1)


def test_the_first_captions_that_are_cut_are_named_once(warnings, monkeypatch):
    monkeypatch.setattr(text, "MAX_WARNINGS", 2)
    for _ in range(2):
        text.WordTokenizer(1, 9)(["a b", "c d", "a b", "e f", "g h"])
    assert warnings() == [
        "caption cut to 1 tokens; lost: 'b' of 'a b'",
        "caption cut to 1 tokens; lost: 'd' of 'c d'",
        "more captions are cut to 1 tokens; these are not named",
    ]
    assert len(text._warned) == 3  # however long it runs


@pytest.mark.parametrize("pad", [text.END, "!"])
def test_saved_pickled_and_read_by_the_library_it_is_the_same(tmp_path, pad):
    tokenizer = text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 9, pad)
    tokenizer.save(tmp_path / text.FILE)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / text.FILE))
    captions, expected = list(RECORDED), tokenizer(list(RECORDED))
    for again in (text.load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.length, again.vocab_size) == (9, 535)
        np.testing.assert_array_equal(again(captions), expected)
    np.testing.assert_array_equal([e.ids for e in library.encode_batch(captions)], expected)


def test_another_tokenizer_json_gives_vocabulary_and_merges_alone(tmp_path):
    """Its rules may be older, and its merges are strings where they are."""
    model = dict(type="BPE", end_of_word_suffix="</w>", vocab=bpe.VOCAB)
    model["merges"] = [" ".join(pair) for pair in bpe.MERGES]
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(dict(model=model, normalizer=None, padding=None)))
    tokenizer = text.ClipTokenizer.load(path, 16, "!")
    expected = text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 16, "!")
    np.testing.assert_array_equal(tokenizer(list(RECORDED)), expected(list(RECORDED)))
    with pytest.raises(ValueError, match=r"theirs.json has neither the length to which"):
        text.ClipTokenizer.load(path)


def test_missing_files_are_named_with_where_they_come_from(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*/tokenizer.json. python -m dit_jax.convert"):
        text.load_tokenizer(tmp_path)
    for missing in ("merges.txt", "vocab.json"):
        paths = [files / name for name in ("vocab.json", "merges.txt")]
        paths = [path.with_name("none") if path.name == missing else path for path in paths]
        message = r"no .*/none: CLIP's repositories have vocab.json and merges.txt beside the"
        with pytest.raises(FileNotFoundError, match=message):
            text.ClipTokenizer.from_files(*paths)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("vocab.json", b'{"!": 0,', r"cannot read .*vocab.json: it ends too early: Expecting"),
        ("vocab.json", b"[1]", r"cannot read .*vocab.json: "),
        ("vocab.json", b'{"!": 0}', r"of 1 tokens is not CLIP's: it has no <\|start.*, <\|endof"),
        ("merges.txt", b"t h\nthe\n", r"merges.txt, line 2, is not a pair of tokens: 'the'"),
        ("merges.txt", b"\xff\xfe", r"cannot read .*merges.txt: 'utf-8' codec can't decode"),
        ("merges.txt", b"q q\n", "535 tokens and the 1 merges do not belong together: .*`qq`"),
        ("merges.txt", b"a\x1b[2J b c\n", r"line 1, is not a pair of tokens: 'a\\x1b\[2J b c'"),
        ("vocab.json", b'{"a": ' * 10**5, "nested more than 100 deep"),
        ("vocab.json", b'{"a": 1, "a": 2}', "the key 'a' is in one object twice"),
    ],
)
def test_damaged_files_are_refused(files, name, contents, message):
    (files / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        text.ClipTokenizer.from_files(files / "vocab.json", files / "merges.txt")


@pytest.mark.parametrize("number", [-1, 1.5, "1", True, None, 2**20, 10**4000, 7])
def test_numbers_of_tokens_are_different_whole_numbers(files, number):
    (files / "vocab.json").write_text(json.dumps(bpe.VOCAB | {"<x>": number}))
    message = "536 tokens has 535 different ids from 0 to 1048575"
    with pytest.raises(ValueError, match=message):
        text.ClipTokenizer.from_files(files / "vocab.json", files / "merges.txt")


WRONG = [None, True, 0, -1, 1.5, 10**4000, "x\x1b", [], [[[]]], [7], {"a": {"b": 1}}, "\ud800"]
PLACES = [
    ("model",),
    ("model", "type"),
    ("model", "end_of_word_suffix"),
    ("model", "vocab"),
    ("model", "merges"),
    ("padding",),
    ("padding", "strategy"),
    ("padding", "strategy", "Fixed"),
    ("padding", "pad_token"),
    ("added_tokens",),
    ("added_tokens", 0),
    ("added_tokens", 0, "content"),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_tokenizer_json_of_other_values_is_refused_in_a_line(tmp_path, place):
    path, refused = tmp_path / text.FILE, 0
    text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 9).save(path)
    whole = json.loads(path.read_text())
    for value in WRONG:
        part = reference = json.loads(json.dumps(whole))
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        path.write_text(json.dumps(reference))
        message = _message(tmp_path)
        refused += bool(message)
        assert message.isprintable(), value
        assert len(message) < 600, value
    assert refused


def _message(workdir):
    """What loading its tokenizer ends in, empty for a tokenizer."""
    try:
        text.load_tokenizer(workdir)(["the cat"])
    except ValueError as error:
        return str(error)
    return ""


def test_added_tokens_are_refused(files, tmp_path):
    """Those of textual inversion would be cut to pieces; CLIP's own are in the vocabulary too."""
    lists, added = (files / "vocab.json", files / "merges.txt"), files / "added_tokens.json"
    tokenizer = text.ClipTokenizer.from_files(*lists, 16)
    tokenizer.save(tmp_path / text.FILE)
    reference = json.loads((tmp_path / text.FILE).read_text())
    added.write_text(json.dumps({text.END: bpe.VOCAB[text.END]}))
    expected = tokenizer(["the cat"])
    np.testing.assert_array_equal(text.ClipTokenizer.from_files(*lists, 16)(["the cat"]), expected)
    added.write_text(json.dumps({"<cat-toy>": len(bpe.VOCAB)}))
    reference["added_tokens"].append({"id": len(bpe.VOCAB), "content": "<cat-toy>"})
    (tmp_path / text.FILE).write_text(json.dumps(reference))
    for name, load in (
        ("added_tokens.json", lambda: text.ClipTokenizer.from_files(*lists)),
        ("tokenizer.json", lambda: text.load_tokenizer(tmp_path)),
    ):
        with pytest.raises(ValueError, match=rf"{name} adds <cat-toy> to the vocabulary, as text"):
            load()


def test_tokenizer_of_another_kind_is_refused(tmp_path):
    (tmp_path / text.FILE).write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(
        ValueError, match=r"is not the tokenizer of CLIP, .*: type, end_of_word_suffix, vocab"
    ):
        text.load_tokenizer(tmp_path)


def test_module_needs_no_flax():
    code = "import sys, dit_jax.data.text; sys.exit('flax' in sys.modules or 'jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
