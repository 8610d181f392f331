"""The shards of a dataset of moments: written whole, checked when resuming, joined to a dataset.

In sums/ there is a file for each shard. It has the shard's checksum, a digest of the settings that
the shard was made with, and the sums for the channels' mean and deviation. `encode.json` records
the settings of all shards.
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
# Keys of every file in sums/; newer versions add checksums.
SUMS = {"records", "positions", "mean", "square", "absolute", "bytes"}

Shards = Mapping[pathlib.Path, range]  # path -> numbers of the images in it


def list_shards(out: pathlib.Path, split: str, num_images: int, shard_images: int) -> Shards:
    """Returns the shards of a split of `num_images`: `shard_images` in each but the last."""
    num_shards = -(-num_images // shard_images)
    starts = range(0, num_images, shard_images)
    return {
        out / f"moments-{split}.array_record-{i:05d}-of-{num_shards:05d}": range(
            start, min(start + shard_images, num_images)
        )
        for i, start in enumerate(starts)
    }


def claim(out: pathlib.Path, identity: dict, splits: Mapping[str, Shards]) -> None:
    """Raises unless the directory's shards were made with this identity; records it there.

    Args: identity, JSON of all that decides the bytes: images, VAE, settings, versions.
    Raises: ValueError that lists the differences, in all processes; OSError if the record cannot
      be written.
    """
    if (out / "checkpoints").is_dir():
        raise UserError(f"{out} is the workdir of a run: choose another directory for the shards.")
    # The processes share the directory, so the first one reads it for all. All raise together:
    # otherwise the others would wait for the first one.
    problem = _find_difference(out, identity, splits) if jax.process_index() == 0 else ""
    if problem := sharding.broadcast_text(problem):
        raise UserError(f"{problem}\nChoose another --out, or restore what it was made of.")
    text = json.dumps(digests.with_digest(identity), indent=2)
    write = functools.partial(files.replace_text, out / "encode.json", text)
    sharding.in_first_process(write, f"cannot write to {out}")


def _find_difference(out, identity, splits):
    """Returns how the directory's shards differ from an identity, in words; '' if they do not."""
    if not are_begun(out):
        return ""
    if saved := _read_claim(out / "encode.json"):
        return _compare(out, saved, identity)
    # encode.json is lost: every shard's own digest tells what it was made with.
    for path in (path for split in splits.values() for path in split if path.is_file()):
        if not _has_identity(path, identity):
            return f"{path} was made of other images, by another VAE or with other settings."
    return ""


def are_begun(out: pathlib.Path) -> bool:
    """Returns whether there is a shard: before the first one nothing can be mixed up."""
    return any(out.glob("moments-*.array_record-*-of-*[0-9]"))


def _identity_of_bytes(identity):
    """Returns the part of an identity that decides the shards' bytes.

    Images that 'dataset' identifies may be moved, so their name, 'source', is left out.
    """
    return {k: v for k, v in identity.items() if k != "source" or not identity.get("dataset")}


def _read_claim(path):
    """Returns the recorded identity; {} if the record is lost: each shard has a digest of it."""
    try:
        saved = json_files.read_json(path, "what the shards are made of") if path.is_file() else {}
        return digests.without_digest(saved, path)
    except ValueError as error:
        logger.warning("%s; it is written again.", error)
        return {}


def _compare(out, begun, identity):
    """Returns the differences in words; '' if there are none."""
    # A key that an older version did not record cannot be compared.
    unknown = [key for key in LATER_KEYS if key not in begun]
    if unknown:
        logger.warning(
            "%s has no record of its %s: see that it is as then.", out, " and ".join(unknown)
        )
    # Without a recorded dataset `_identity_of_bytes` keeps the images' name, which both must have.
    then, now = (
        flax.traverse_util.flatten_dict({k: v for k, v in d.items() if k not in unknown}, sep=".")
        for d in (_identity_of_bytes(begun), identity if unknown else _identity_of_bytes(identity))
    )
    differing = [
        f"\n  {key}: then {_shorten(then.get(key))}, now {_shorten(now.get(key))}"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    ]
    return f"{out} was begun in another way:{''.join(differing)}" if differing else ""


def _shorten(value):
    """Returns a value for a message; of a list, such as class names, only the beginning."""
    return (
        f"[{files.list_some([str(v) for v in value])}]" if isinstance(value, list) else repr(value)
    )


def find_missing(shards: Shards, threads: Executor) -> Shards:
    """Returns the shards that must be written, because they are missing or damaged.

    The threads read every existing shard and compare it with its checksum.
    """
    paths = [path for path in shards if path.is_file()]
    problems = dict(zip(paths, threads.map(_find_damage, paths), strict=True))
    for path, problem in problems.items():
        if problem:
            logger.warning("%s is written again: %s", path, problem)
    # Older versions recorded no checksums.
    unchecked = [p for p in paths if not problems[p] and "crc32" not in _read_sums(p)]
    if unchecked:
        logger.warning(
            "%d shards, such as %s, have no recorded checksum: only their sizes were compared.",
            len(unchecked),
            unchecked[0],
        )
    return {path: numbers for path, numbers in shards.items() if problems.get(path, "missing")}


