"""Images to a TFDS dataset of VAE moments, shard by shard.

  python -m dit_jax.encode --config configs/imagenet256.py --vae runs/vae --out DIR

Reads the images of `config.data`: its train_split becomes 'train', its eval_split 'eval'. A record
is `moments` [h, w, 2C] f16 (mean and log-variance of the posterior, unscaled); of a model with
classes `label`; with data.caption_feature `captions`, K of them, and with text.stored `context`
[K, M, D] f16, what the text encoder makes of them. With data.flip every image is followed by its
mirror, since the flip comes before the VAE. Killed and run again on the same devices, the command
goes on with the missing shards and ends with the same bytes. Several processes share the shards.
"""

import collections
import concurrent.futures
import importlib.metadata
import itertools
import json
import operator
import os
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from dit_jax import checkpoint, cli, conditions, files, latents, sharding, sources

FLAGS = flags.FLAGS
RECORD_FORMAT = 1  # raised when the same images and VAE would give other bytes
BATCHES_AHEAD = 3  # that threads read while the devices compute


def encode(
    config: ConfigDict,
    vae_workdir: pathlib.Path,
    out: pathlib.Path,
    shard_images: int = 1024,
    batch_size: int = 32,
    dtype: str = "float32",
    progress: bool = False,
) -> dict:
    """Writes the dataset to the directory `out`; returns the metadata that it records.

    Args:
      shard_images: images of a shard, the unit of work.   batch_size: images at a time, per device,
        rounded up to whole groups of `latents.images_at_once`, which alone the VAE takes together.
      dtype: of the VAE's activations.
    Raises: ValueError if the config's model has no classes or there is no train_split, if `out`
      cannot be made or was begun with other images, VAE or versions, or if the VAE's factor does
      not divide the image size; FileNotFoundError without a VAE; OSError if a shard cannot be
      written, or if another process failed.
    """
    mesh, vae, encoder, splits, identity = sharding.together(
        lambda: _open(config, vae_workdir, shard_images, dtype)
    )
    _claim(out, identity)
    features = _features(config, vae)
    shards = {
        name: _shards(out, name, len(source), shard_images) for name, source in splits.items()
    }
    # Else the images of a group, and with them the rounding, would depend on the batch.
    group = latents.images_at_once(config.data.image_size, config.data.image_size)
    batch_size = -(-batch_size // group) * group * mesh.size
    moments_of = _compile(vae, mesh, config.data.flip)
    context_of = encoder and _compile_encoder(encoder, mesh)

    def encoded(image, examples):
        """What the devices make of a batch, how many of it count, what is stored beside them."""
        told = {name: [e[name] for e in examples] for name in features if name in examples[0]}
        if encoder:
            tokens = np.stack([e["tokens"] for e in examples])
            told["context"] = context_of(np.resize(tokens, (len(image), *tokens.shape[1:])))
        return moments_of(image), len(examples), told

    def write_missing():
        with concurrent.futures.ThreadPoolExecutor(max(config.data.num_threads, 1)) as threads:
            for name, source in splits.items():
                mine = list(shards[name].items())[jax.process_index() :: jax.process_count()]
                missing = {path: numbers for path, numbers in mine if not path.is_file()}
                done = len(source) - sum(map(len, missing.values()))
                with tqdm(
                    total=len(source), initial=done, desc=name, unit="img", disable=not progress
                ) as bar:
                    batches = _batches(source, missing, batch_size, threads)
                    ready = _one_behind((path, *encoded(*batch)) for path, *batch in batches)
                    for path, of_shard in itertools.groupby(ready, key=operator.itemgetter(0)):
                        _write_shard(path, of_shard, 1 + config.data.flip, features, bar)

    sharding.together(write_missing)
    metadata = identity | _statistics(shards["train"])
    if jax.process_index() == 0:
        _write_metadata(out, shards, features, metadata)
    return metadata


def _open(config, vae_workdir, shard_images, dtype):
    """(mesh, VAE, text encoder, split -> images, all that decides the bytes); raises at once."""
    if "num_classes" not in config.model:
        raise ValueError(
            f"the config's model, a {config.model.name!r}, has no num_classes for the labels: "
            "give the config of what will train on the moments, such as configs/digits_latents.py."
        )
    splits = {"train": config.data.train_split, "eval": config.data.eval_split}
    if not splits["train"]:
        raise ValueError("data.train_split is empty: there is nothing to encode.")
    mesh = sharding.local_mesh()  # processes work on shards of their own
    vae = checkpoint.load_vae(vae_workdir, mesh, dtype)
    encoder = conditions.load_encoder(config, mesh, dtype) if config.text.stored else None
    if config.text.stored and not encoder:
        raise ValueError(
            f"text.stored needs model.condition='context' and text.encoder, the workdir of a text "
            f"encoder, not {config.model.condition!r}."
        )
    found = {n: sources.open_images(config, split) for n, split in splits.items() if split}
    shape = (mesh.size, config.data.image_size, config.data.image_size, config.data.image_channels)
    jax.eval_shape(latents.encode, vae, jax.ShapeDtypeStruct(shape, np.uint8))
    identity = {
        "record_format": RECORD_FORMAT,
        "vae_digest": vae.digest,
        "published": vae.published and list(vae.published),
        "source": {n: f"{config.data.name}: {split}" for n, split in splits.items() if split},
        "num_images": {name: len(source) for name, source in found.items()},
        "crop": "adm",
        "image_size": config.data.image_size,
        "mirrored": config.data.flip,
        "shard_images": shard_images,
        "dtype": dtype,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "pillow")},
    }
    if not config.model.num_classes:
        identity["labels"] = False
    if config.data.caption_feature:
        identity["captions"] = f"{config.data.caption_feature}: {config.data.captions_per_image}"
    if encoder:
        identity["text_encoder_digest"] = encoder.digest
    return mesh, vae, encoder, found, identity


