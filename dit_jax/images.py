"""Images that exist, read in order: the samples in an .npz, a folder, a TFDS split."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import data, files, folders, sources

logger = logging.getLogger("dit_jax")

FORMS = "an .npz, a folder of images, or NAME:SPLIT of a TFDS dataset, as imagenet2012:train"
LABELS = ("label", "arr_1")  # in an .npz: ours, ADM's
THREADS = 4
AHEAD = 256  # images that are being read before they are asked for


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images in an order."""

    name: str
    num: int
    shape: tuple[int, int, int]  # height, width, channels
    digest: str  # of the images in an .npz; else of what names them
    read: Callable[[int], Iterator[data.Batch]]  # from image i on: 'image', perhaps 'label'

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[data.Batch]:
        """'image' [size, H, W, C] uint8, and 'label' [size] where there are labels.

        Of the images start to stop, by default all; the last block may be shorter.
        """
        examples = itertools.islice(self.read(start), (stop or self.num) - start)
        while block := list(itertools.islice(examples, size)):
            yield {name: np.stack([e[name] for e in block]) for name in block[0]}


def open_images(
    spec: str, image_size: int | None = None, channels: int = 3, data_dir: str = ""
) -> ImageSet:
    """The images that `spec` names, one of FORMS.

    Args: of a folder or split: image_size, of the ADM crop; None takes a folder's images as they
      are, all of one size.   channels: 1 (grey) or 3 (RGB).   data_dir: of TFDS; '' is its own.
    Raises: FileNotFoundError; ValueError for a file that holds others than uint8 images, for
      images of several sizes, or for a split without image_size.
    """
    path = files.to_path(spec, "images")
    if path.suffix == ".npz":
        return open_npz(path)
    if path.is_dir():
        return _open_folder(path, image_size, channels)
    name, _, split = spec.partition(":")
    if not split:
        raise FileNotFoundError(f"no images at {spec!r}: it must be {FORMS}.")
    if image_size is None:
        raise ValueError(f"{spec!r} needs --image_size, the pixels that its images are cropped to.")
    settings = dict(source="tfds", name=name, data_dir=data_dir)
    settings |= dict(image_size=image_size, image_channels=channels, caption_feature="")
    return of_source(sources.open_images(ConfigDict(dict(data=settings, model={})), split), spec)


def of_source(source: sources.Source, name: str) -> ImageSet:
    """The images of a dataset's split, cropped as it is read."""
    shape = (source.image_size, source.image_size, source.image_channels)
    read = functools.partial(_read_ahead, source.__getitem__, len(source))
    return ImageSet(name, len(source), shape, _digest(source.origin, len(source), *shape), read)


def open_npz(path: pathlib.Path) -> ImageSet:
    """The images 'arr_0' [N, H, W, C] uint8 of an .npz, which may be larger than memory.

    Raises: FileNotFoundError; ValueError for other contents.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            if "arr_0" not in members:
                raise ValueError(f"it holds {', '.join(members)}, and no arr_0")
            with file.open(members["arr_0"]) as array:
                shape, dtype = _read_header(array)
                start_of_data = array.tell()
    except (zipfile.BadZipFile, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} is no .npz of images, arr_0 [N, H, W, C] uint8: {error}."
        ) from error
    if dtype != np.uint8:
        raise ValueError(
            f"arr_0 in {path} is {dtype}, but images must be uint8, 0 to 255. Of pixels in [-1, 1] "
            "the published samples are (127.5 * x + 128).clip(0, 255).astype('uint8')."
        )
    if len(shape) != 4 or shape[3] not in (1, 3) or shape[1] != shape[2] or not shape[0]:
        raise ValueError(f"arr_0 in {path} is {list(shape)}; expected [N, size, size, 1 or 3].")
    labels = _read_labels(path, members)
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path} holds labels {labels.dtype} {list(labels.shape)} of images {list(shape)}: "
            "they must be whole numbers, one for each."
        )

    def read(start):
        size = int(np.prod(shape[1:]))
        with zipfile.ZipFile(path) as file, file.open(members["arr_0"]) as array:
            array.seek(start_of_data + start * size)
            for i in range(start, shape[0]):
                try:
                    image = np.frombuffer(array.read(size), np.uint8).reshape(shape[1:])
                except (zipfile.BadZipFile, zlib.error, ValueError) as error:
                    raise ValueError(
                        f"{path} is damaged at image {i} or before: {error}"
                    ) from error
                yield {"image": image} | ({} if labels is None else {"label": labels[i]})

    digest = _digest(*shape, *(members[name].CRC for name in sorted(members)))
    return ImageSet(str(path), shape[0], shape[1:], digest, read)


def _read_labels(path, members):
    name = next((name for name in LABELS if name in members), None)
    if name is None:
        return None
    try:
        with np.load(path) as file:
            return file[name]
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds {name} that cannot be read: {error}") from error


def _read_header(file):
    """(shape, dtype) of the .npy that begins here, in C order."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"its .npy has version {version}")
    shape, fortran_order, dtype = readers[version](file)
    if fortran_order:
        raise ValueError("its array is in Fortran's order")
    return shape, dtype


def _open_folder(path, image_size, channels):
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in folders.EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no images in {path}: {', '.join(sorted(folders.EXTENSIONS))}.")
    # As in the image folders of training, a sub-folder is a class.
    within = [p.relative_to(path).parts[:-1] for p in files]
    classes = sorted({parts[0] for parts in within if parts})
    labels = [classes.index(parts[0]) if parts else -1 for parts in within]
    sizes = None if image_size else _size(files[0])
    if sizes and sizes[0] != sizes[1]:
        raise ValueError(f"{files[0]} has {sizes[0]}x{sizes[1]} pixels: images must be square.")
    image_size = image_size or sizes[0]
    source = sources.Source(
        folders.Folder(files, labels), "image", image_size, channels, None, str(path)
    )

    def load(i):
        if sizes and _size(files[i]) != sizes:
            raise ValueError(
                f"{files[i]} has {'x'.join(map(str, _size(files[i])))} pixels, but {files[0]} has "
                f"{'x'.join(map(str, sizes))}: samples are measured at one size, as they are."
            )
        example = source[i]
        return example if min(labels) >= 0 else {"image": example["image"]}

    stats = {p.relative_to(path): p.stat() for p in files}
    digest = _digest(*(f"{p} {stat.st_size} {stat.st_mtime_ns}" for p, stat in stats.items()))
    read = functools.partial(_read_ahead, load, len(files))
    return ImageSet(str(path), len(files), (image_size, image_size, channels), digest, read)


def _size(path):
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error}. Remove or repair it.") from error


def _read_ahead(load, num, start):
    """load(i) for i from start to num; threads read AHEAD of what is asked for."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        reading = collections.deque()
        for i in range(start, num + AHEAD):
            if i < num:
                reading.append(threads.submit(load, i))
            if len(reading) > AHEAD or (i >= num and reading):
                yield reading.popleft().result()


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
