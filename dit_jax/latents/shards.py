"""Shards of a dataset of moments: writes them, checks them when resuming, joins them to a dataset.

A shard's sums are in a file in sums/: sums of its moments for the mean and deviation of each
channel, the shard's checksum, and a digest of the settings that it was made with. `encode.json`
holds the settings of all shards.
"""

import functools
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor

import flax
import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from dit_jax import sharding
from dit_jax.errors import UserError, UserFileError
from dit_jax.latents import codec
from dit_jax.system import files, json_files
from dit_jax.workdirs import digests

logger = logging.getLogger("dit_jax")

LATER_KEYS = ("dataset",)  # keys of encode.json that older versions did not record
# The keys of every file in sums/. Older versions wrote no others.
SUMS = {"records", "positions", "mean", "square", "absolute", "bytes"}

Shards = Mapping[pathlib.Path, range]  # path -> indices of its images


def list_shards(out: pathlib.Path, split: str, num_images: int, shard_images: int) -> Shards:
    """Returns the shards of a split: `shard_images` images in each but the last."""
    starts = range(0, num_images, shard_images)
    name = f"moments-{split}.array_record-{{:05d}}-of-{len(starts):05d}"
    return {
        out / name.format(i): range(start, min(start + shard_images, num_images))
        for i, start in enumerate(starts)
    }


def claim(out: pathlib.Path, identity: dict, splits: Mapping[str, Shards]) -> None:
    """Writes the identity of the shards to encode.json, unless other shards are in the directory.

    Args: identity, JSON of all that determines the bytes: images, VAE, settings, versions.
    Raises: ValueError, in all processes, with the differences between the identities; OSError if
      encode.json cannot be written.
    """
    if (out / "checkpoints").is_dir():
        raise UserError(f"{out} is the workdir of a run: choose another directory for the shards.")
    # The processes share the directory, so only the first process reads it. All processes raise,
    # because the others would wait for the first one.
    problem = _find_difference(out, identity, splits) if jax.process_index() == 0 else ""
    if problem := sharding.broadcast_text(problem):
        raise UserError(f"{problem}\nChoose another --out, or restore the images and settings.")
    text = json.dumps(digests.with_digest(identity), indent=2)
    write = functools.partial(files.replace_text, out / "encode.json", text)
    sharding.in_first_process(write, f"cannot write to {out}")


def _find_difference(out, identity, splits):
    """Describes how the directory's shards differ from an identity; '' if they do not."""
    if not are_begun(out):
        return ""
    if saved_identity := _read_identity(out / "encode.json"):
        return _describe_difference(out, saved_identity, identity)
    # Without encode.json, each shard's sums have a digest of its identity.
    for path in (path for split in splits.values() for path in split if path.is_file()):
        if not _has_identity(path, identity):
            return f"{path} was made of other images, by another VAE or with other settings."
    return ""


def are_begun(out: pathlib.Path) -> bool:
    """Returns whether the directory has a shard, so that others could be mixed with it."""
    return any(out.glob("moments-*.array_record-*-of-*[0-9]"))


def _drop_source(identity):
    """Returns an identity without the images' name, if 'dataset' identifies the images.

    Such images may be moved: the name does not change the shards' bytes.
    """
    if not identity.get("dataset"):
        return identity
    return {key: value for key, value in identity.items() if key != "source"}


def _read_identity(path):
    """Returns the identity in encode.json; {} if the file is missing or damaged."""
    try:
        saved = json_files.read_json(path, "what the shards are made of") if path.is_file() else {}
        return digests.without_digest(saved, path)
    except ValueError as error:
        logger.warning("%s; it is written again.", error)
        return {}