def _claim(out, identity):
    """Makes the directory, or demands that what is in it was begun in the same way."""
    problem = ""
    if jax.process_index() == 0:
        path = out / "encode.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            begun = json.loads(path.read_text()) if path.is_file() else identity
            differing = [
                f"  {key}: then {begun.get(key)!r}, now {identity.get(key)!r}"
                for key in {**identity, **begun}
                if begun.get(key) != identity.get(key)
            ]
            if differing:
                problem = f"{out} was begun in another way:\n" + "\n".join(differing)
                problem += "\nChoose another --out, or restore these values."
            else:
                files.replace_text(path, json.dumps(identity, indent=2))
        except json.JSONDecodeError as error:
            problem = f"{path} is damaged: {error}. Choose another --out."
        except OSError as error:
            problem = f"cannot write to {out}: {error}"
    if problem := sharding.from_first_process(problem):
        raise ValueError(problem)


def _compile(vae, mesh, mirrored) -> Callable[[np.ndarray], jax.Array]:
    """moments_of(image [B, H, W, C] uint8) -> [B or 2B, h, w, 2C] f16, in the images' order."""
    rows = sharding.batch_sharding(mesh)

    def moments_of(vae, image):
        if mirrored:
            pairs = jnp.stack([image, image[:, :, ::-1]], axis=1)
            image = pairs.reshape(-1, *image.shape[1:])
        return latents.encode_in_groups(vae, image, mesh)

    jitted = jax.jit(moments_of, out_shardings=rows)
    return lambda image: jitted(vae, jax.device_put(image, rows))


def _compile_encoder(encoder, mesh) -> Callable[[np.ndarray], jax.Array]:
    """context_of(tokens [B, K, M] int32) -> [B, K, M, D] f16."""
    rows = sharding.batch_sharding(mesh)

    def context_of(encoder, tokens):
        context = encoder(tokens.reshape(-1, tokens.shape[-1]))
        return context.reshape(*tokens.shape, -1).astype(jnp.float16)

    jitted = jax.jit(context_of, out_shardings=rows)
    return lambda tokens: jitted(encoder, jax.device_put(tokens, rows))


def _features(config, vae):
    """What a record holds, in TFDS's terms."""
    size, count = config.data.image_size // vae.model.factor, config.data.captions_per_image

    def numbers(*shape):  # without bytes TFDS stores f32, twice the size and 40 times slower
        return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")

    features = {"moments": numbers(size, size, 2 * vae.model.latent_channels)}
    if config.model.num_classes:
        features["label"] = tfds.features.ClassLabel(num_classes=config.model.num_classes)
    if config.data.caption_feature:
        features["captions"] = tfds.features.Sequence(tfds.features.Text(), length=count)
    if config.text.stored:
        length = sources.tokenizer(config).length
        features["context"] = numbers(count, length, config.model.context_size)
    return tfds.features.FeaturesDict(features)


