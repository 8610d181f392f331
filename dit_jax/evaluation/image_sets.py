"""Sets of existing images, read in order from an .npz, a folder or a TFDS split."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from dit_jax.config import sizes
from dit_jax.data import folders, formats, loader, pixels, sources
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, npz_files
from dit_jax.workdirs import identity

FORMS = "an .npz, a folder of images, or NAME:SPLIT of a TFDS dataset, as imagenet2012:train"
# The names of labels in an .npz: of samples, of references, and of the ADM evaluator's files.
LABELS = ("label", "labels", "arr_1")
MAX_LABEL = 2**31 - 1
NUM_THREADS = 4  # that decode images
IMAGES_AT_ONCE = 256  # that the threads read together


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images in a fixed order."""

    name: str
    num: int
    shape: tuple[int, ...]  # of an image: height, width, channels
    digest: str  # of the images in an .npz, else of the images' files
    # read(start) yields the examples from index start on: 'image' [H, W, C] uint8, perhaps 'label'.
    read: Callable[[int], Iterator[loader.Batch]]
    class_names: tuple[str, ...] | None = None  # of the labels, in order; None without names

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[loader.Batch]:
        """Yields the images from start to stop, by default all, in blocks.

        A block has 'image' [size, H, W, C] uint8, and 'label' [size] if there are labels. The last
        block may be shorter.
        """
        examples = itertools.islice(self.read(start), (stop or self.num) - start)
        while block := list(itertools.islice(examples, size)):
            yield {name: np.stack([example[name] for example in block]) for name in block[0]}


def open_images(
    spec: str, image_size: sizes.Size | None = None, channels: int = 3, data_dir: str = ""
) -> ImageSet:
    """Opens the images that `spec` names in one of the FORMS.

    Args:
      image_size: of the ADM crop, for a folder or split. With None, the images of a folder are not
        cropped, and must have the same size.
      channels: 1 (grey) or 3 (RGB), for a folder or split.
      data_dir: of TFDS; '' is TFDS's default.
    Raises: FileNotFoundError; ValueError for files that hold no images, images of several sizes, a
      split without image_size, or other channels.
    """
    if channels not in (1, 3):
        raise UserError(f"{channels=} must be 1 (grey) or 3 (RGB).")
    path = files.to_path(spec, "images")
    if path.suffix == ".npz":
        return open_npz(path)
    if path.is_dir():
        return _open_folder(path, image_size, channels)
    name, _, split = spec.partition(":")
    if not split:
        raise MissingFileError(f"no images at {files.printable(spec)!r}: it must be {FORMS}.")
    if image_size is None:
        raise UserError(f"{spec!r} needs --image_size, the size to which its images are cropped.")
    settings = dict(source="tfds", name=name, data_dir=data_dir)
    settings |= dict(image_size=image_size, image_channels=channels, caption_feature="")
    return from_source(formats.open_images(ConfigDict(dict(data=settings, model={})), split), spec)


def from_source(source: sources.Source, name: str) -> ImageSet:
    """Returns the image set of a dataset's split."""
    shape, digest = source.image_shape, _digest_source(source)
    read = functools.partial(_read_in_threads, source.__getitem__, len(source))
    return ImageSet(name, len(source), shape, digest, read, source.class_names)


