"""Tokenizers that turn captions into token ids on the host: hashed words or CLIP's byte pairs."""

import logging
import pathlib
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, json_files, schemas

logger = logging.getLogger("dit_jax")

PAD = 0  # the padding id of WordTokenizer
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Pattern of one word in CLIP. Whitespace matches no alternative, so it is dropped.
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
MAX_LENGTH = 2**16  # tokens of a caption
MAX_TOKENS = 2**20  # tokens of a vocabulary
MAX_WARNINGS = 100  # the most warnings about captions that are too long
# Captions that had a warning. One more than MAX_WARNINGS marks that the last warning was logged.
_warned = set()
FILE = "tokenizer.json"  # name of the tokenizer's file in the workdir of a text encoder
SOURCE = (
    "CLIP's repositories have vocab.json and merges.txt beside the weights, Stable Diffusion's in "
    "the folder tokenizer/."
)


def _is_merge(value):
    """Returns whether a value is a pair of tokens, as a list or, in older files, as one string."""
    return schemas.is_string(value) or (
        schemas.list_of(schemas.is_string)(value) and len(value) == 2
    )


# The parts of a tokenizer.json that are read; `padding` is optional.
MODEL = {
    "type": lambda value: value == "BPE",
    "end_of_word_suffix": lambda value: value == WORD_END,
    "vocab": lambda value: isinstance(value, dict),
    "merges": schemas.list_of(_is_merge),
}
ADDED_TOKENS = schemas.list_of(schemas.object_of({"content": schemas.is_string}))
PADDING = schemas.object_of(
    {"strategy": schemas.object_of({"Fixed": schemas.is_count}), "pad_token": schemas.is_string}
)