def _shards(out, name, num_images, shard_images):
    """Path -> the images of every shard of a split."""
    num_shards = -(-num_images // shard_images)
    starts = range(0, num_images, shard_images)
    return {
        out / f"moments-{name}.array_record-{i:05d}-of-{num_shards:05d}": range(
            start, min(start + shard_images, num_images)
        )
        for i, start in enumerate(starts)
    }


def _batches(source, shards, batch_size, threads):
    """(path, image [batch_size, H, W, C], examples of those that count); a shard's last one is
    filled up. Threads read BATCHES_AHEAD of what is asked for."""

    def read(i):
        captions = {"captions": source.captions(i)} if source.caption_feature else {}
        return source[i] | captions

    wanted = (
        (path, range(start, min(start + batch_size, numbers.stop)))
        for path, numbers in shards.items()
        for start in range(numbers.start, numbers.stop, batch_size)
    )
    reading = collections.deque()
    for path, numbers in itertools.chain(wanted, BATCHES_AHEAD * [(None, ())]):
        reading.append((path, [threads.submit(read, i) for i in numbers]))
        if len(reading) <= BATCHES_AHEAD:
            continue
        path, futures = reading.popleft()
        examples = [future.result() for future in futures]
        image = np.stack([example["image"] for example in examples])
        image = np.resize(image, (batch_size, *image.shape[1:]))
        yield path, image, examples


def _one_behind(items):
    """The items, each when the next has begun: devices compute while the host writes."""
    previous = None
    for item in items:
        if previous is not None:
            yield previous
        previous = item
    if previous is not None:
        yield previous


def _write_shard(path, batches, views, features, bar):
    """The records of a shard, and their sums; the shard bears its name when all is written.

    Args: batches of (path, moments, the number of images, {name: what is told of each}), `views`
      moments in a row of every image.
    """
    temporary, sums = path.with_name(path.name + ".tmp"), []
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for _, moments, count, told in batches:
            moments = np.asarray(moments)[: views * count]
            told = {name: np.asarray(values)[:count] for name, values in told.items()}
            context = told.get("context", np.zeros(0))
            for what, found in (("moments", moments), ("text encoder's outputs", context)):
                if not np.isfinite(found).all():
                    raise ValueError(
                        f"{what} in {path.name} are not finite in float16: is this VAE, or this "
                        "text encoder, in this --dtype, for these images?"
                    )
            for i, moment in enumerate(moments):
                of_image = {name: values[i // views] for name, values in told.items()}
                example = features.serialize_example({"moments": moment, **of_image})
                writer.write(_deterministic(example))
            sums.append(_sums(moments))
            bar.update(count)
        writer.close()
        # Of all records at once: batches must not decide in which order they are added.
        totals = {n: np.concatenate([s[n] for s in sums]).sum(axis=0).tolist() for n in sums[0]}
        totals["bytes"] = temporary.stat().st_size
        _sums_path(path).parent.mkdir(exist_ok=True)
        files.replace_text(_sums_path(path), json.dumps(totals))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is array_record's
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise OSError(
            f"cannot write {path}: {error}\nOther shards are complete. If space is what is missing "
            "there, free some; then run the same command."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _deterministic(example):
    """The bytes of a record with its features in order: Protocol Buffers' maps have none."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def _sums(moments):
    """Of each of the moments [B, h, w, 2C], in f64: what the deviation of a channel comes from."""
    records, channels = len(moments), moments.shape[-1]
    moments = moments.astype(np.float64).reshape(records, -1, channels)
    mean, log_variance = np.split(moments, 2, axis=-1)  # [B, positions, C]
    variance = np.exp(np.clip(log_variance, latents.MIN_LOG_VARIANCE, latents.MAX_LOG_VARIANCE))
    return {
        "records": np.ones(records, int),
        "positions": np.full(records, mean.shape[1]),
        "mean": mean.sum(axis=1),
        "square": (mean**2 + variance).sum(axis=1),
        "absolute": np.abs(mean).sum(axis=(1, 2)),
    }


def _sums_path(path):
    return path.parent / "sums" / f"{path.name}.json"


def _read_sums(path):
    return json.loads(_sums_path(path).read_text())


def _statistics(shards):
    """Mean and deviation of each latent channel, of samples of the posterior."""
    sums = [_read_sums(path) for path in shards]
    positions = sum(s["positions"] for s in sums)
    mean = np.sum([s["mean"] for s in sums], axis=0) / positions
    variance = np.sum([s["square"] for s in sums], axis=0) / positions - mean**2
    absolute = sum(s["absolute"] for s in sums) / (positions * len(mean))
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist(), "mean_absolute": absolute}


def _write_metadata(out, shards, features, metadata):
    """What makes the shards a TFDS dataset."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name="moments", data_dir=out, filetype_suffix="array_record"
    )
    splits = []
    for name, paths in shards.items():
        sums = [_read_sums(path) for path in paths]
        for path, expected in zip(paths, sums, strict=True):
            if path.stat().st_size != expected["bytes"]:
                raise OSError(
                    f"{path} has {path.stat().st_size} bytes, but was written with "
                    f"{expected['bytes']}: remove it, then run the same command."
                )
        splits.append(
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
        split_infos=splits,
        filename_template=template,
        check_data=False,  # that needs TensorFlow
        description="Moments of a VAE's posterior over images, unscaled.",
        metadata=tfds.core.MetadataDict(metadata),
    )


def main(_):
    metadata = encode(
        FLAGS.config,
        FLAGS.vae,
        FLAGS.out,
        FLAGS.shard_images,
        FLAGS.batch_size,
        FLAGS.dtype,
        progress=sys.stderr.isatty(),
    )
    images = ", ".join(f"{count} of {name}" for name, count in metadata["num_images"].items())
    print(f"{FLAGS.out}: {images}{', and their mirrors' * metadata['mirrored']}")
    print(f"mean {np.round(metadata['mean'], 4)}  std {np.round(metadata['std'], 4)}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("vae", None, "Workdir of the VAE, converted or trained.", required=True)
    cli.define_path("out", None, "Directory of the dataset.", required=True)
    flags.DEFINE_integer("shard_images", 1024, "Images per shard, the unit of work.", 1)
    flags.DEFINE_integer("batch_size", 32, "Images that are read at a time, per device.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the VAE's activations.")
    cli.run(main, kept=lambda: f"the shards that are complete are kept in {FLAGS.out}")
