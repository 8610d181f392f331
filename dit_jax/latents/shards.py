"""The shards of a dataset of moments: written whole, checked when they are there, made a dataset.

Beside each shard, in sums/, lie its checksum, a digest of what it was made of, and the sums that
the channels' mean and deviation come from. `encode.json` holds what all shards are made of.
"""

import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from dit_jax import sharding
from dit_jax.data import manifest
from dit_jax.errors import UserError, UserFileError
from dit_jax.latents import codec
from dit_jax.system import files, json_files

logger = logging.getLogger("dit_jax")

LATER_KEYS = ("dataset",)  # of encode.json, which older versions did not record
# What is kept of every shard beside it; newer versions add checksums.
SUMS = {"records", "positions", "mean", "square", "absolute", "bytes"}

Shards = Mapping[pathlib.Path, range]  # path -> the images in it, by number


def list_shards(out: pathlib.Path, split: str, num_images: int, shard_images: int) -> Shards:
    """The shards of a split of `num_images`, with `shard_images` in each but the last."""
    num_shards = -(-num_images // shard_images)
    starts = range(0, num_images, shard_images)
    return {
        out / f"moments-{split}.array_record-{i:05d}-of-{num_shards:05d}": range(
            start, min(start + shard_images, num_images)
        )
        for i, start in enumerate(starts)
    }


def claim(out: pathlib.Path, identity: dict, splits: Mapping[str, Shards]) -> None:
    """Demands that what the directory holds is made of the same, and records what that is.

    Args: identity, JSON of all that decides the bytes: images, VAE, settings, versions.
    Raises: ValueError that lists what differs, in all processes; OSError if it cannot be written.
    """
    path, problem = out / "encode.json", ""
    if jax.process_index() == 0 and are_begun(out):
        if begun := _read_claim(path):
            problem = _compare(out, begun, identity)
        else:
            shards = (shard for split in splits.values() for shard in split if shard.is_file())
            if other := next((shard for shard in shards if not _is_made_of(shard, identity)), None):
                problem = (
                    f"{other} was made of other images, by another VAE or with other settings."
                )
        if problem:
            problem += "\nChoose another --out, or restore what it was made of."
    if problem := sharding.from_first_process(problem):
        raise UserError(problem)
    text = json.dumps(manifest.with_digest(identity), indent=2)
    sharding.in_first_process(lambda: files.replace_text(path, text), f"cannot write to {out}")


def are_begun(out: pathlib.Path) -> bool:
    """Whether there is a shard: before the first nothing can be mixed up."""
    return any(out.glob("moments-*.array_record-*-of-*[0-9]"))


def _made_of(identity):
    """What decides the bytes of the shards: not the name of the images, which may be moved."""
    return {k: v for k, v in identity.items() if k != "source" or not identity.get("dataset")}


def _read_claim(path):
    """What the directory was begun with; {} if that is lost, since every shard knows it too."""
    try:
        begun = json_files.read_json(path, "what the shards are made of") if path.is_file() else {}
        return manifest.without_digest(begun, path)
    except ValueError as error:
        logger.warning("%s; it is written again.", error)
        return {}


def _compare(out, begun, identity):
    """The differences in words; '' if there are none."""
    unknown = [key for key in LATER_KEYS if key not in begun]
    if unknown:
        logger.warning(
            "%s has no record of its %s: see that it is as then.", out, " and ".join(unknown)
        )
    then, now = (
        _flatten({k: v for k, v in d.items() if k not in unknown})
        for d in (_made_of(begun), identity if unknown else _made_of(identity))
    )
    differing = [
        f"\n  {key}: then {_shorten(then.get(key))}, now {_shorten(now.get(key))}"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    ]
    return f"{out} was begun in another way:{''.join(differing)}" if differing else ""


def _flatten(value, prefix=""):
    """{'dataset.train.files': value} of nested objects; lists are values."""
    if not isinstance(value, dict):
        return {prefix: value}
    inner = (_flatten(v, f"{prefix}.{key}".strip(".")) for key, v in value.items())
    return {key: v for flat in inner for key, v in flat.items()}


def _shorten(value):
    """The value as a message shows it; of a long list, the names of many classes, its beginning."""
    return f"[{files.list_some(value)}]" if isinstance(value, list) else repr(value)


def find_missing(shards: Shards, threads: Executor) -> Shards:
    """The shards that are still to be written, or again because they are damaged.

    Every shard that is there is read, by the threads, and compared with its checksum.
    """
    paths = [path for path in shards if path.is_file()]
    problems = dict(zip(paths, threads.map(_find_damage, paths), strict=True))
    for path, problem in problems.items():
        if problem:
            logger.warning("%s is written again: %s", path, problem)
    unchecked = [p for p in paths if not problems[p] and "crc32" not in _read_sums(p)]
    if unchecked:
        logger.warning(
            "%d shards, such as %s, have no recorded checksum: only their sizes were compared.",
            len(unchecked),
            unchecked[0],
        )
    return {path: numbers for path, numbers in shards.items() if problems.get(path, "missing")}


def _find_damage(path):
    """What is wrong with a shard that is there; '' if it is as it was written."""
    try:
        sums = _read_sums(path)
    except (OSError, ValueError) as error:
        return str(error)
    if path.stat().st_size != sums["bytes"]:
        return f"it has {path.stat().st_size} bytes, not {sums['bytes']}"
    if "crc32" in sums and _crc32(path) != sums["crc32"]:
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
    """Writes the records of a shard and their sums; the shard bears its name when all is written.

    Args:
      batches: (path, moments [views * B, h, w, 2C], number of images that count, {feature: values
        [B] or more}).   views: moments in a row of every image.
    Raises: ValueError for moments that are not finite; OSError if the shard cannot be written.
    """
    temporary, sums = path.with_name(path.name + ".tmp"), []
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for _, moments, count, values in batches:
            moments = np.asarray(moments)[: views * count]
            values = {name: np.asarray(array)[:count] for name, array in values.items()}
            _check_finite(path, moments, "moments")
            _check_finite(path, values.get("context", np.zeros(0)), "text encoder's outputs")
            for i, moment in enumerate(moments):
                beside = {name: array[i // views] for name, array in values.items()}
                example = features.serialize_example({"moments": moment, **beside})
                writer.write(_deterministic(example))
            sums.append(_sum_moments(moments))
            bar.update(count)
        writer.close()
        files.flush_to_disk(temporary)
        _write_sums(path, temporary, sums, identity)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is array_record's
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


def _deterministic(example):
    """The bytes of a record with its features in order: Protocol Buffers' maps have none."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def _sum_moments(moments):
    """Of each of the moments [B, h, w, 2C], in f64: what the deviation of a channel comes from."""
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
    # Of all records at once: batches must not decide in which order they are added.
    sums = {n: np.concatenate([part[n] for part in parts]).sum(axis=0).tolist() for n in parts[0]}
    sums |= {"bytes": shard.stat().st_size, "crc32": _crc32(shard)}
    sums = manifest.with_digest(sums | {"identity": manifest.digest(_made_of(identity))})
    _sums_path(path).parent.mkdir(exist_ok=True)
    files.replace_text(_sums_path(path), json.dumps(sums))


def _sums_path(path):
    return path.parent / "sums" / f"{path.name}.json"


def _read_sums(path):
    """The sums of a shard.   Raises: OSError; ValueError if they are damaged."""
    sums_path = _sums_path(path)
    sums = json_files.read_json(sums_path, "the sums of a shard")
    if not (isinstance(sums, dict) and sums.keys() >= SUMS):
        raise UserError(f"{sums_path} lacks one of {', '.join(sorted(SUMS))}")
    return manifest.without_digest(sums, sums_path)


def _is_made_of(path, identity):
    """Whether a shard is made of this, as far as its sums record it and can be read."""
    try:
        wanted = manifest.digest(_made_of(identity))
        return _read_sums(path).get("identity", wanted) == wanted
    except (OSError, ValueError):
        return True  # it is written again


def _crc32(path):
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def compute_statistics(shards: Shards) -> dict:
    """Mean and deviation of each latent channel, of samples of the posterior, as JSON lists."""
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
    """Writes what makes the shards a TFDS dataset."""
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
        check_data=False,  # that needs TensorFlow
        description="Moments of a VAE's posterior over images, unscaled.",
        metadata=tfds.core.MetadataDict(metadata),
    )