class WordTokenizer:
    """Tokenizer that hashes words to ids, for text models trained in this project.

    There is no vocabulary. The id of a word, ignoring case, is its CRC-32 modulo vocab_size - 1,
    plus 1. Few words share an id if there are many more ids than words. A punctuation mark is a
    word. PAD follows the last word.
    """

    def __init__(self, length: int, vocab_size: int):
        """Creates a tokenizer to rows of `length` ids, each in 0..vocab_size - 1.

        Raises: ValueError for a length below 1 or a vocab_size below 2.
        """
        if length < 1 or vocab_size < 2:
            raise UserError(f"{length=} must be 1 or more, {vocab_size=} 2 or more.")
        self.length = length
        self.vocab_size = vocab_size
        words = tokenizers.Regex(r"[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]")
        self._split = tokenizers.pre_tokenizers.Split(words, behavior="removed", invert=True)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns tokens [len(captions), length] int32 in 0..vocab_size - 1.

        An empty caption, "", becomes all PAD. A caption that is too long keeps its first `length`
        words; a warning shows the words that are lost.
        """
        tokens = np.full((len(captions), self.length), PAD, np.int32)
        for row, caption in zip(tokens, captions, strict=True):
            # The same letter may be one character or two in Unicode, and must get one hash.
            composed = unicodedata.normalize("NFC", caption)
            words = self._split.pre_tokenize_str(composed)
            if len(words) > self.length:
                _, (start, _) = words[self.length]
                _warn_of_cut(composed, start, self.length)
            ids = [self._id(word) for word, _ in words[: self.length]]
            row[: len(ids)] = ids
        return tokens

    def _id(self, word):
        # CRC-32, because Python's own hash differs between processes. 1 + avoids PAD.
        return 1 + zlib.crc32(word.lower().encode()) % (self.vocab_size - 1)


class ClipTokenizer:
    """CLIP's tokenizer: byte pairs of lower-case words between START and END, then padding.

    Unicode is composed (NFC) and whitespace only separates words. CLIPTokenizer in transformers 5
    gives the same tokens. OpenAI's code first resolves HTML entities and runs ftfy, which
    straightens quotes and splits ligatures and wide letters; this class does neither.
    If "!" is the padding token, a "!" in a caption is still a word, as it was in training;
    transformers turns it into padding.
    Source: Radford et al. 2021, section 2.4, and OpenAI's code.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        length: int = 77,
        pad: str = END,
    ):
        """Creates a tokenizer to rows of `length` ids.

        Args:
          vocab: token -> id.
          merges: pairs of tokens in the order in which they are joined.
          pad: the padding token: END for Stable Diffusion 1, "!" for Stable Diffusion 2.
        Raises: ValueError for a vocabulary that is not CLIP's, or a length outside 2..MAX_LENGTH.
        """
        # The files may come from anywhere, so each value is checked before the library gets it.
        if not 2 <= length <= MAX_LENGTH:
            raise UserError(
                f"length={str(length)[:20]} must be 2 or more, for {START} and {END}, and at most "
                f"{MAX_LENGTH}."
            )
        if missing := [token for token in (START, END, pad) if token not in vocab]:
            raise UserError(
                f"the vocabulary of {len(vocab)} tokens is not CLIP's: it has no "
                f"{files.list_some(missing)}. {SOURCE}"
            )
        ids = [i for i in vocab.values() if type(i) is int and 0 <= i < MAX_TOKENS]
        if len({*ids}) < len(vocab):
            raise UserError(
                f"the vocabulary of {len(vocab)} tokens has {len({*ids})} different ids from 0 to "
                f"{MAX_TOKENS - 1}. Each token must have an id of its own. {SOURCE}"
            )
        self.length = length
        self.vocab_size = max(vocab.values()) + 1
        # In CLIP's order: NFC, lower case, words, then bytes.
        self._tokenizer = tokenizers.Tokenizer(_byte_pairs(vocab, merges))
        self._tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
        )
        words = tokenizers.Regex(WORD)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(words, behavior="removed", invert=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        # pad is no special token: a "!" in a caption would become padding.
        self._tokenizer.add_special_tokens([START, END])
        self._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[START, "$A", END],
            special_tokens=[(token, vocab[token]) for token in (START, END)],
        )
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=vocab[pad], pad_token=pad)

    @classmethod
    def from_files(
        cls, vocab: pathlib.Path, merges: pathlib.Path, length: int = 77, pad: str = END
    ) -> "ClipTokenizer":
        """Loads a tokenizer from CLIP's vocab.json and merges.txt.

        Raises: FileNotFoundError; ValueError for a damaged file, for new tokens in
          added_tokens.json of the same directory, or as the constructor.
        """
        try:
            lines = _read_file(merges).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"cannot read {files.printable(merges)}: {error}. Get it again: {SOURCE}"
            ) from error
        pairs = []
        for line_number, line in enumerate(lines, 1):
            if line.startswith("#version") or not line:
                continue
            if len(pair := line.split(" ")) != 2:
                raise UserError(
                    f"{files.printable(merges)}, line {line_number}, is not a pair of tokens: "
                    f"{line[:100]!r}."
                )
            pairs.append(tuple(pair))
        # Without this check, added tokens would silently be split like other words.
        ids, added_path = _read_json(vocab), vocab.parent / "added_tokens.json"
        if added_path.is_file():
            _refuse_added_tokens(added_path, _read_json(added_path), ids)
        return cls(ids, pairs, length, pad)

    @classmethod
    def load(cls, path: pathlib.Path, length: int | None = None, pad: str = END) -> "ClipTokenizer":
        """Loads a tokenizer from a tokenizer.json.

        Only the vocabulary, the merges and the padding are read, so the file may have other
        contents than `save` writes. Without a length, the file gives length and pad.
        Raises: FileNotFoundError; ValueError for a damaged file, another kind of tokenizer, or
          tokens that are added to its vocabulary.
        """
        contents, shown = _read_json(path), files.printable(path)
        model, added = contents.get("model"), contents.get("added_tokens", [])
        invalid = schemas.list_invalid_keys(model, MODEL) if isinstance(model, dict) else ["model"]
        if not ADDED_TOKENS(added):
            invalid.append("added_tokens")
        if invalid:
            raise UserError(
                f"{shown} is not the tokenizer of CLIP, a model 'BPE' whose words end in "
                f"{WORD_END!r}. These keys have other values: {', '.join(invalid)}. {SOURCE}"
            )
        if length is None:
            padding = contents.get("padding")
            if not PADDING(padding):
                raise UserError(
                    f"{shown} has neither the length to which captions are padded nor the padding "
                    "token. Take the file of a workdir that python -m dit_jax.convert clip wrote."
                )
            length, pad = padding["strategy"]["Fixed"], padding["pad_token"]
        _refuse_added_tokens(path, [token["content"] for token in added], model["vocab"])
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        return cls(model["vocab"], [tuple(pair) for pair in merges], length, pad)

    def save(self, path: pathlib.Path) -> None:
        """Writes a tokenizer.json for `load` and for the library tokenizers."""
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns tokens [len(captions), length] int32: START, the caption, END, padding.

        A caption that is too long keeps its first length - 2 tokens; a warning shows the words
        that are lost.
        """
        encodings = self._tokenizer.encode_batch(list(captions))
        for caption, encoding in zip(captions, encodings, strict=True):
            if encoding.overflowing:
                (cut, _) = encoding.overflowing[0].offsets[1]  # offsets[0] is of START
                # The cut may be inside a word; the warning shows this word as a whole.
                start = re.search(r"\S*$", caption[:cut]).start()
                _warn_of_cut(caption, start, self.length)
        tokens = np.array([encoding.ids for encoding in encodings], np.int32)
        return tokens.reshape(-1, self.length)


def load_tokenizer(workdir: pathlib.Path) -> ClipTokenizer:
    """Loads the tokenizer in the workdir of a text encoder.

    Raises: FileNotFoundError; ValueError as `ClipTokenizer.load`.
    """
    if not (workdir / FILE).is_file():
        raise MissingFileError(
            f"no {workdir / FILE}. python -m dit_jax.convert clip SRC NEW_WORKDIR writes one. Copy "
            "the file from there, or from another workdir of the same text encoder."
        )
    return ClipTokenizer.load(workdir / FILE)


def _refuse_added_tokens(path, tokens, vocab):
    """Raises a ValueError if some of the tokens are not in the vocabulary."""
    if added := sorted(set(tokens) - vocab.keys()):
        raise UserError(
            f"{files.printable(path)} adds {files.list_some(added, 3)} to the vocabulary, as "
            "textual inversion does. Added tokens are not supported. Remove them from the file: "
            "then they are split like other words."
        )


def _byte_pairs(vocab, merges):
    """Returns the byte-pair model.   Raises: ValueError if vocab and merges do not fit."""
    try:
        return tokenizers.models.BPE(
            dict(vocab), list(merges), end_of_word_suffix=WORD_END, unk_token=END
        )
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = files.printable(error)[:300]
        raise UserError(
            f"the vocabulary of {len(vocab)} tokens and the {len(merges)} merges do not belong "
            f"together: {reason}. {SOURCE}"
        ) from error


def _warn_of_cut(caption, start, length):
    """Warns, once per caption, that the words from the character `start` on are lost."""
    if caption in _warned or len(_warned) > MAX_WARNINGS:
        return
    _warned.add(caption)
    if len(_warned) > MAX_WARNINGS:  # a dataset may have millions of long captions
        logger.warning("more captions are cut to %d tokens; these are not named", length)
    else:
        lost = caption[start:]
        logger.warning("caption cut to %d tokens; lost: %r of %r", length, lost, caption)


def _read_file(path):
    """Returns the bytes of a file.   Raises: FileNotFoundError; ValueError if it is too large."""
    if not path.is_file():
        raise MissingFileError(f"no {files.printable(path)}: {SOURCE}")
    contents = json_files.read_bytes(path, json_files.MAX_BYTES + 1)
    if len(contents) > json_files.MAX_BYTES:
        raise UserError(
            f"cannot read {files.printable(path)}: it has more than {json_files.MAX_BYTES:,} "
            f"bytes. Get it again: {SOURCE}"
        )
    return contents


def _read_json(path):
    """Returns the JSON object in a file of the tokenizer."""
    expected = "a file of CLIP's tokenizer, from the same place as the weights"
    value = json_files.parse_json(_read_file(path), files.printable(path), expected)
    if not isinstance(value, dict):
        raise UserError(
            f"cannot read {files.printable(path)}: it is no object. It must be {expected}."
        )
    return value
