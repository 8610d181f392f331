"""Image decoding: the supported formats, the largest sizes, and the published crop.

All commands decode images here, so a file has the same pixels everywhere. They are the pixels as
the file stores them. An EXIF orientation is not applied, because the published loaders of ImageNet
do not apply it either. `orientation` reads it for a warning.
"""

import io
import math
import pathlib
import re
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from dit_jax.config import sizes
from dit_jax.data import png
from dit_jax.errors import UserError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # Pillow's JPEG includes MPO, which phones write
READ = "PNG, JPEG, WEBP and BMP"  # FORMATS, for messages
MAX_BYTES = 2**30  # the most bytes of a file
MAX_PIXELS = 89_478_485  # the most pixels of an image: 256 MiB as RGB
MAX_ENLARGED = 2**26  # the most pixels of an enlarged image before adm_crop cuts it
TOO_LARGE = f"it has more than {MAX_PIXELS:,} pixels, the most that are decoded; make it smaller"

ORIENTATION_WAY_OUT = (
    "pixels are taken as the file stores them. `mogrify -auto-orient FILE` of ImageMagick turns "
    "them for good."
)

# (first bytes, kind) of files that are no images of FORMATS but may have one of the SUFFIXES.
_OTHER_KINDS = (
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"%!PS", "an EPS image"),
    (b"\xc5\xd0\xd3\xc6", "an EPS image"),
    (b"icns", "an ICNS image"),
    (b"\0\0\1\0", "an ICO image"),
    (b"8BPS", "a PSD image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"%PDF", "a PDF document"),
    (b"\0\5\x16\7", "an AppleDouble file of macOS"),
    (b"version https://git-lfs", "a pointer of Git LFS (git lfs pull gets the file)"),
    (b"\x89PNG", "a damaged PNG"),
    (b"\xff\xd8", "a damaged JPEG"),
    (b"RIFF", "a damaged WEBP, or no image"),
    (b"BM", "a damaged BMP, or no image"),
)
# Keys of Image.info whose values may have an orientation.
_ORIENTATION_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


def read_file(path: pathlib.Path) -> bytes:
    """Reads an image file.   Raises: OSError; ValueError if it has more than MAX_BYTES."""
    with path.open("rb") as file:
        contents = file.read(MAX_BYTES + 1)
    if len(contents) > MAX_BYTES:
        raise UserError(f"it has more than {MAX_BYTES:,} bytes, the most of an image file")
    return contents


def read_size(path: pathlib.Path) -> tuple[int, int]:
    """Reads the (width, height) of an image file.   Raises: OSError; ValueError as `decode`."""
    with path.open("rb") as file:
        return _open(file).size


def decode(contents: bytes) -> Image.Image:
    """Decodes an encoded image; from an animation, the first frame.

    Raises: ValueError for a format outside FORMATS, more than MAX_PIXELS, or damaged contents. Its
      message begins with "it": the caller names the file.
    """
    image = _open(io.BytesIO(contents))
    if image.format == "PNG":  # Pillow decodes damaged PNG files without an error
        png.check(contents)
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions for damaged files
        raise UserError(_get_reason(error)) from error
    return image


def _open(file: BinaryIO) -> Image.Image:
    """Opens an image and reads only its header.   Raises: ValueError as `decode`."""
    beginning = file.read(64)
    if not beginning:
        raise UserError("it is empty, 0 bytes")
    _silence_pillow()
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"it is {_describe_kind(beginning)}; {READ} are read") from error
    except Image.DecompressionBombError as error:  # Pillow refuses more than twice MAX_PIXELS
        raise UserError(TOO_LARGE) from error
    except Exception as error:
        raise UserError(_get_reason(error)) from error
    if math.prod(image.size) > MAX_PIXELS:
        raise UserError(TOO_LARGE)
    return image


