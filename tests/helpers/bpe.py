"""A small vocabulary with the structure of CLIP's, and its files."""

import json

from dit_jax.data import text

# Merges of bytes, each written as its letter: "Ã©" is é, and "ðŁ" begins most emoji.
MERGES = [
    tuple(line.split())
    for line in """
    t h
    th e</w>
    c a
    ca t</w>
    o n</w>
    i n
    in g</w>
    r e
    ' s</w>
    ' re</w>
    r e</w>
    Ã ©</w>
    ðŁ ĲĪ</w>
    ð Ł
    Ĳ Ī</w>
    p h
    ph o
    pho t
    phot o</w>
    . .
    ! !</w>
    """.strip().splitlines()
]


def _list_byte_letters():
    """Lists the letters of all bytes, in CLIP's order: the printable ones of Latin-1 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(0x100 + i) for i in range(256 - len(printable)))]


TOKENS = [
    *_list_byte_letters(),
    *(f"{letter}</w>" for letter in _list_byte_letters()),
    *map("".join, MERGES),
    text.START,
    text.END,
]
VOCAB = {token: i for i, token in enumerate(TOKENS)}


def write(directory):
    """Writes vocab.json and merges.txt, and returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(VOCAB))
    lines = ["#version: 0.2", *map(" ".join, MERGES)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    return directory
