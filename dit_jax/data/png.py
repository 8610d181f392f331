"""PNG files as they were written: their checksums, and pixels for all the rows of their size.

Pillow looks at neither: it decodes flipped bits to other pixels, and leaves lost rows black.
"""

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator

from dit_jax.errors import UserError

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each colour type
PALETTE = 3  # the type of colours in a palette, without which Pillow makes all black
# Of the seven passes of an interlaced image: the first column and row, and the steps to the next.
ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
PIECE, BLOCK = 2**16, 2**20  # bytes that are given to zlib at once, and taken from it


def check(contents: bytes) -> None:
    """Demands the checksum of every chunk, and pixels of just the size that the header says.

    Args: contents, of a file that begins as a PNG. What follows its last chunk is left alone.
    Raises: ValueError that says what is damaged.
    """
    chunks = _chunks(memoryview(contents))
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise UserError("it is a damaged PNG, without its header")
    expected, kinds = _num_bytes(header), {b"IHDR"}
    for kind, run in itertools.groupby(chunks, lambda chunk: chunk[0]):
        if kind == b"IHDR":
            raise UserError("it is a damaged PNG, with two headers")
        if kind == b"IDAT" and kind not in kinds:  # Pillow reads no further run of them
            if header[9] == PALETTE and b"PLTE" not in kinds:
                raise UserError("it is a damaged PNG, without the palette of its colours")
            _check_pixels((data for _, data in run), expected)
        kinds.add(kind)
    if b"IDAT" not in kinds:
        raise UserError("it is a damaged PNG, without pixels")


def _chunks(contents: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, data) of the chunks of a PNG.   Raises: ValueError for one that is damaged."""
    start, kind = 8, b""
    while kind != b"IEND":
        if len(contents) < start + 12:
            raise UserError("it is a truncated PNG: its end is not there")
        length, kind = struct.unpack_from(">I4s", contents, start)
        end = start + 8 + length
        if len(contents) < end + 4:
            raise UserError("it is a truncated or damaged PNG: a chunk is longer than it")
        if zlib.crc32(contents[start + 4 : end]) != int.from_bytes(contents[end : end + 4]):
            name = kind.decode() if kind.isalpha() else "unknown"
            raise UserError(f"it is a damaged PNG: the checksum of its {name} chunk is wrong")
        yield kind, contents[start + 8 : end]
        start = end + 4


def _num_bytes(header):
    """How many bytes the pixels have, with one before each row."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if colour not in CHANNELS:
        raise UserError(f"it is a damaged PNG: no PNG has colours of type {colour}")
    passes = [(width, height)]
    if interlaced:
        passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in ADAM7]
    bits = depth * CHANNELS[colour]
    return sum((1 + -(-columns * bits // 8)) * rows for columns, rows in passes if columns > 0)


def _check_pixels(parts: Iterable[memoryview], expected: int) -> None:
    """Demands that the zlib stream in these parts is whole and has so many bytes unpacked."""
    stream, count = zlib.decompressobj(), 0
    pieces = (part[i : i + PIECE] for part in parts for i in range(0, len(part), PIECE))
    try:
        for piece in pieces:
            more = True
            while more and not stream.eof and count <= expected:
                block = stream.decompress(piece, BLOCK)
                piece, count = stream.unconsumed_tail, count + len(block)
                more = piece or len(block) == BLOCK  # of a full one zlib may keep the rest
    except zlib.error as error:
        raise UserError(f"it is a damaged PNG: its pixels cannot be unpacked: {error}") from error
    if count != expected or not stream.eof:
        number = f"more than {expected:,}" if count > expected else f"{count:,}"
        raise UserError(
            f"it is a damaged PNG: its pixels are {number} bytes, not the {expected:,} of its size"
        )
