"""Datasets with random access to examples: images or moments, with a label or captions.

Images come from a TFDS dataset or an image folder. Moments are the VAE outputs that
`dit_jax.encode` wrote; `latents` opens them.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.data import folders, listing, pixels, tfds_data
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to decoded examples: 'image' [H, W, C] uint8 or 'moments' f16, and annotations.

    `records[i]` holds encoded image bytes or moments, and a label. `describe(i)` is its name in
    error messages.
    """

    records: Sequence
    kind: str  # 'image' or 'moments'
    image_shape: tuple[int, int, int]  # (height, width, channels) of the cropped images
    annotations: Annotations = dataclasses.field(default_factory=Annotations)
    origin: str = ""  # the name of the split in messages
    views: int = 1  # consecutive records per image: the image, and with 2 also its mirror image
    metadata: dict = dataclasses.field(default_factory=dict)  # for moments: recorded by `encode`
    class_names: tuple[str, ...] | None = None  # in the order of the labels; None without names
    shards: tuple[tfds_data.Shard, ...] = ()  # only for TFDS datasets
    version: str = ""  # only for TFDS datasets: name, version and split
    on_device: bool = False  # all records are on the devices; training batches hold their indices

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        index = int(index)
        record = self._read(index)
        example = self.annotations.read(record, lambda: self.describe(index))
        if self.kind == "moments":
            return {"moments": np.asarray(record["moments"], np.float16), **example}
        return {"image": self._decode(record["image"], index), **example}

    def _decode(self, contents, index):
        """Decodes and crops an image to [H, W, C] uint8.

        Raises: ValueError for a damaged image; MemoryError.
        """
        height, width, channels = self.image_shape
        try:
            image = pixels.decode(contents)
            if pixels.orientation(image) != 1 and _is_first("orientation", self.origin):
                logger.warning(
                    "%s: some images have an EXIF orientation, such as %s. It is not applied: %s",
                    self.origin,
                    self.describe(index),
                    pixels.ORIENTATION_WAY_OUT,
                )
            if image.width < width or image.height < height:
                _warn_of_small_images(self.origin, sizes.show(self.image_shape[:2]))
            image = pixels.to_channels(image, channels)
            image = pixels.adm_crop(image, (height, width))
        except MemoryError as error:  # the machine is short of memory; the file may be fine
            text = f"for {self.describe(index)}, cropped to {height} x {width} pixels"
            raise MemoryError(text) from error
        except ValueError as error:
            raise UserError(
                f"cannot read the image of {self.describe(index)}: {error}. Remove or repair it."
            ) from error
        return np.asarray(image, np.uint8).reshape(self.image_shape)

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
            if isinstance(self.records, folders.Folder):
                way_out = (
                    "Put the file back as it was: the data order depends on every one of them."
                )
            raise UserError(f"cannot read {self.describe(index)}: {error}. {way_out}") from error

    def describe(self, index: int) -> str:
        """Returns the path of an image file, or 'record 3 of <dataset>', for messages."""
        if isinstance(self.records, folders.Folder):
            return files.printable(self.records.path(index))
        return f"record {index} of {self.origin}"


@functools.cache
def _count_of(*about):
    """Returns the counter of these arguments."""
    return itertools.count()


def _is_first(*about):
    """Returns whether this is the first call with these arguments in this process."""
    # Images are decoded in several threads; next() of a counter is atomic.
    return next(_count_of(*about)) == 0


@functools.cache  # warns once per dataset
def _warn_of_small_images(origin, size):
    logger.warning(
        "%s: some images are smaller than data.image_size, %s; they are enlarged.", origin, size
    )