def _find_damage(path):
    """Returns what is wrong with an existing shard; '' if it is as it was written."""
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
    """Writes the records of a shard and their sums; the shard gets its name when it is complete.

    Args:
      path: the shard's final name.
      batches: (moments [views * B, h, w, 2C], number of images that count, {feature: values [B] or
        more}).
      views: how many moments in a row belong to each image.
      identity: as for `claim`.
    Raises: ValueError for moments that are not finite; OSError if the shard cannot be written.
    """
    temporary, sums = path.with_name(path.name + ".tmp"), []
    try:
        # One record a group, so that random access reads no others.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for moments, count, values in batches:
            # A batch may be filled up: what lies beyond `count` images is left out.
            moments = np.asarray(moments)[: views * count]
            values = {name: np.asarray(array)[:count] for name, array in values.items()}
            _check_finite(path, moments, "moments")
            _check_finite(path, values.get("context", ()), "text encoder's outputs")
            for i, moment in enumerate(moments):
                # An image and its mirror have the same label and captions.
                annotations = {name: array[i // views] for name, array in values.items()}
                example = features.serialize_example({"moments": moment, **annotations})
                writer.write(_order_features(example))
            sums.append(_sum_moments(moments))
            bar.update(count)
        writer.close()
        # In this order a shard that has its name is on the disk, complete, and has its sums.
        files.flush_to_disk(temporary)
        _write_sums(path, temporary, sums, identity)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        # JaxRuntimeError is one too, but comes from the devices, not from the file.
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise UserFileError(
            f"cannot write {path}: {error}\nOther shards are complete. If space is what is missing "
            "there, free some; then run the same command."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_finite(path, array, name):
    if not np.isfinite(array).all():
        raise UserError(
            f"{name} in {path.name} are not finite in float16: is this VAE, or this text encoder, "
            "in this --dtype, for these images?"
        )


def _order_features(example):
    """Returns a record's bytes with its features in order: protobuf maps are unordered."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def _sum_moments(moments):
    """Returns sums over each record of moments [B, h, w, 2C], in f64, for the channels' statistics.

    'square' includes the posterior's variance, since x_0 is a sample of the posterior.
    """
    records, channels = len(moments), moments.shape[-1]
    moments = moments.astype(np.float64).reshape(records, -1, channels)
    mean, log_variance = np.split(moments, 2, axis=-1)  # [B, positions, C]
    variance = np.exp(np.clip(log_variance, codec.MIN_LOG_VARIANCE, codec.MAX_LOG_VARIANCE))
    return {
        "records": np.ones(records, int),
        "positions": np.full(records, mean.shape[1]),
        "mean": mean.sum(axis=1),
        "square": (mean**2 + variance).sum(axis=1),
        "absolute": np.abs(mean).sum(axis=(1, 2)),
    }


def _write_sums(path, shard, parts, identity):
    # Summed over all records at once, so that the batch size does not change the rounding.
    sums = {n: np.concatenate([part[n] for part in parts]).sum(axis=0).tolist() for n in parts[0]}
    sums |= {"bytes": shard.stat().st_size, "crc32": _compute_crc32(shard)}
    sums = digests.with_digest(
        sums | {"identity": digests.digest_json(_identity_of_bytes(identity))}
    )
    _sums_path(path).parent.mkdir(exist_ok=True)
    files.replace_text(_sums_path(path), json.dumps(sums))


def _sums_path(path):
    return path.parent / "sums" / f"{path.name}.json"


def _read_sums(path):
    """Reads the sums of a shard.

    Raises: OSError; ValueError if the sums are damaged.
    """
    sums_path = _sums_path(path)
    sums = json_files.read_json(sums_path, "the sums of a shard")
    if not (isinstance(sums, dict) and sums.keys() >= SUMS):
        raise UserError(f"{sums_path} lacks one of {', '.join(sorted(SUMS))}")
    return digests.without_digest(sums, sums_path)


def _has_identity(path, identity):
    """Returns whether a shard was made with this identity; True if its sums do not tell."""
    try:
        expected = digests.digest_json(_identity_of_bytes(identity))
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
    """Returns mean and deviation of each channel of posterior samples, as JSON lists.

    Also returns 'mean_absolute', the mean size of the posterior's means.
    """
    sums = [_read_sums(path) for path in shards]
    positions = sum(s["positions"] for s in sums)
    mean = np.sum([s["mean"] for s in sums], axis=0) / positions
    variance = np.sum([s["square"] for s in sums], axis=0) / positions - mean**2
    absolute = sum(s["absolute"] for s in sums) / (positions * len(mean))
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist(), "mean_absolute": absolute}


def write_metadata(
    out: pathlib.Path,
    splits: Mapping[str, Shards],
    features: tfds.features.FeaturesDict,
    metadata: dict,
) -> None:
    """Writes the metadata that make the shards a TFDS dataset."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name="moments", data_dir=out, filetype_suffix="array_record"
    )
    infos = []
    for name, paths in splits.items():
        sums = [_read_sums(path) for path in paths]
        infos.append(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[s["records"] for s in sums],
                num_bytes=sum(s["bytes"] for s in sums),
                filename_template=template.replace(split=name),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=features,
        split_infos=infos,
        filename_template=template,
        check_data=False,  # the check needs TensorFlow
        description="Moments of a VAE's posterior over images, unscaled.",
        metadata=tfds.core.MetadataDict(metadata),
    )