def open_npz(path: pathlib.Path) -> ImageSet:
    """Opens the images 'arr_0' [N, H, W, C] uint8 in an .npz, which may be larger than memory.

    An array with one of the names LABELS has the labels [N].
    Raises: FileNotFoundError; ValueError for a file with other contents.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {files.printable(path)}.")
    name, members = files.printable(path), npz_files.describe_npz(path)
    if "arr_0" not in members:
        raise UserError(
            f"{name} is no .npz of images, arr_0 [N, H, W, C] uint8: it holds "
            f"{files.list_some(members)}, and no arr_0."
        )
    # The header is checked now, because the images are read much later.
    header, shape = members["arr_0"], members["arr_0"].shape
    if header.dtype != np.uint8:
        raise UserError(
            f"arr_0 in {name} is {header.dtype}, but images must be uint8, 0 to 255. Convert x in "
            "[-1, 1] like published samples: (127.5 * x + 128).clip(0, 255).astype('uint8')."
        )
    if len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise UserError(f"arr_0 in {name} is {list(shape)}; expected [N, H, W, 1 or 3].")
    if header.fortran_order:
        raise UserError(f"arr_0 in {name} is in Fortran order. Save np.ascontiguousarray(arr_0).")
    num, *image_shape = shape
    image_bytes = math.prod(image_shape)
    if image_bytes > 3 * pixels.MAX_PIXELS:
        raise UserError(
            f"arr_0 in {name} is {list(shape)}: images of {image_bytes:,} bytes are too large."
        )
    labels = _read_labels(path, members, num)

    def read(start):
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as array:
            to_skip = header.offset + start * image_bytes
            for i in range(start, num):
                try:
                    while to_skip:  # not `seek`, after which Python 3.12 does not check the CRC
                        to_skip -= len(array.read(min(to_skip, 2**20))) or to_skip
                    image = np.frombuffer(array.read(image_bytes), np.uint8).reshape(image_shape)
                except Exception as error:  # zipfile and zlib raise many kinds for a damaged file
                    raise UserError(f"{name} is damaged at image {i} or before: {error}") from error
                yield {"image": image} if labels is None else {"image": image, "label": labels[i]}

    # The CRCs of all members identify the contents, which need not be read.
    digest = _digest(*shape, *(members[key].crc for key in sorted(members)))
    return ImageSet(str(path), num, tuple(image_shape), digest, read)


def _read_labels(path, members, num):
    """Reads labels [num] of an .npz, or returns None.   Raises: ValueError, also if two differ."""
    arrays = npz_files.read_npz(path, [name for name in LABELS if name in members])
    first_name = next(iter(arrays), None)
    for name, labels in arrays.items():
        check_labels(labels, num, f"{name} in {files.printable(path)}")
        if not np.array_equal(labels, arrays[first_name]):
            raise UserError(
                f"{files.printable(path)} holds labels twice, {first_name} and {name}, which "
                "differ. Remove the array that is wrong."
            )
    return arrays.get(first_name)


def check_labels(labels: np.ndarray, num: int, name: str) -> None:
    """Raises ValueError unless labels are `num` class numbers in 0..MAX_LABEL."""
    if labels.shape != (num,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name} is {labels.dtype} {list(labels.shape)}, but labels of {num} images must be "
            "whole numbers, one for each."
        )
    outside = (labels < 0) | (labels > MAX_LABEL)
    if outside.any():
        i = int(outside.argmax())
        raise UserError(
            f"{name} has {outside.sum():,} labels outside 0..{MAX_LABEL}, the first {labels[i]} of "
            f"image {i}. If the images have no labels, save them without {name.partition(' ')[0]}."
        )


def _open_folder(path, image_size, channels):
    """Opens the images of a folder; with image_size they are cropped."""
    folder = folders.open_single_folder(path)
    size = sizes.sides(image_size) if image_size else _read_size(folder, 0)
    shape = (*size, channels)
    source = sources.Source(folder, "image", shape, origin=str(path), files=folder)

    def load(i):
        # Without image_size the images are not cropped, and several sizes cannot be stacked.
        if not image_size and (other_size := _read_size(folder, i)) != size:
            raise UserError(
                f"{source.describe(i)} has {sizes.show(other_size)} pixels, but "
                f"{source.describe(0)} has {sizes.show(size)}. Set --image_size to crop them."
            )
        example = source[i]
        return example if folder.class_names else {"image": example["image"]}

    read, digest = functools.partial(_read_in_threads, load, len(folder)), _digest_source(source)
    return ImageSet(str(path), len(folder), shape, digest, read, folder.class_names)


def _read_size(folder, i):
    """Reads (height, width) of an image of a folder.   Raises: ValueError with the file's name."""
    try:
        return pixels.read_size(folder.path(i))[::-1]
    except (ValueError, OSError) as error:
        raise UserError(
            f"cannot read the image {files.printable(folder.path(i))}: {error}. Remove or repair "
            "it."
        ) from error


def _read_in_threads(load, num, start):
    """Yields load(i) for i from start to num."""
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as threads:
        for first in range(start, num, IMAGES_AT_ONCE):
            yield from threads.map(load, range(first, min(first + IMAGES_AT_ONCE, num)))


def _digest_source(source):
    """Digests the contents of a split's files, and the shape of the images.

    A large dataset is not read whole: the digest is of a sample, and of the files' times.
    """
    *size, channels = source.image_shape
    return _digest(identity.identify_contents(source), sizes.simplify(size), channels)


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