def open_images(config, split: str, annotations: Annotations | None = None) -> Source:
    """Opens the images of one split of `config.data`.

    Args:
      annotations: what is read with each image; None for the default, `Annotations()`.
        `conditions.open_images` passes the annotations of the config's model.
    Raises: FileNotFoundError if the dataset does not exist, with the command to build it;
      ValueError for an empty name, an empty or unknown split, or an unknown config value; as
      `folders`.
    """
    data, annotations = config.data, annotations or Annotations()
    if not data.name:
        raise UserError(
            "data.name is empty: this config names no images. Set it, for a new run as "
            "--config.data.name=NAME; of a converted model, data.source, data.name and "
            "data.caption_feature in the config.json of its workdir."
        )
    if data.image_channels not in (1, 3):
        raise UserError(f"{data.image_channels=} must be 1 (grey) or 3 (RGB).")
    shape = sizes.image_shape(data)
    if data.source == "tfds":
        source = _open_tfds(data, split, shape, annotations)
    elif data.source == "folder":
        source = _open_folder(data, split, shape, annotations)
    else:
        raise UserError(f"data.source={data.source!r} is unknown; choose tfds or folder.")
    if not len(source):
        raise UserError(f"{source.origin} is empty.")
    return source


def _open_tfds(data, split, shape, annotations):
    """Opens a split of a TFDS dataset.   Raises: as `tfds_data.open_builder` and `read_split`."""
    build = tfds_data.build_command(data.name, data.data_dir)
    builder = tfds_data.open_builder(data.name, data.data_dir, "image", build)
    annotations.check_features(builder.info.features, data.name)
    names = read_class_names(builder, annotations.num_classes)
    records, origin, shards = tfds_data.read_split(builder, split, "image", build)
    return Source(
        records,
        "image",
        shape,
        annotations,
        origin,
        class_names=names,
        shards=tuple(shards),
        version=f"{builder.info.full_name} {split}",
    )


def _open_folder(data, split, shape, annotations):
    """Opens a split of an image folder.   Raises: as `folders`."""
    root, num_classes = files.to_path(data.name, "data.name"), annotations.num_classes
    if annotations.caption_feature and num_classes:
        raise UserError(
            f"data.caption_feature={data.caption_feature!r}: an image folder with captions has "
            f"no classes, which model.num_classes={num_classes} needs. Leave it "
            "empty for classes by folder; for captions set model.condition, or model."
            "num_classes=0 with model.null_condition=False."
        )
    if annotations.caption_feature:
        folder = folders.open_captions(root, split, annotations.caption_feature)
    elif num_classes:
        folder = folders.open_classes(root, split, data.train_split, num_classes)
    else:
        folder = folders.open_images(root, split)
    origin = f"image folder {files.printable(root / split)}"
    return Source(folder, "image", shape, annotations, origin, class_names=folder.classes)


def check_outside_images(config, directory: pathlib.Path) -> None:
    """Raises if an output directory is inside a split of the config's image folder.

    The next command would read the files there as images and classes.
    Raises: ValueError.
    """
    data = config.get("data") or {}
    if data.get("source") != "folder":
        return
    root, directory = files.to_path(data.name, "data.name"), directory.resolve()
    for split in filter(None, (data.train_split, data.eval_split)):
        within = (root / split).resolve()
        if within in (directory, *directory.parents):
            raise UserError(
                f"{files.printable(directory)} lies in the image folder {files.printable(within)}, "
                "where it would be a class: choose a directory outside of it."
            )


def read_class_names(builder, num_classes: int | None) -> tuple[str, ...] | None:
    """Returns the class names of a TFDS dataset, or None if its classes have no names.

    Warns if the number of classes differs from the model's. That is no error here, because
    `Annotations.read` refuses each label that the model does not have.
    """
    if "label" not in builder.info.features:
        return None
    label = builder.info.features["label"]
    count = getattr(label, "num_classes", None)  # None for a label that is a plain integer
    if num_classes and count not in (None, num_classes):
        message = f"{builder.data_dir} has {count} classes, but model.num_classes={num_classes}."
        listing.say(message, logging.WARNING)
    # TFDS names unnamed classes "0", "1", ...; these are not names.
    names = tuple(label.names) if count else ()
    return None if names == tuple(map(str, range(len(names)))) else names
