"""Datasets as random access to examples: images or moments, with a label or captions.

They are TFDS datasets or image folders; moments are those that `dit_jax.encode` wrote.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.data import folders, listing, manifest, pixels, text, tfds_data
from dit_jax.system import files

# What x_0 is: pixels; latents of images that every step encodes, of stored moments, or of stored
# moments in device memory.
LATENTS = ("pixels", "images", "moments", "device")
logger = logging.getLogger("dit_jax")

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to decoded examples: 'image' [H, W, C] uint8 or 'moments' f16; 'label' int32.

    With captions 'tokens' [K, M] int32 too, or 'context' [K, M, D] f16, of K captions each.
    `records[i]` holds encoded image bytes, or moments, and a label; `describe(i)` names it in
    errors.
    """

    records: Sequence
    kind: str  # 'image' or 'moments'
    image_shape: tuple[int, int, int]  # height, width, channels of the images, cropped
    num_classes: int | None = None  # None: labels mean nothing to the model
    origin: str = ""
    views: int = 1  # records of an image in a row: itself, and with 2 its mirror
    metadata: dict = dataclasses.field(default_factory=dict)  # of moments: what `encode` recorded
    caption_feature: str = ""  # 'captions/text' is record['captions']['text']
    captions_per_image: int = 1
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None  # captions to ids [K, M]
    context: bool = False  # the records hold what the text encoder has made of the captions
    class_names: tuple[str, ...] | None = None  # of the labels, in order, where they have names
    shards: tuple[tfds_data.Shard, ...] = ()  # of a TFDS dataset
    version: str = ""  # of a TFDS dataset, with its name and the split

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        index = int(index)
        record, (height, width, channels) = self._record(index), self.image_shape
        label = int(record.get("label", 0))  # datasets of captions may have none
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise ValueError(
                f"label {label} of {self.describe(index)} lies outside 0..{self.num_classes - 1}; "
                "set model.num_classes to the number of classes in the data."
            )
        example = {"label": np.int32(label)}
        if self.tokenize:
            example["tokens"] = self.tokenize(self._captions(record, index))
        if self.context:
            example["context"] = np.asarray(record["context"], np.float16)
        if self.kind == "moments":
            return {"moments": np.asarray(record["moments"], np.float16), **example}
        try:
            image = pixels.decode(record["image"])
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
        except MemoryError as error:  # of the machine, not of the file
            text = f"for {self.describe(index)}, cropped to {height} x {width} pixels"
            raise MemoryError(text) from error
        except ValueError as error:
            raise ValueError(
                f"cannot read the image of {self.describe(index)}: {error}. Remove or repair it."
            ) from error
        return {"image": np.asarray(image, np.uint8).reshape(self.image_shape), **example}

    def captions(self, index: int) -> list[str]:
        """The `captions_per_image` captions of an image; one with fewer repeats its own.

        Raises: ValueError for an image without any.
        """
        return self._captions(self._record(int(index)), index)

    def _captions(self, record, index):
        found = record
        for name in self.caption_feature.split("/"):
            found = found[name]
        found = [found] if isinstance(found, str | bytes) else list(found)
        found = [c.decode() if isinstance(c, bytes) else str(c) for c in found]
        if not found:
            raise ValueError(f"{self.describe(index)} has no caption; leave it out.")
        return [found[i % len(found)] for i in range(self.captions_per_image)]

    def _record(self, index):
        try:
            return self.records[index]
        # array_record and Protocol Buffers have exceptions of their own.
        except Exception as error:
            way_out = "If a shard was cut, remove it and build the dataset again."
            if isinstance(self.records, folders.Folder):
                way_out = (
                    "Put the file back as it was: the data order depends on every one of them."
                )
            raise ValueError(f"cannot read {self.describe(index)}: {error}. {way_out}") from error

    def describe(self, index: int) -> str:
        """The file of an image folder, or 'record 3 of <dataset>'."""
        if isinstance(self.records, folders.Folder):
            return files.printable(self.records.path(index))
        return f"record {index} of {self.origin}"


@functools.cache
def _count_of(*about):
    return itertools.count()


def _is_first(*about):
    """Whether this is asked for the first time in this process."""
    return next(_count_of(*about)) == 0


@functools.cache  # once for each dataset
def _warn_of_small_images(origin, image_size):
    logger.warning(
        "%s: some images are smaller than data.image_size, %s; they are enlarged.",
        origin,
        image_size,
    )


def check_latents(config) -> None:
    """Raises: ValueError for an unknown `config.latents.source`."""
    if config.latents.source not in LATENTS:
        raise ValueError(
            f"latents.source={config.latents.source!r} is unknown; choose one of "
            f"{', '.join(LATENTS)}."
        )


def open_split(config, split: str) -> Source:
    """What a run with `config.latents.source` trains on or, with split 'eval', is evaluated on.

    Raises: ValueError for an unknown source; as `open_images` and `open_moments`.
    """
    check_latents(config)
    if config.latents.source in ("pixels", "images"):
        return open_images(config, config.data[f"{split}_split"])
    return open_moments(config, split)