def _silence_pillow():
    """Hides Pillow's warnings. This module raises an error where one matters."""
    # A permanent filter for Pillow alone: warnings.catch_warnings is not safe in decoder threads.
    entry = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if entry not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _get_reason(error):
    """Returns the message of an error without Pillow's file objects, whose addresses vary."""
    return re.sub(r" ?<_io\.[^>]*>", "", str(error)) or type(error).__name__


def _describe_kind(beginning):
    """Returns the kind of a file that Pillow cannot open, judged by its first bytes."""
    if beginning[4:8] == b"ftyp":  # ISO media container; its brand follows
        return "an AVIF image" if beginning[8:11] == b"avi" else "a HEIC image or a video"
    for first_bytes, kind in _OTHER_KINDS:
        if beginning.startswith(first_bytes):
            return kind
    return "HTML, SVG or XML" if beginning.lstrip().startswith(b"<") else "no image"


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of a decoded image, 1 to 8; 1 (upright) if it has none."""
    if not _ORIENTATION_KEYS.intersection(image.info):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1
    return value if value in range(2, 9) else 1


def mirror(images: np.ndarray) -> np.ndarray:
    """Mirrors images [..., W, C] left to right."""
    return images[..., ::-1, :]


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image of any mode to 8-bit grey (1 channel) or RGB (3 channels).

    Raises: ValueError for images with 32-bit integers or floats.
    """
    return to_8_bits(image).convert({1: "L", 3: "RGB"}[channels])


def to_8_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey to 8 bits; other modes are returned as they are.

    Raises: ValueError for images with 32-bit integers or floats.
    """
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips, so all but the darkest values would become white.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"its mode {image.mode!r} has no range of values; save it with 8 bits")
    return image


def adm_crop(image: Image.Image, size: sizes.Size) -> Image.Image:
    """Crops the centre of an image as published: halve with BOX, resize with BICUBIC, cut.

    The resized image just covers the size. The published code takes only squares; this function
    also takes (height, width). An image that would have more than MAX_ENLARGED pixels after the
    resize is cut before it. The result is the same up to rounding, and the memory stays bounded.
    Source: Dhariwal & Nichol 2021 (ADM); all published DiT results use this crop.
    """
    height, width = sizes.height_and_width(size)
    if image.size == (width, height):
        return image
    while image.width >= 2 * width and image.height >= 2 * height:
        image = _resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = round(image.width * scale), round(image.height * scale)
    if math.prod(scaled) > MAX_ENLARGED:
        return _cut_and_resize(image, scaled, (width, height))
    image = _resize(image, scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize(image, size, resample):
    # The width first, in a step of its own, as in earlier versions of Pillow, with which the
    # published numbers were computed. Pillow 13 takes the height of tall images first, and so
    # rounds in another way.
    return image.resize((size[0], image.height), resample).resize(size, resample)


def _cut_and_resize(image, scaled, sides):
    """Returns the centre of the image resized to `scaled`, without computing the margins.

    Args:
      scaled: (width, height) of the whole resized image.
      sides: (width, height) of the centre.
    """
    cuts, boxes = [], []  # [(start, stop)] of the width and of the height
    for side, scaled_side, centre_side in zip(image.size, scaled, sides, strict=True):
        unit = side / scaled_side  # pixels of the original image per pixel of the resized one
        start = (scaled_side - centre_side) // 2 * unit
        stop = start + centre_side * unit
        # BICUBIC reads two pixels to either side, or four when it shrinks to no less than half.
        first, last = max(0, math.floor(start) - 6), min(side, math.ceil(stop) + 6)
        cuts.append((first, last))
        # Relative to the cut, because Pillow stores a box in float32, which rounds large numbers.
        boxes.append((start - first, min(stop - first, last - first)))
    (left, right), (top, bottom) = cuts
    (x_0, x_1), (y_0, y_1) = boxes
    image = image.crop((left, top, right, bottom))
    # The width first, as in `_resize`.
    box = (x_0, 0, x_1, image.height)
    image = image.resize((sides[0], image.height), Image.Resampling.BICUBIC, box=box)
    return image.resize(sides, Image.Resampling.BICUBIC, box=(0, y_0, sides[0], y_1))