def _describe_difference(out, saved_identity, identity):
    """Describes how two identities differ; '' if they do not."""
    # Keys that an older version did not record cannot be compared.
    unknown = [key for key in LATER_KEYS if key not in saved_identity]
    if unknown:
        logger.warning("%s does not record its %s: not compared.", out, " and ".join(unknown))
        identity = {key: value for key, value in identity.items() if key not in unknown}
    # Without a recorded dataset the images must have the same name.
    then = flax.traverse_util.flatten_dict(_drop_source(saved_identity), sep=".")
    now = flax.traverse_util.flatten_dict(_drop_source(identity), sep=".")
    differences = [
        f"\n  {key}: then {_shorten(then.get(key))}, now {_shorten(now.get(key))}"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    ]
    return f"{out} was begun in another way:{''.join(differences)}" if differences else ""


def _shorten(value):
    """Formats a value for a message; only the beginning of a list, such as class names."""
    if isinstance(value, list):
        return f"[{files.list_some([str(item) for item in value])}]"
    return repr(value)


def find_missing(shards: Shards, threads: Executor) -> Shards:
    """Returns the shards that are missing or damaged, and so must be written.

    The threads read every existing shard and compare it with its checksum.
    """
    paths = [path for path in shards if path.is_file()]
    problems = dict(zip(paths, threads.map(_find_damage, paths), strict=True))
    for path, problem in problems.items():
        if problem:
            logger.warning("%s is written again: %s", path, problem)
    # Older versions recorded no checksums.
    unchecked = [path for path in paths if not problems[path] and "crc32" not in _read_sums(path)]
    if unchecked:
        logger.warning(
            "%d shards, such as %s, have no recorded checksum: only their sizes were compared.",
            len(unchecked),
            unchecked[0],
        )
    return {path: indices for path, indices in shards.items() if problems.get(path, "missing")}


def _find_damage(path):
    """Describes the damage of an existing shard; '' if there is none."""
    try:
        sums = _read_sums(path)
    except (OSError, ValueError) as error:
        return str(error)
    # The size first: the checksum reads the whole file.
    if path.stat().st_size != sums["bytes"]:
        return f"it has {path.stat().st_size} bytes, not {sums['bytes']}"
    if "crc32" in sums and _compute_crc32(path) != sums["crc32"]:
        return "its bytes are not those that were written"
    return ""