def open_images(config, split: str, labels: bool = True) -> Source:
    """The images of one split of `config.data`.

    Args: labels, False for images alone, whatever the config's model takes.
    Raises: FileNotFoundError if there is no such dataset, with the way to build it; ValueError
      for an empty name, an empty or unknown split, or an unknown config value; as `folders`.
    """
    data, told = config.data, _told(config)
    if not labels:
        told["num_classes"] = None
    if not data.name:
        raise ValueError(
            "data.name is empty: this config names no images. Set it, for a new run as "
            "--config.data.name=NAME; of a converted model, data.source, data.name and "
            "data.caption_feature in the config.json of its workdir."
        )
    if data.image_channels not in (1, 3):
        raise ValueError(f"{data.image_channels=} must be 1 (grey) or 3 (RGB).")
    if data.source == "tfds":
        build = tfds_data.build_command(data.name, data.data_dir)
        builder = tfds_data.open_builder(data.name, data.data_dir, "image", build)
        _check_features(builder, data.name, told)
        names = _class_names(builder, told["num_classes"])
        records, origin, shards = tfds_data.read_split(builder, split, "image", build)
        told |= dict(shards=tuple(shards), version=f"{builder.info.full_name} {split}")
    elif data.source == "folder":
        records, origin = _open_folder(config, split, told)
        names = records.classes
    else:
        raise ValueError(f"data.source={data.source!r} is unknown; choose tfds or folder.")
    if not len(records):
        raise ValueError(f"{origin} is empty.")
    shape = sizes.image_shape(data)
    return Source(records, "image", shape, origin=origin, class_names=names, **told)


def check_outside(config, directory: pathlib.Path) -> None:
    """Demands that a directory to write into is not within the splits of an image folder.

    What is written there would be images and classes of the next command.
    Raises: ValueError.
    """
    data = config.get("data") or {}
    if data.get("source") != "folder":
        return
    root, directory = files.to_path(data.name, "data.name"), directory.resolve()
    for split in filter(None, (data.train_split, data.eval_split)):
        within = (root / split).resolve()
        if within in (directory, *directory.parents):
            raise ValueError(
                f"{files.printable(directory)} lies in the image folder {files.printable(within)}, "
                "where it would be a class: choose a directory outside of it."
            )


def _open_folder(config, split, told):
    """(records, origin) of a split of an image folder, with what the model is told."""
    data, root = config.data, files.to_path(config.data.name, "data.name")
    origin = f"image folder {files.printable(root / split)}"
    if told.get("caption_feature"):
        if told["num_classes"]:
            raise ValueError(
                f"data.caption_feature={data.caption_feature!r}: an image folder with captions has "
                f"no classes, which model.num_classes={config.model.num_classes} needs. Leave it "
                "empty for classes by folder; for captions set model.condition, or model."
                "num_classes=0 with model.class_dropout_prob=0."
            )
        return folders.open_captions(root, split, data.caption_feature), origin
    if told["num_classes"]:
        classes = data.train_split, told["num_classes"]
        return folders.open_classes(root, split, *classes), origin
    return folders.open_images(root, split), origin


def _class_names(builder, num_classes):
    """The names of a TFDS dataset's labels, if they have any.

    Logs a number that is not the model's: labels that it does not know are refused as they come.
    """
    if "label" not in builder.info.features:
        return None
    label = builder.info.features["label"]
    count = getattr(label, "num_classes", None)  # of a plain number it is not known
    if num_classes and count not in (None, num_classes):
        message = f"{builder.data_dir} has {count} classes, but model.num_classes={num_classes}."
        listing.say(message, logging.WARNING)
    names = tuple(label.names) if count else ()
    return None if names == tuple(map(str, range(len(names)))) else names


def tokenizer(config) -> Callable[[Sequence[str]], np.ndarray] | None:
    """Captions to the ids [n, M] int32 that the config's model reads; None if it takes labels.

    Raises: FileNotFoundError without the frozen encoder's tokeniser; as `encoder_workdir`.
    """
    condition = config.model.get("condition", "label")  # a VAE has none
    if condition == "tokens":
        return text.WordTokenizer(config.model.text_length, config.model.text_vocab_size)
    if condition == "context":
        return text.load_tokenizer(encoder_workdir(config))
    return None


def encoder_workdir(config) -> pathlib.Path:
    """Where the frozen text encoder is.   Raises: ValueError if the config does not say."""
    if not config.text.encoder:
        raise ValueError(
            "text.encoder is empty: model.condition='context' needs the workdir of a text encoder, "
            "which python -m dit_jax.convert clip writes."
        )
    return files.to_path(config.text.encoder, "text.encoder")


def _told(config):
    """The fields of a `Source` that say what it tells of an image beside the pixels."""
    tokenize, feature = tokenizer(config), config.data.caption_feature
    if not feature and tokenize is None:
        return dict(num_classes=config.model.get("num_classes") or None)
    if not feature:
        raise ValueError(
            f"model.condition={config.model.condition!r} needs data.caption_feature, the name of "
            "the captions in the dataset: caption, captions/text, or text of an image folder."
        )
    count = config.data.captions_per_image
    if count < 1:
        raise ValueError(f"data.captions_per_image={count} must be at least 1.")
    # Captions that this model does not read, dit_jax.encode stores for another.
    return dict(
        num_classes=None if tokenize else config.model.get("num_classes") or None,
        caption_feature=feature,
        captions_per_image=count,
        tokenize=tokenize,
    )


