"""Sets of images on disk: their order, their labels, and what is refused."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.pixels import adm_crop
from dit_jax.evaluation import image_sets


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (23, 6, 6, 3), np.uint8)


def _all(images, size=5, **options):
    return {
        name: np.concatenate([block[name] for block in images.blocks(size, **options)])
        for name in next(images.blocks(size, **options))
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_order_from_any_image_on(tmp_path, pixels, save):
    save(tmp_path / "samples.npz", arr_0=pixels)
    images = image_sets.open_images(str(tmp_path / "samples.npz"))
    assert (images.num, images.shape) == (23, (6, 6, 3))
    assert [len(block["image"]) for block in images.blocks(10)] == [10, 10, 3]
    np.testing.assert_array_equal(_all(images)["image"], pixels)
    np.testing.assert_array_equal(_all(images, start=7, stop=19)["image"], pixels[7:19])


@pytest.mark.parametrize("key", ["label", "labels", "arr_1"])
def test_npz_with_labels(tmp_path, pixels, key):
    path = tmp_path / "samples.npz"
    np.savez(path, **{"arr_0": pixels, key: np.arange(23) % 4})
    images = _all(image_sets.open_images(str(path)), start=2)
    np.testing.assert_array_equal(images["label"], np.arange(2, 23) % 4)
    np.savez(path, **{"arr_0": pixels, key: np.arange(22)})
    message = rf"{key} in .* is int64 \[22\], but labels of 23 images must be whole numbers"
    with pytest.raises(ValueError, match=message):
        image_sets.open_images(str(path))


def test_digest_is_of_the_images(tmp_path, pixels):
    def digest(**arrays):
        np.savez(tmp_path / "samples.npz", **arrays)
        return image_sets.open_npz(tmp_path / "samples.npz").digest

    first = digest(arr_0=pixels)
    assert digest(arr_0=pixels) == first
    pixels[5, 0, 0, 0] ^= 1
    assert digest(arr_0=pixels) != first


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 6, 6, 3), np.uint8)}, "it holds images, and no arr_0"),
        ({"arr_0": np.zeros((2, 6, 6, 3))}, r"is float64, but images must be uint8.*127\.5 \* x"),
        ({"arr_0": np.zeros((2, 3, 6, 6), np.uint8)}, r"is \[2, 3, 6, 6\]; expected \[N, H, W"),
        ({"arr_0": np.zeros((2, 6, 0, 3), np.uint8)}, r"is \[2, 6, 0, 3\]; expected"),
        ({"arr_0": np.zeros((6, 6, 3), np.uint8)}, r"is \[6, 6, 3\]; expected"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 6, 6, 3), np.uint8))}, "in Fortran order"),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        image_sets.open_images(str(tmp_path / "samples.npz"))


def test_damaged_npz_and_missing_ones(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"cannot read .*s\.npz: BadZipFile: File is not a zip"):
        image_sets.open_images(str(tmp_path / "samples.npz"))
    with pytest.raises(FileNotFoundError, match=r"no file .*other\.npz"):
        image_sets.open_images(str(tmp_path / "other.npz"))
    with pytest.raises(
        FileNotFoundError, match=r"it must be an \.npz, a folder of images, or NAME"
    ):
        image_sets.open_images(str(tmp_path / "nowhere"))


def test_folder_is_read_in_the_order_of_its_names(tmp_path, pixels):
    for i in reversed(range(23)):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i:03d}.png")
    images = image_sets.open_images(str(tmp_path))
    assert (images.num, images.shape) == (23, (6, 6, 3))
    assert _all(images).keys() == {"image"}
    np.testing.assert_array_equal(_all(images, start=3)["image"], pixels[3:])
    Image.fromarray(pixels[0, :5]).save(tmp_path / "023.png")
    with pytest.raises(ValueError, match=r"023\.png has 5 x 6 pixels, but .*000\.png has 6 x 6"):
        _all(image_sets.open_images(str(tmp_path)))


def test_folder_is_cropped_and_has_a_class_for_a_sub_folder(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png")
    images = _all(image_sets.open_images(str(tmp_path), image_size=8))
    assert images["label"].tolist() == [0, 1]
    np.testing.assert_array_equal(images["image"][0], np.asarray(adm_crop(picture, 8)))
    as_they_are = _all(image_sets.open_images(str(tmp_path)))
    np.testing.assert_array_equal(as_they_are["image"][1], np.asarray(picture))


def _replace(path, contents):
    """Other contents of the same size, at the same time."""
    before = path.stat()
    assert len(contents) == before.st_size
    path.write_bytes(contents)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_digest_of_a_folder_is_of_its_contents(tmp_path, pixels):
    def digest():
        return image_sets.open_images(str(tmp_path)).digest

    path = tmp_path / "0.bmp"
    Image.fromarray(pixels[1]).save(path)
    other = path.read_bytes()
    Image.fromarray(pixels[0]).save(path)
    first = digest()
    assert digest() == first
    _replace(path, other)
    second = digest()
    assert second != first
    os.utime(path, ns=(1, 1))
    assert digest() == second


def test_digest_of_a_split_is_of_its_contents(tmp_path, digits_dir):
    def digest(data_dir, split="test"):
        return image_sets.open_images(f"digits:{split}", 8, 1, str(data_dir)).digest

    first = digest(digits_dir)
    assert digest(digits_dir, "test[:30]") != first
    shutil.copytree(digits_dir, tmp_path / "copy")
    assert digest(tmp_path / "copy") == first
    (shard,) = (tmp_path / "copy").glob("**/digits-test.array_record*")
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 8] ^= 1  # of a record
    _replace(shard, contents)
    assert digest(tmp_path / "copy") != first


def test_npz_that_is_damaged_further_on(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=np.zeros((23, 64, 64, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"samples\.npz is damaged at image 22 or before: Bad CRC"):
        _all(image_sets.open_npz(path))


def test_labels_that_are_no_numbers(tmp_path, pixels):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=pixels, label=np.array(["cat"] * 23))
    with pytest.raises(ValueError, match="must be whole numbers, one for each"):
        image_sets.open_npz(path)
    np.savez(path, arr_0=pixels, label=np.array(["cat"] * 23, object))
    with pytest.raises(ValueError, match=r"'label\.npy' in it holds Python objects"):
        image_sets.open_npz(path)


def test_empty_folder_and_damaged_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images in"):
        image_sets.open_images(str(tmp_path))
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.png.*Remove or repair it"):
        image_sets.open_images(str(tmp_path))


def test_tfds_split(digits_dir):
    spec, where = "digits:test[:30]", dict(channels=1, data_dir=str(digits_dir))
    images = image_sets.open_images(spec, 8, **where)
    assert (images.name, images.num, images.shape) == (spec, 30, (8, 8, 1))
    blocks = _all(images)
    assert blocks["image"].std() > 10
    assert len(set(blocks["label"].tolist())) > 5
    with pytest.raises(ValueError, match="needs --image_size"):
        image_sets.open_images(spec, **where)


def test_threads_read_no_further_ahead_than_allowed(monkeypatch):
    monkeypatch.setattr(image_sets, "IMAGES_AT_ONCE", 3)
    loaded = []
    reading = image_sets._read_in_threads(lambda i: loaded.append(i) or i, 50, 10)
    assert [next(reading) for _ in range(5)] == [10, 11, 12, 13, 14]
    assert max(loaded) <= 14 + 3
    assert list(reading) == list(range(15, 50))


@pytest.mark.parametrize("key", ["label", "labels", "arr_1"])
@pytest.mark.parametrize(
    ("value", "dtype"), [(-1, np.int64), (2**63, np.uint64), (2**31, np.int64)], ids=str
)
def test_labels_that_are_no_classes_are_refused_with_their_value(
    tmp_path, pixels, key, value, dtype
):
    labels = np.zeros(23, dtype)
    labels[5:7] = value
    np.savez(tmp_path / "samples.npz", **{"arr_0": pixels, key: labels})
    message = rf"{key} in .* has 2 labels outside 0\.\.2147483647, the first {value} of image 5\."
    with pytest.raises(ValueError, match=message):
        image_sets.open_npz(tmp_path / "samples.npz")


def test_labels_under_two_names_must_be_the_same(tmp_path, pixels):
    path, labels = tmp_path / "samples.npz", np.arange(23)
    np.savez(path, arr_0=pixels, label=labels, labels=labels)
    assert _all(image_sets.open_npz(path))["label"].tolist() == labels.tolist()
    np.savez(path, arr_0=pixels, label=labels, labels=labels[::-1])
    with pytest.raises(ValueError, match="holds labels twice, label and labels, which differ"):
        image_sets.open_npz(path)


def test_images_of_absurd_sizes_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_jax.data.pixels.MAX_PIXELS", 35)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 6, 6, 3), np.uint8))
    with pytest.raises(ValueError, match=r"is \[2, 6, 6, 3\]: images of 108 bytes are too large"):
        image_sets.open_npz(tmp_path / "samples.npz")


def test_names_of_arrays_are_escaped(tmp_path):
    np.savez(tmp_path / "samples.npz", **{"a\x1b[31m": np.zeros(1)})
    with pytest.raises(ValueError, match=r"it holds a\\x1b\[31m, and no arr_0"):
        image_sets.open_npz(tmp_path / "samples.npz")


def test_images_are_of_the_formats_of_training(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png", "TIFF")
    with pytest.raises(
        ValueError, match=r"0\.png: it is a TIFF image; PNG, JPEG, WEBP and BMP are"
    ):
        image_sets.open_images(str(tmp_path))


def test_digest_of_a_large_split_is_of_its_times_too(tmp_path, digits_dir, monkeypatch):
    """Of it no more than a sample is read."""

    def digest(data_dir):
        return image_sets.open_images("digits:test", 8, 1, str(data_dir)).digest

    shutil.copytree(digits_dir, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(digits_dir)
    monkeypatch.setattr(image_sets.identity, "READ_WHOLE_BYTES", 1000)
    assert digest(tmp_path / "copy") != digest(digits_dir)
