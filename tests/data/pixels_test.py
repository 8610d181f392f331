"""What is decoded and what is refused; the published crop, bit for bit, in bounded memory."""

import contextlib
import hashlib
import io
import pathlib
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dit_jax.data import pixels

ROOT = pathlib.Path(__file__).parents[2]


def _noise_image(width, height, mode="RGB"):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(pixels, mode)


def _encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _resize(image, size, resample):
    """The width, then the height, each rounded to 8 bits, as Pillow before version 13."""
    return image.resize((size[0], image.height), resample).resize(size, resample)


def _published_crop(image, size):
    """The crop as its authors wrote it down, in any memory."""
    while min(image.size) >= 2 * size:
        half = tuple(side // 2 for side in image.size)
        image = _resize(image, half, Image.Resampling.BOX)
    factor = size / min(image.size)
    sides = tuple(round(side * factor) for side in image.size)
    actual = np.asarray(_resize(image, sides, Image.Resampling.BICUBIC))
    y, x = (actual.shape[0] - size) // 2, (actual.shape[1] - size) // 2
    return actual[y : y + size, x : x + size]


SIZES = [(8, 8), (33, 17), (16, 40), (100, 61), (5, 7), (63, 257), (1, 1), (1, 900), (700, 2)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_follows_the_published_steps(size, mode):
    image = _noise_image(*size, mode)
    cropped = np.asarray(pixels.adm_crop(image, 8))
    assert cropped.shape == (8, 8, 3)[: cropped.ndim]
    np.testing.assert_array_equal(cropped, _published_crop(image, 8))


# ImageNet's usual size, its smallest, largest, widest and narrowest images.
@pytest.mark.parametrize(
    "size", [(500, 375), (60, 20), (4288, 2848), (4992, 200), (81, 2048)], ids=str
)
def test_crop_of_imagenet_s_sizes_is_the_published_one(size):
    image = _noise_image(*size)
    np.testing.assert_array_equal(
        np.asarray(pixels.adm_crop(image, 256)), _published_crop(image, 256)
    )


def test_crop_is_the_one_of_pillow_12_to_the_bit():
    """Digests by Pillow 9.5 and 12.3; version 13's resize rounds tall images otherwise."""
    expected = {
        (300, 1000): "bc3562b1ae47cba8",
        (700, 2300): "1e01003912da4ea9",
        (1000, 300): "591aedc765715285",
    }
    for (width, height), digest in expected.items():
        noise = np.random.default_rng(5).integers(0, 256, (height, width, 3)).astype(np.uint8)
        cropped = np.asarray(pixels.adm_crop(Image.fromarray(noise), 256))
        assert hashlib.sha256(cropped.tobytes()).hexdigest()[:16] == digest


def test_an_image_of_the_right_size_is_not_touched():
    image = _noise_image(8, 8)
    np.testing.assert_array_equal(np.asarray(pixels.adm_crop(image, 8)), np.asarray(image))


@pytest.mark.parametrize("size", [*SIZES, (3, 1201), (1501, 9), (15, 16), (400, 15)], ids=str)
def test_crop_that_cuts_first_is_the_published_one_up_to_rounding(size, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_ENLARGED", 0)
    image = _noise_image(*size)
    cropped = np.asarray(pixels.adm_crop(image, 8)).astype(int)
    assert np.abs(cropped - _published_crop(image, 8)).max() <= 1


@pytest.mark.parametrize("size", [(1, 20_000), (30_000, 2), (1, 30_000_000)], ids=str)
def test_crop_of_any_image_is_made_in_bounded_memory(size):
    """At 256 pixels the first one was 5 million columns, of 5 GB."""
    code = (
        "import resource, sys\n"
        "from PIL import Image\n"
        "from dit_jax.data import pixels\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        f"image = Image.new('RGB', {size}, (10, 20, 30))\n"
        "before = peak()\n"
        "cropped = pixels.adm_crop(image, 256)\n"
        "assert cropped.size == (256, 256) and cropped.getpixel((128, 128)) == (10, 20, 30)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # MiB


def _eps():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (_eps(), "it is an EPS image; PNG, JPEG, WEBP and BMP are read"),
        (_encode(_noise_image(16, 16, "RGBA"), "ICNS"), "it is an ICNS image"),
        (_encode(_noise_image(8, 8), "TIFF"), "it is a TIFF image"),
        (_encode(_noise_image(8, 8, "L"), "GIF"), "it is a GIF image"),
        (_encode(_noise_image(8, 8), "ICO"), "it is an ICO image"),
        (_encode(_noise_image(8, 8), "PPM"), "it is no image"),
        (_encode(_noise_image(8, 8), "TGA"), "it is no image"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "it is a HEIC image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "it is an AVIF image"),
        (b"\0\5\x16\7" + b"\0" * 78, "it is an AppleDouble file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\n<html>not found</html>", "it is HTML, SVG or XML"),
        (b"", "it is empty, 0 bytes"),
        (b"\xff\xd8\xff\xe0\0\x02nonsense" * 9, "it is a damaged JPEG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused_by_what_they_are(contents, message):
    with pytest.raises(ValueError, match=message):
        pixels.decode(contents)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_images_are_errors_and_nothing_else(kind, tmp_path):
    """Cut anywhere, or with bytes changed: pixels, or a ValueError that does not name objects."""
    whole = _encode(_noise_image(64, 48), kind)
    assert pixels.decode(whole).size == (64, 48)
    with pytest.raises(ValueError, match=r"\w") as error:
        pixels.decode(whole[: len(whole) * 3 // 5])
    assert "BytesIO" not in str(error.value)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        damaged[rng.integers(min(64, len(damaged)))] = rng.integers(256)
        with contextlib.suppress(ValueError):
            assert pixels.decode(bytes(damaged)).size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_images_cut_anywhere_are_errors(kind):
    whole = _encode(_noise_image(16, 12), kind)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"\w"):
            pixels.decode(whole[:length])


def test_png_of_which_any_bit_is_flipped_is_an_error():
    """Pillow decodes it to other pixels."""
    whole = _encode(_noise_image(8, 8), "PNG")
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"\w"):
            pixels.decode(bytes(damaged))


def _png(width, height, chunks=(), data=b"", depth=1, colour=0, interlaced=0):
    """A PNG, by default of 1 bit, with a size that its data need not have."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return _join((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b""))


def _join(*chunks):
    actual = b"\x89PNG\r\n\x1a\n"
    for name, value in chunks:
        actual += struct.pack(">I", len(value)) + name + value
        actual += struct.pack(">I", zlib.crc32(name + value))
    return actual


def _rows(values, depth):
    """The bytes of a PNG's rows [h, w, channels], unfiltered."""
    packed = {1: np.packbits, 8: lambda row: row, 16: lambda row: row.astype(">u2")}[depth]
    return b"".join(b"\0" + packed(row.reshape(-1)).tobytes() for row in values)


# The passes of PNG's specification: the first column and row, and the steps to the next.
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
PASSES += [(0, 1, 1, 2)]


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(
    ("depth", "colour", "channels"),
    [(1, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (16, 2, 3), (8, 3, 1), (8, 4, 2), (8, 6, 4)],
)
def test_png_has_the_pixels_of_its_size_and_no_others(depth, colour, channels, interlaced):
    rng, chunks = np.random.default_rng(0), ()
    if colour == 3:
        chunks = [(b"PLTE", rng.bytes(3 * 256))]
    for width, height in ((1, 1), (5, 3), (3, 5), (9, 17)):
        values = rng.integers(0, 2**depth, (height, width, channels))
        values = values.astype(np.uint16 if depth == 16 else np.uint8)
        parts = [values]
        if interlaced:
            parts = [values[y::dy, x::dx] for x, y, dx, dy in PASSES]
        data = b"".join(_rows(part, depth) for part in parts if part.size)
        options = dict(chunks=chunks, depth=depth, colour=colour, interlaced=interlaced)
        whole = pixels.decode(_png(width, height, data=data, **options))
        plain = _png(width, height, data=_rows(values, depth), **{**options, "interlaced": 0})
        np.testing.assert_array_equal(np.asarray(whole), np.asarray(pixels.decode(plain)))
        for wrong, number in ((data[:-1], f"{len(data) - 1:,}"), (data + b"\0", "more than")):
            with pytest.raises(ValueError, match=f"a damaged PNG: its pixels are {number}"):
                pixels.decode(_png(width, height, data=wrong, **options))


def test_png_without_a_part_is_an_error():
    image, header = _noise_image(8, 8).quantize(4), struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", bytes(range(12)))]
    data, end = zlib.compress(_rows(np.asarray(image), 8)), (b"IEND", b"")
    whole = [*parts, (b"IDAT", data[:9]), (b"IDAT", data[9:]), end]
    assert pixels.decode(_join(*whole)).size == (8, 8)
    assert pixels.decode(_join(*whole) + b"after the end").size == (8, 8)
    for chunks, message in (
        ([*parts, end], "without pixels"),
        ([*parts, (b"IDAT", data[:-1]), end], "pixels are"),
        ([*parts, (b"IDAT", data[:9]), (b"tEXt", b"a\0b"), (b"IDAT", data[9:]), end], "pixels are"),
        ([*parts, (b"IDAT", b"\0" + data), end], "cannot be unpacked"),
        ([parts[0], (b"IDAT", data), end], "without the palette of its colours"),
        ([parts[0], (b"IDAT", data), parts[1], end], "without the palette of its colours"),
        ([parts[0], *whole], "with two headers"),
        ([(b"IHDR", header + b"\0"), *whole[1:]], "without its header"),
        (whole[:-1], "a truncated PNG"),
    ):
        with pytest.raises(ValueError, match=message):
            pixels.decode(_join(*chunks))


def test_pixels_of_a_png_are_counted_in_bounded_memory():
    """Pixels that unpack to 1,000 times what the size needs, in one chunk or in many."""
    much = zlib.compress(bytes(500_000_000), 1)
    header = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    for step in (len(much), 1000):
        parts = [(b"IDAT", much[i : i + step]) for i in range(0, len(much), step)]
        contents = _join(header, *parts, (b"IEND", b""))
        tracemalloc.start()
        with pytest.raises(ValueError, match="its pixels are more than 72 bytes"):
            pixels.decode(contents)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8e6


@pytest.mark.parametrize("size", [(8947, 10_001), (15_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(size, tmp_path):
    with pytest.raises(ValueError, match=r"it has more than 89,478,485 pixels, the most that are"):
        pixels.decode(_png(*size))
    (tmp_path / "a.png").write_bytes(_png(*size))
    with pytest.raises(ValueError, match=r"it has more than 89,478,485 pixels"):
        pixels.read_size(tmp_path / "a.png")
    largest = 8946, 10_002
    assert pixels.decode(_png(*largest, data=b"\0" * 1120 * 10_002)).size == largest


@pytest.mark.parametrize(
    ("name", "beginning"),
    [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"profile\0\0")],
)
def test_what_unpacks_to_much_memory_is_refused_or_left(name, beginning):
    chunk = name, beginning + zlib.compress(bytes(100_000_000), 1)
    with contextlib.suppress(ValueError):
        image = pixels.decode(_png(8, 8, [chunk], b"\0\0" * 8))
        assert all(len(value) < 2e6 for value in image.info.values() if isinstance(value, bytes))


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(b"\0" * 1001)
    with pytest.raises(ValueError, match="it has more than 1,000 bytes"):
        pixels.read_file(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"\0" * 1000)
    assert len(pixels.read_file(tmp_path / "a.png")) == 1000


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(mode, channels):
    image = _noise_image(8, 8, mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    contents = _encode(image, kind)
    expected = Image.open(io.BytesIO(contents)) if mode == "CMYK" else image
    expected = np.asarray(expected.convert("L" if channels == 1 else "RGB"))
    decoded = pixels.to_channels(pixels.decode(contents), channels)
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_palettes_single_bits_and_transparent_colours():
    image = _noise_image(8, 8)
    for other, options in (
        (image.quantize(4), dict(transparency=0)),
        (image.quantize(4), dict(transparency=bytes([0, 9, 255, 255]))),
        (image.convert("1"), {}),
    ):
        decoded = pixels.to_channels(pixels.decode(_encode(other, "PNG", **options)), 3)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(other.convert("RGB")))


def test_16_bits_become_8():
    values = np.array([[0, 257, 32768], [65535, 514, 1000], [7, 7, 7]], np.uint16)
    decoded = pixels.to_channels(pixels.decode(_encode(Image.fromarray(values), "PNG")), 1)
    assert np.asarray(decoded).tolist() == [[0, 1, 127], [255, 2, 3], [0, 0, 0]]
    with pytest.raises(ValueError, match="its mode 'F' has no range of values"):
        pixels.to_channels(Image.fromarray(values.astype(np.float32)), 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first_is_taken(kind):
    """MPO is the pair of JPEGs that phones write."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    options = dict(lossless=True) if kind == "WEBP" else {}
    contents = _encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    decoded = np.asarray(pixels.to_channels(pixels.decode(contents), 3)).astype(int)
    assert np.abs(decoded - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "MPO"])
def test_orientation_is_found_and_not_applied(kind):
    image = Image.new("RGB", (8, 16), "red")
    for value in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = value
        decoded = pixels.decode(_encode(image, kind, exif=exif))
        assert pixels.orientation(decoded) == value
        assert decoded.size == (8, 16)
    assert pixels.orientation(pixels.decode(_encode(image, kind))) == 1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"II*\0\xff\xff\xff\xff", b"nonsense", b"II*\0\x08\0"])
def test_damaged_exif_is_no_orientation(kind, exif):
    decoded = pixels.decode(_encode(_noise_image(8, 8), kind, exif=b"Exif\0\0" + exif))
    assert pixels.orientation(decoded) == 1


def test_orientation_that_is_none():
    exif = Image.Exif()
    exif[0x0112] = 99
    assert pixels.orientation(pixels.decode(_encode(_noise_image(8, 8), "JPEG", exif=exif))) == 1


def test_pillow_s_warnings_do_not_reach_the_terminal(tmp_path):
    """Of many pixels, a palette's transparency, and damaged EXIF."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x1a\x01\x05\0\xff\xff\0\0\x10\0\0\0" * 2
    palette = _noise_image(8, 8).quantize(4)
    (tmp_path / "0").write_bytes(_png(15_000, 10_000))
    (tmp_path / "1").write_bytes(_encode(palette, "PNG", transparency=bytes([0, 9, 255, 255])))
    (tmp_path / "2").write_bytes(_encode(_noise_image(8, 8), "JPEG", exif=exif))
    code = (
        "import pathlib, sys\n"
        "from dit_jax.data import pixels\n"
        "for name in '012':\n"
        "    try:\n"
        "        image = pixels.decode(pathlib.Path(sys.argv[1], name).read_bytes())\n"
        "        pixels.to_channels(image, 3), pixels.orientation(image)\n"
        "    except ValueError:\n"
        "        print('refused', name)\n"
    )
    command = [sys.executable, "-W", "default", "-c", code, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused 0\n", "")
    # Pillow does warn of all three.
    code = (
        "import pathlib, sys\n"
        "from PIL import Image\n"
        "for name in '012':\n"
        "    image = Image.open(pathlib.Path(sys.argv[1], name))\n"
        "    name == '0' or (image.convert('RGB'), image.getexif())\n"
    )
    command[4] = code
    stderr = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    for text in ("DecompressionBombWarning", "Palette images", "EXIF"):
        assert text in stderr


def test_text_in_png_is_read_as_before():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a cat")
    assert pixels.decode(_encode(_noise_image(8, 8), "PNG", pnginfo=info)).size == (8, 8)


@pytest.mark.parametrize("size", [*SIZES, (15, 16), (400, 15)], ids=str)
def test_crop_of_another_shape_covers_it_without_stretching(size):
    """As the published steps, for the side that is relatively shorter."""
    height, width = 8, 12
    image = _noise_image(*size)
    cropped = np.asarray(pixels.adm_crop(image, (height, width)))
    assert cropped.shape == (height, width, 3)
    while image.width >= 2 * width and image.height >= 2 * height:
        half = tuple(side // 2 for side in image.size)
        image = _resize(image, half, Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    sides = tuple(round(side * scale) for side in image.size)
    resized = np.asarray(_resize(image, sides, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    np.testing.assert_array_equal(cropped, resized[top : top + height, left : left + width])


def test_crop_of_a_wide_shape_keeps_circles_round():
    y, x = np.mgrid[:90, :120]
    disc = ((x - 59.5) ** 2 + (y - 44.5) ** 2 < 30**2).astype(np.uint8) * 255
    cropped = np.asarray(pixels.adm_crop(Image.fromarray(disc), (20, 60))) > 127
    assert cropped[10].sum() == pytest.approx(30, abs=1)  # twice as small: 120 to 60 pixels
    assert cropped[:, 30].all()  # 60 pixels are 30, of which 20 are left