def _check_features(builder, name, told):
    """Demands of a TFDS dataset the labels or the captions that a model is told."""
    features = builder.info.features
    if told["num_classes"] is not None and "label" not in features:
        raise ValueError(
            f"dataset {name!r} has no labels, only {', '.join(sorted(features))}: set "
            "model.condition for captions."
        )
    found = features
    feature = told.get("caption_feature", "")
    for part in feature.split("/") if feature else ():
        found = getattr(found, "feature", found)  # of a sequence
        if part not in found:
            raise ValueError(
                f"dataset {name!r} has no feature data.caption_feature={feature!r}; it has "
                f"{', '.join(sorted(features))}."
            )
        found = found[part]


def open_moments(config, split: str) -> Source:
    """The moments of one split, 'train' or 'eval', that `dit_jax.encode` wrote.

    Raises: FileNotFoundError if there is no such dataset; ValueError for an empty split, moments
      of another shape than the model takes, or moments that something has scaled.
    """
    name = config.latents.moments
    build = "python -m dit_jax.encode --config ... --vae ... --out ..."
    builder = tfds_data.open_builder(name, config.data.data_dir, "moments", build)
    records, origin, shards = tfds_data.read_split(builder, split, "moments", build)
    if not len(records):
        raise ValueError(f"{origin} is empty.")
    features = builder.info.features
    model, shape = config.model, tuple(features["moments"].shape)
    height, width, channels = sizes.input_shape(model)
    wanted = (height, width, 2 * channels)
    if shape != wanted:
        raise ValueError(
            f"{origin} holds moments {shape}, but the model takes {wanted}: [h, w, 2C] by "
            f"model.input_size={model.input_size}, model.in_channels={model.in_channels}."
        )
    metadata = dict(builder.info.metadata or {})
    if metadata:
        manifest.check_moments(metadata, model.in_channels, builder.data_dir)
    views = 2 if metadata.get("mirrored") else 1
    told = _told_of_moments(config, builder)
    told |= dict(shards=tuple(shards), version=f"{builder.info.full_name} {split}")
    classes = metadata.get("dataset", {}).get("train", {}).get("classes")
    told["class_names"] = tuple(classes) if classes else _class_names(builder, told["num_classes"])
    count = getattr(features["label"], "num_classes", None) if "label" in features else None
    if classes and count and len(classes) != count:
        raise ValueError(f"{origin} has {count} classes, but the names of {len(classes)}.")
    source = Source(
        records,
        "moments",
        sizes.image_shape(config.data),
        origin=origin,
        views=views,
        metadata=metadata,
        **told,
    )
    if metadata:
        numbers = np.linspace(0, len(source) - 1, min(len(source), 256)).astype(int)
        means = np.stack([source[i]["moments"] for i in numbers])[..., : model.in_channels]
        found, recorded = float(np.abs(means).mean(dtype=np.float64)), metadata["mean_absolute"]
        if not recorded / 1.25 < found < recorded * 1.25:
            raise ValueError(
                f"the means in {origin} are {found:.3g} large on average, but were written as "
                f"{recorded:.3g}: they may have been scaled already. Encode the images again."
            )
    return source


def _told_of_moments(config, builder):
    """As `_told`, of what `dit_jax.encode` stored: 'captions', perhaps 'context'."""
    model, features = config.model, builder.info.features
    if model.condition == "label":
        if model.num_classes and "label" not in features:
            raise ValueError(
                f"{builder.data_dir} holds no labels, which model.num_classes={model.num_classes} "
                "needs: encode the images of a config with as many classes."
            )
        return dict(num_classes=model.num_classes or None)
    if "captions" not in features:
        raise ValueError(
            f"{builder.data_dir} holds no captions, which model.condition={model.condition!r} "
            "needs: encode the images with data.caption_feature set."
        )
    count = features["captions"].shape[0]
    told = dict(num_classes=None, caption_feature="captions", captions_per_image=count)
    if not (model.condition == "context" and config.text.stored):
        return {**told, "tokenize": tokenizer(config)}
    if "context" not in features:
        raise ValueError(
            f"{builder.data_dir} holds no text encoder's outputs: encode with text.stored, or set "
            "it to False."
        )
    recorded = dict(builder.info.metadata or {}).get("text_encoder_digest", "")
    if recorded and config.text.encoder_digest not in ("", recorded):
        raise ValueError(
            f"{builder.data_dir} holds outputs of a text encoder with digest {recorded}, but text."
            f"encoder_digest={config.text.encoder_digest} is of another: encode the images again."
        )
    shape = tuple(features["context"].shape)
    if shape[-1] != model.context_size:
        raise ValueError(
            f"{builder.data_dir} holds context {shape} of each image, but the model was built for "
            f"model.context_size={model.context_size}."
        )
    return {**told, "context": True}