def write_shard(
    path: pathlib.Path,
    batches: Iterable[tuple],
    views: int,
    features: tfds.features.FeaturesDict,
    identity: dict,
    bar: tqdm,
) -> None:
    """Writes a shard and its sums. The file has another name until it is complete.

    Args:
      path: the name of the complete shard.
      batches: (moments [views * B, h, w, 2C], count, {feature: values [B] or more}). Only the first
        `count` images and values are written; the others fill up the batch.
      views: consecutive moments of each image: 1, or 2 with its mirror image.
      identity: as for `claim`.
    Raises: ValueError for moments that are not finite; OSError if the shard cannot be written.
    """
    temporary, batch_sums = path.with_name(path.name + ".tmp"), []
    try:
        # Groups of one record, so that random access reads no other records.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for moments, count, values in batches:
            moments = np.asarray(moments)[: views * count]
            values = {name: np.asarray(array)[:count] for name, array in values.items()}
            _check_finite(path, moments, "moments")
            _check_finite(path, values.get("context", ()), "text encoder's outputs")
            for i, record_moments in enumerate(moments):
                # An image and its mirror image have the same label and captions.
                annotations = {name: array[i // views] for name, array in values.items()}
                example = {"moments": record_moments, **annotations}
                writer.write(_order_features(features.serialize_example(example)))
            batch_sums.append(_sum_moments(moments))
            bar.update(count)
        writer.close()
        # In this order, a file with the shard's name is on the disk, complete, and has sums.
        files.flush_to_disk(temporary)
        _write_sums(path, temporary, batch_sums, identity)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        # JaxRuntimeError is a RuntimeError too, but its cause is not the file.
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise UserFileError(
            f"cannot write {path}: {error}\nOther shards are complete. Free space if the disk is "
            "full, then run the same command."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_finite(path, array, name):
    if not np.isfinite(array).all():
        raise UserError(
            f"{name} in {path.name} are not finite in float16. Check that --vae and text.encoder "
            "are right for these images, or set --dtype=float32."
        )


def _order_features(example):
    """Sorts the features in a record's bytes, because protobuf maps have no order."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def _sum_moments(moments):
    """Sums moments [B, h, w, 2C] over the positions of each record, in f64.

    'square' includes the posterior's variance, because x_0 is a sample of the posterior.
    """
    num_records, channels = len(moments), moments.shape[-1]
    moments = moments.astype(np.float64).reshape(num_records, -1, channels)
    mean, log_variance = np.split(moments, 2, axis=-1)  # [B, positions, C]
    variance = np.exp(np.clip(log_variance, codec.MIN_LOG_VARIANCE, codec.MAX_LOG_VARIANCE))
    return {
        "records": np.ones(num_records, int),
        "positions": np.full(num_records, mean.shape[1]),
        "mean": mean.sum(axis=1),
        "square": (mean**2 + variance).sum(axis=1),
        "absolute": np.abs(mean).sum(axis=(1, 2)),
    }


def _write_sums(path, temporary, batch_sums, identity):
    # All records are summed together, so that the batch size does not change the rounding.
    sums = {
        name: np.concatenate([part[name] for part in batch_sums]).sum(axis=0).tolist()
        for name in batch_sums[0]
    }
    sums |= {"bytes": temporary.stat().st_size, "crc32": _compute_crc32(temporary)}
    sums["identity"] = digests.digest_json(_drop_source(identity))
    sums_path = _get_sums_path(path)
    sums_path.parent.mkdir(exist_ok=True)
    files.replace_text(sums_path, json.dumps(digests.with_digest(sums)))


def _get_sums_path(path):
    return path.parent / "sums" / f"{path.name}.json"


def _read_sums(path):
    """Reads the sums of a shard.

    Raises: OSError; ValueError if the sums are damaged.
    """
    sums_path = _get_sums_path(path)
    sums = json_files.read_json(sums_path, "the sums of a shard")
    if not (isinstance(sums, dict) and sums.keys() >= SUMS):
        raise UserError(f"{sums_path} lacks one of {', '.join(sorted(SUMS))}")
    return digests.without_digest(sums, sums_path)


def _has_identity(path, identity):
    """Returns whether a shard has this identity; True if its sums are damaged or have none."""
    try:
        expected = digests.digest_json(_drop_source(identity))
        return _read_sums(path).get("identity", expected) == expected
    except (OSError, ValueError):
        return True  # the shard is written again


def _compute_crc32(path):
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # in blocks: a shard may be large
            crc = zlib.crc32(block, crc)
    return crc


def compute_statistics(shards: Shards) -> dict:
    """Returns 'mean' and 'std', lists with a value for each channel of posterior samples.

    Also returns 'mean_absolute', the mean absolute value of the posterior's means.
    """
    shard_sums = [_read_sums(path) for path in shards]
    positions = sum(sums["positions"] for sums in shard_sums)
    mean = np.sum([sums["mean"] for sums in shard_sums], axis=0) / positions
    square = np.sum([sums["square"] for sums in shard_sums], axis=0) / positions
    mean_absolute = sum(sums["absolute"] for sums in shard_sums) / (positions * len(mean))
    std = np.sqrt(square - mean**2)
    return {"mean": mean.tolist(), "std": std.tolist(), "mean_absolute": mean_absolute}


def write_metadata(
    out: pathlib.Path,
    splits: Mapping[str, Shards],
    features: tfds.features.FeaturesDict,
    metadata: dict,
) -> None:
    """Writes the metadata with which TFDS reads the shards as a dataset."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name="moments", data_dir=out, filetype_suffix="array_record"
    )
    split_infos = []
    for name, paths in splits.items():
        shard_sums = [_read_sums(path) for path in paths]
        split_infos.append(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[sums["records"] for sums in shard_sums],
                num_bytes=sum(sums["bytes"] for sums in shard_sums),
                filename_template=template.replace(split=name),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=features,
        split_infos=split_infos,
        filename_template=template,
        check_data=False,  # the check needs TensorFlow
        description="Moments of a VAE's posterior over images, unscaled.",
        metadata=tfds.core.MetadataDict(metadata),
    )
