"""Datasets with random access to examples: images or moments, with their annotations.

`formats` opens images. Moments are the VAE outputs that `dit_jax.encode` wrote; `latents` opens
them.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.data import pixels
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """The F files of a split. `workdirs.identity` compares them."""

    root: pathlib.Path
    names: Sequence[str]  # F paths relative to root, with "/" as separator
    sizes: np.ndarray  # [F] int64, in bytes
    times: np.ndarray  # [F] int64, times of the last change (ctime) in ns
    # The first record and the number of records of each file; None if file i is the image of
    # record i.
    ranges: Sequence[tuple[int, int]] | None = None
    # One label or {feature: caption or list of captions} per record; None if the files hold them.
    labels: Sequence[int] | None = None
    captions: Sequence[dict] | None = None

    def path(self, index: int) -> pathlib.Path:
        """Returns the path of a file."""
        return self.root / self.names[index]


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to decoded examples: 'image' [H, W, C] uint8 or 'moments' f16, and annotations.

    `records[i]` holds encoded image bytes or moments, and annotations.
    """

    records: Sequence
    kind: str  # 'image' or 'moments'
    image_shape: tuple[int, int, int]  # (height, width, channels) of the cropped images
    annotations: Annotations = dataclasses.field(default_factory=Annotations)
    origin: str = ""  # the name of the split in messages
    views: int = 1  # consecutive records per image: the image, and with 2 also its mirror image
    metadata: dict = dataclasses.field(default_factory=dict)  # for moments: recorded by `encode`
    class_names: tuple[str, ...] | None = None  # in the order of the labels; None without names
    files: Files | None = None  # None only for records in memory
    version: str = ""  # name, version and split of a dataset that has versions
    on_device: bool = False  # all records are on the devices; training batches hold their indices

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        index = int(index)
        record = self._read(index)
        example = self.annotations.read(record, lambda: self.describe(index))
        if self.kind == "moments":
            return {"moments": np.asarray(record["moments"], np.float16), **example}
        return {**self._decode(record, index), **example}

    def _decode(self, record, index):
        """Decodes and crops the images of a record: {feature: [H, W, channels] uint8}."""
        *size, channels = self.image_shape
        arrays, expected_size = {}, None
        for feature, num_channels in {"image": channels, **self.annotations.images}.items():
            try:
                image = pixels.decode(record[feature])
                # The same crop of further images needs the same size.
                expected_size = expected_size or image.size
                if image.size != expected_size:
                    raise UserError(
                        f"its width and height {image.size} differ from the image's, "
                        f"{expected_size}"
                    )
                self._warn(image, size, index)
                image = pixels.adm_crop(pixels.to_channels(image, num_channels), size)
            except MemoryError as error:  # the machine is short of memory; the file may be fine
                message = f"for {self.describe(index)}, cropped to {sizes.show(size)} pixels"
                raise MemoryError(message) from error
            except ValueError as error:
                raise UserError(
                    f"cannot read the {feature} of {self.describe(index)}: {error}. Remove or "
                    "repair it."
                ) from error
            arrays[feature] = np.asarray(image, np.uint8).reshape(*size, num_channels)
        return arrays

    def _warn(self, image, size, index):
        """Warns, once per dataset, of images that are turned or smaller than the crop."""
        height, width = size
        if pixels.orientation(image) != 1:
            log_once(
                f"{self.origin}: some images have an EXIF orientation, such as "
                f"{self.describe(index)}. It is not applied: {pixels.ORIENTATION_WAY_OUT}",
                key=("orientation", self.origin),
            )
        if image.width < width or image.height < height:
            log_once(
                f"{self.origin}: some images are smaller than data.image_size, "
                f"{sizes.show(size)}; they are enlarged."
            )

    def captions(self, index: int) -> list[str]:
        """Returns `annotations.captions_per_image` captions of an image.

        Raises: ValueError for an image without captions.
        """
        index = int(index)
        return self.annotations.read_captions(self._read(index), lambda: self.describe(index))

    def _read(self, index):
        try:
            return self.records[index]
        # array_record and Protocol Buffers raise their own kinds of exceptions.
        except Exception as error:
            way_out = "If a shard was cut, remove it and build the dataset again."
            if self._has_file_per_record():
                way_out = "Put the file back as it was: the order of the data depends on all files."
            raise UserError(f"cannot read {self.describe(index)}: {error}. {way_out}") from error

    def describe(self, index: int) -> str:
        """Returns the path of an image file, or 'record 3 of <dataset>', for messages."""
        if self._has_file_per_record():
            return files.printable(self.files.path(index))
        return f"record {index} of {self.origin}"

    def _has_file_per_record(self):
        return self.files is not None and self.files.ranges is None


@functools.cache
def _counter(key):
    """Returns the counter of a key."""
    return itertools.count()


def log_once(message: str, level: int = logging.WARNING, key: object = None) -> None:
    """Logs a message about a dataset, once per process.

    Args:
      key: only the first message of a key is logged; None for the message itself.
    """
    # Images are decoded in several threads; next() of a counter is atomic.
    if next(_counter(key or message)) == 0:
        logger.log(level, "%s", files.printable(message))
