"""Sets of images that exist, read in order: the samples in an .npz, a folder, or a TFDS split."""

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
LABELS = ("label", "labels", "arr_1")  # in an .npz: of samples, of references, and in ADM's files
MAX_LABEL = 2**31 - 1
THREADS = 4
AHEAD = 256  # images that are read together


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images in a fixed order."""

    name: str
    num: int
    shape: tuple[int, ...]  # of an image: height, width, channels
    digest: str  # of the images in an .npz, or of the files that hold them
    read: Callable[[int], Iterator[loader.Batch]]  # from image i on: 'image', perhaps 'label'
    class_names: tuple[str, ...] | None = None  # of the labels, in order; None without names

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[loader.Batch]:
        """Yields 'image' [size, H, W, C] uint8, and 'label' [size] if there are labels.

        The images are those from start to stop, by default all. The last block may be shorter.
        """
        examples = itertools.islice(self.read(start), (stop or self.num) - start)
        while block := list(itertools.islice(examples, size)):
            yield {name: np.stack([e[name] for e in block]) for name in block[0]}


def open_images(
    spec: str, image_size: sizes.Size | None = None, channels: int = 3, data_dir: str = ""
) -> ImageSet:
    """Returns the images that `spec` names in one of the FORMS.

    Args:
      image_size: of the ADM crop, for a folder or split. None takes a folder's images as they are;
        they must then be of one size.
      channels: 1 (grey) or 3 (RGB), for a folder or split.
      data_dir: of TFDS; '' is TFDS's default.
    Raises: FileNotFoundError; ValueError for files of other contents, images of several sizes, a
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
        raise UserError(f"{spec!r} needs --image_size, the pixels that its images are cropped to.")
    settings = dict(source="tfds", name=name, data_dir=data_dir)
    settings |= dict(image_size=image_size, image_channels=channels, caption_feature="")
    return from_source(formats.open_images(ConfigDict(dict(data=settings, model={})), split), spec)


def from_source(source: sources.Source, name: str) -> ImageSet:
    """Returns the images of a dataset's split, cropped as the source crops them."""
    shape = source.image_shape
    read = functools.partial(_read_in_threads, source.__getitem__, len(source))
    return ImageSet(name, len(source), shape, _digest_files(source), read, source.class_names)


def open_npz(path: pathlib.Path) -> ImageSet:
    """Returns the images 'arr_0' [N, H, W, C] uint8 of an .npz, which may be larger than memory.

    Labels [N] are read if the file has an array with one of the names LABELS.
    Raises: FileNotFoundError; ValueError for other contents.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {files.printable(path)}.")
    name, members = files.printable(path), npz_files.describe_npz(path)
    if "arr_0" not in members:
        raise UserError(
            f"{name} is no .npz of images, arr_0 [N, H, W, C] uint8: it holds "
            f"{files.list_some(members)}, and no arr_0."
        )
    # All is checked now, from the header alone: the images are read much later.
    header, shape = members["arr_0"], members["arr_0"].shape
    if header.dtype != np.uint8:
        raise UserError(
            f"arr_0 in {name} is {header.dtype}, but images must be uint8, 0 to 255. Of pixels in "
            "[-1, 1] the published samples are (127.5 * x + 128).clip(0, 255).astype('uint8')."
        )
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise UserError(f"arr_0 in {name} is {list(shape)}; expected [N, H, W, 1 or 3].")
    if header.fortran_order:
        raise UserError(f"arr_0 in {name} is in Fortran's order; save np.ascontiguousarray of it.")
    size = math.prod(shape[1:])
    if size > 3 * pixels.MAX_PIXELS:
        raise UserError(
            f"arr_0 in {name} is {list(shape)}: images of {size:,} bytes are too large."
        )
    labels = _read_labels(path, members, shape[0])

    def read(start):
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as array:
            to_skip = header.offset + start * size
            for i in range(start, shape[0]):
                try:
                    while to_skip:  # not `seek`: after it Python 3.12 checks no checksum
                        to_skip -= len(array.read(min(to_skip, 2**20))) or to_skip
                    image = np.frombuffer(array.read(size), np.uint8).reshape(shape[1:])
                except Exception as error:  # zipfile and zlib raise many kinds for a damaged file
                    raise UserError(f"{name} is damaged at image {i} or before: {error}") from error
                yield {"image": image} | ({} if labels is None else {"label": labels[i]})

    # The CRCs of all members identify the contents without reading them.
    digest = _digest(*shape, *(members[name].crc for name in sorted(members)))
    return ImageSet(str(path), shape[0], shape[1:], digest, read)


def _read_labels(path, members, num):
    """Returns labels [num] of an .npz, or None.   Raises: ValueError for wrong or unequal ones."""
    arrays = npz_files.read_npz(path, [name for name in LABELS if name in members])
    for name, labels in arrays.items():
        check_labels(labels, num, f"{name} in {files.printable(path)}")
    first = next(iter(arrays), None)
    for name, labels in arrays.items():
        if not np.array_equal(labels, arrays[first]):
            raise UserError(
                f"{files.printable(path)} holds labels twice, {first} and {name}, which differ: "
                "remove the wrong ones."
            )
    return arrays.get(first)


def check_labels(labels: np.ndarray, num: int, name: str) -> None:
    """Raises ValueError unless labels are `num` class numbers in 0..MAX_LABEL."""
    if labels.shape != (num,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name} is {labels.dtype} {list(labels.shape)}, but labels of {num} images must be "
            "whole numbers, one for each."
        )
    wrong = (labels < 0) | (labels > MAX_LABEL)
    if wrong.any():
        i = int(wrong.argmax())
        raise UserError(
            f"{name} has {np.sum(wrong):,} labels outside 0..{MAX_LABEL}, the first {labels[i]} of "
            f"image {i}. Images without labels are saved without {name.partition(' ')[0]}."
        )


def _open_folder(path, image_size, channels):
    """Returns the images of a folder, cropped to image_size unless that is None."""
    folder = folders.open_single_folder(path)
    size = sizes.sides(image_size) if image_size else _read_size(folder, 0)
    shape = (*size, channels)
    source = sources.Source(folder, "image", shape, origin=str(path), files=folder)

    def load(i):
        # Images of several sizes cannot be stacked, and cropping them was not requested.
        if not image_size and (other := _read_size(folder, i)) != size:
            raise UserError(
                f"{source.describe(i)} has {sizes.show(other)} pixels, but {source.describe(0)} "
                f"has {sizes.show(size)}: samples are measured at one size, as they are."
            )
        example = source[i]
        return example if folder.class_names else {"image": example["image"]}

    read = functools.partial(_read_in_threads, load, len(folder))
    return ImageSet(str(path), len(folder), shape, _digest_files(source), read, folder.class_names)


def _read_size(folder, i):
    """Returns (height, width) of an image of a folder.   Raises: ValueError with its name."""
    try:
        return pixels.read_size(folder.path(i))[::-1]
    except (ValueError, OSError) as error:
        raise UserError(
            f"cannot read the image {files.printable(folder.path(i))}: {error}. Remove or repair "
            "it."
        ) from error


def _read_in_threads(load, num, start):
    """Yields load(i) for i from start to num."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        for first in range(start, num, AHEAD):
            yield from threads.map(load, range(first, min(first + AHEAD, num)))


def _digest_files(source):
    """Returns a digest of a split's files, of their contents, and of the shape of its images.

    Of large datasets only a sample of the contents is read. The digest then includes the files'
    times.
    """
    *size, channels = source.image_shape
    return _digest(identity.identify_contents(source), sizes.simplify(size), channels)


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
