"""Image files as pixels: the formats that are read, their largest size, and the published crop.

Every command decodes images here, so one file has the same pixels everywhere. They are the pixels
as the file stores them. An EXIF orientation is not applied, because the published loaders of
ImageNet do not apply it either; `orientation` finds it, so that it can be reported.
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
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # Pillow's JPEG includes MPO, the pairs that phones write
READ = "PNG, JPEG, WEBP and BMP"
MAX_BYTES = 2**30  # of a file
MAX_PIXELS = 89_478_485  # of an image: 256 MiB of RGB
MAX_ENLARGED = 2**26  # pixels that the published crop may enlarge an image to before it cuts

ORIENTATION_WAY_OUT = (
    "pixels are taken as the file stores them. `mogrify -auto-orient FILE` of ImageMagick turns "
    "them for good."
)

# The first bytes of other files that are met under an image's name.
_OTHERS = (
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
_ORIENTED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # in Image.info


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
    """Decodes an encoded image; of several frames the first.

    Raises: ValueError that says why, for another format than FORMATS, for more than MAX_PIXELS,
      and for damaged contents. The caller names the file.
    """
    image = _open(io.BytesIO(contents))
    if image.format == "PNG":
        png.check(contents)
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise whatever they meet in a damaged file
        raise UserError(_reason(error)) from error
    return image


def _open(file: BinaryIO) -> Image.Image:
    """The image with its header read."""
    beginning = file.read(64)
    if not beginning:
        raise UserError("it is empty, 0 bytes")
    _silence_pillow()
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"it is {_kind(beginning)}; {READ} are read") from error
    except Image.DecompressionBombError as error:  # beyond twice MAX_PIXELS
        raise UserError(_too_large()) from error
    except Exception as error:
        raise UserError(_reason(error)) from error
    if math.prod(image.size) > MAX_PIXELS:
        raise UserError(_too_large())
    return image


def _silence_pillow():
    """Keeps Pillow's warnings from the terminal: what matters of them becomes an error here."""
    # For good, and of Pillow alone: warnings.catch_warnings is not safe where threads decode.
    ours = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if ours not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _reason(error):
    return re.sub(r" ?<_io\.[^>]*>", "", str(error)) or type(error).__name__


def _too_large():
    return f"it has more than {MAX_PIXELS:,} pixels, the most that are decoded; make it smaller"


def _kind(beginning):
    """What a file is that Pillow does not open as one of FORMATS, by its first bytes."""
    if beginning[4:8] == b"ftyp":
        return "an AVIF image" if beginning[8:11] == b"avi" else "a HEIC image or a video"
    text = "HTML, SVG or XML" if beginning.lstrip().startswith(b"<") else "no image"
    return next((kind for first, kind in _OTHERS if beginning.startswith(first)), text)


def orientation(image: Image.Image) -> int:
    """Returns a decoded image's EXIF orientation, 1 to 8; 1, upright, where none is given."""
    if not _ORIENTED.intersection(image.info):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1
    return found if found in range(2, 9) else 1


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image of any mode to 8 bits of grey (1 channel) or RGB (3).

    Raises: ValueError for 32 bits, integers or floats.
    """
    return to_8_bits(image).convert({1: "L", 3: "RGB"}[channels])


def to_8_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey to 8 bits: Pillow's own conversion makes all but the darkest white.

    Raises: ValueError for 32 bits, integers or floats.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"its mode {image.mode!r} has no range of values; save it with 8 bits")
    return image


def adm_crop(image: Image.Image, size: sizes.Size) -> Image.Image:
    """Crops the centre as published: halve with BOX, resize with BICUBIC, cut.

    The published size is one number, of a square's side. An image is resized so that it just
    covers the size.

    An image whose enlargement would have more than MAX_ENLARGED pixels is cut before it is
    enlarged. This has the same result, up to rounding, in bounded memory.
    Source: Dhariwal & Nichol 2021 (ADM); every published DiT number was made with it.
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
    # First the width: Pillow 13 begins with the height of tall images, and so rounds otherwise
    # than all versions before it, with which the published numbers were made.
    return image.resize((size[0], image.height), resample).resize(size, resample)


def _cut_and_resize(image, scaled, sides):
    """The centre of the image resized to `scaled`, without making the rest of it.

    Args: sides, (width, height) of the centre.
    """
    cut, boxes = [], []
    for side, resized, size in zip(image.size, scaled, sides, strict=True):
        start = (resized - size) // 2 * (side / resized)  # in pixels of the image
        stop = start + size * (side / resized)
        # BICUBIC reads two pixels to either side, four where it makes an image up to half as large.
        first, last = max(0, math.floor(start) - 6), min(side, math.ceil(stop) + 6)
        cut.append((first, last))
        # Relative to the cut: Pillow keeps a box in float32, which has no room for large numbers.
        boxes.append((start - first, min(stop - first, last - first)))
    (left, right), (top, bottom) = cut
    (x_0, x_1), (y_0, y_1) = boxes
    image = image.crop((left, top, right, bottom))
    # First the width, as in `_resize`.
    box = (x_0, 0, x_1, image.height)
    image = image.resize((sides[0], image.height), Image.Resampling.BICUBIC, box=box)
    return image.resize(sides, Image.Resampling.BICUBIC, box=(0, y_0, sides[0], y_1))
