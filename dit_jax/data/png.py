"""Integrity check of PNG files: the checksums of their chunks and the number of their pixels.

Pillow checks neither. It decodes flipped bits to other pixels and leaves missing rows black.
"""

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator

from dit_jax.errors import UserError

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> number of channels
PALETTE = 3  # colour type of palette images; without the palette Pillow makes all pixels black
# The seven passes of an interlaced image: (first column, first row, column step, row step).
ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
PIECE, BLOCK = 2**16, 2**20  # the most bytes given to zlib and taken from it in one call


def check(contents: bytes) -> None:
    """Checks that all checksums are right and that the pixel data has the size in the header.

    Args:
      contents: the bytes of a file that begins as a PNG. Bytes after its last chunk are ignored.
    Raises: ValueError with the damage.
    """
    chunks = _read_chunks(memoryview(contents))
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise UserError("it is a damaged PNG, without its header")
    expected, kinds = _count_bytes(header), {b"IHDR"}
    for kind, run in itertools.groupby(chunks, lambda chunk: chunk[0]):
        if kind == b"IHDR":
            raise UserError("it is a damaged PNG, with two headers")
        # Only the first run of IDAT chunks counts: Pillow reads no later one.
        if kind == b"IDAT" and kind not in kinds:
            if header[9] == PALETTE and b"PLTE" not in kinds:
                raise UserError("it is a damaged PNG, without the palette of its colours")
            _check_pixels((data for _, data in run), expected)
        kinds.add(kind)
    if b"IDAT" not in kinds:
        raise UserError("it is a damaged PNG, without pixels")


def _read_chunks(contents: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yields (kind, data) of the chunks of a PNG."""
    start, kind = 8, b""  # the signature of a PNG has 8 bytes
    while kind != b"IEND":
        # A chunk has 4 bytes of length, 4 of kind, its data, and 4 of CRC-32 over kind and data.
        if len(contents) < start + 12:
            raise UserError("it is a truncated PNG, without its end")
        length, kind = struct.unpack_from(">I4s", contents, start)
        end = start + 8 + length
        if len(contents) < end + 4:
            raise UserError("it is a truncated or damaged PNG: a chunk is longer than the file")
        if zlib.crc32(contents[start + 4 : end]) != int.from_bytes(contents[end : end + 4]):
            name = kind.decode() if kind.isalpha() else "unknown"
            raise UserError(f"it is a damaged PNG: the checksum of its {name} chunk is wrong")
        yield kind, contents[start + 8 : end]
        start = end + 4


def _count_bytes(header):
    """Returns the size of the unpacked pixel data, which has one filter byte before each row."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if colour not in CHANNELS:
        raise UserError(f"it is a damaged PNG: no PNG has colours of type {colour}")
    passes = [(width, height)]
    if interlaced:
        passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in ADAM7]
    bits = depth * CHANNELS[colour]
    return sum((1 + -(-columns * bits // 8)) * rows for columns, rows in passes if columns > 0)


def _check_pixels(parts: Iterable[memoryview], expected: int) -> None:
    """Raises a ValueError unless the zlib stream is complete and unpacks to `expected` bytes.

    Args:
      parts: the data of consecutive IDAT chunks, which together are one stream.
    """
    # In small pieces, and hardly beyond `expected`: a hostile stream may unpack to far more.
    stream, count = zlib.decompressobj(), 0
    pieces = (part[i : i + PIECE] for part in parts for i in range(0, len(part), PIECE))
    try:
        for piece in pieces:
            more = True
            while more and not stream.eof and count <= expected:
                block = stream.decompress(piece, BLOCK)
                piece, count = stream.unconsumed_tail, count + len(block)
                # After a full block zlib may hold back more, although all input was consumed.
                more = piece or len(block) == BLOCK
    except zlib.error as error:
        raise UserError(f"it is a damaged PNG: its pixels cannot be unpacked: {error}") from error
    if count != expected or not stream.eof:
        shown = f"more than {expected:,}" if count > expected else f"{count:,}"
        raise UserError(
            f"it is a damaged PNG: its pixels are {shown} bytes, not the {expected:,} of its size"
        )
