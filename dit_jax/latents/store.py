"""Encodes images to a dataset of moments, shard by shard, so that a killed command resumes."""

import collections
import concurrent.futures
import functools
import importlib.metadata
import itertools
import math
import operator
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from tqdm import tqdm

from dit_jax import conditions, sharding
from dit_jax.config import sizes
from dit_jax.data import folders, pixels
from dit_jax.errors import UserError
from dit_jax.latents import codec, loading, shards
from dit_jax.system import files, locks, stopping
from dit_jax.workdirs import identity

LOCK = "encode.lock"  # in the dataset's directory
RECORD_FORMAT = 1  # increases when the same images and VAE give other bytes
BATCHES_AHEAD = 3  # batches that threads read while the devices compute


def encode(
    config: ConfigDict,
    vae_workdir: pathlib.Path,
    out: pathlib.Path,
    shard_images: int = 1024,
    batch_size: int = 32,
    dtype: str = "float32",
    progress: bool = False,
) -> dict:
    """Writes the dataset to the directory `out`; returns its metadata.

    Args:
      shard_images: images in a shard, the unit of work.
      batch_size: images that are read together per device, rounded up to whole groups of the VAE.
      dtype: of the activations of VAE and text encoder.
    Raises: ValueError if the config cannot be encoded, if `out` was begun with other images, VAE or
      versions, or if the VAE does not take the images; FileNotFoundError without a VAE; OSError if
      a shard cannot be written, or if another process failed.
    """
    folders.check_output_outside_data(config, out)
    files.check_utf8(out)
    # If one process cannot open its inputs, all raise: otherwise they would wait for it.
    mesh, vae, encoder, images, provenance = sharding.in_every_process(
        lambda: _open(config, vae_workdir, shard_images, dtype)
    )
    # Only one command at a time writes the dataset.
    with locks.hold(out / LOCK) as lock:
        splits = {
            name: shards.list_shards(out, name, len(source), shard_images)
            for name, source in images.items()
        }
        # Shards of other images or of another VAE are refused.
        shards.claim(out, provenance, splits)
        features = _describe_features(config, vae)
        batch_size = mesh.size * _round_to_groups(batch_size, config)
        views = 2 if config.data.flip else 1
        encode_batch = _compile_batch(vae, encoder, mesh, config.data.flip, features)

        def write_missing(threads):
            for name, source in images.items():
                # Process i of n writes the shards i, i + n, i + 2n, ...
                own = list(splits[name].items())[jax.process_index() :: jax.process_count()]
                missing = shards.find_missing(dict(own), threads)
                encoded = _encode_shards(source, missing, batch_size, encode_batch, threads)
                with _make_bar(name, source, missing, progress) as bar:
                    for path, batches in encoded:
                        lock.check()  # nothing is written if the directory was moved
                        shards.write_shard(path, batches, views, features, provenance, bar)

        # The message of an error then says which shards are kept.
        with (
            stopping.attach_kept_message(lambda: describe_progress(out)),
            concurrent.futures.ThreadPoolExecutor(max(config.data.num_threads, 1)) as threads,
        ):
            sharding.in_every_process(functools.partial(write_missing, threads))
        # All processes have written their shards, so all sums can be read.
        metadata = provenance | shards.compute_statistics(splits["train"])
        if jax.process_index() == 0:
            shards.write_metadata(out, splits, features, metadata)
    return metadata


def _open(config, vae_workdir, shard_images, dtype):
    """Opens the inputs: (mesh, VAE, text encoder or None, {split: source}, provenance).

    The provenance is a JSON object with everything that determines the shards' bytes.
    """
    if "num_classes" not in config.model:
        raise UserError(
            f"the config's model, a {config.model.name!r}, has no num_classes for the labels. "
            "Give the config of a model for the moments, such as configs/digits_latents.py."
        )
    splits = {"train": config.data.train_split, "eval": config.data.eval_split}
    if not splits["train"]:
        raise UserError("data.train_split is empty: there is nothing to encode.")
    mesh = sharding.local_mesh()  # each process encodes shards of its own
    vae, condition = loading.load_vae(vae_workdir, mesh, dtype), conditions.build(config)
    encoder = condition.load_encoder(mesh, dtype) if config.text.stored else None
    if config.text.stored and not encoder:
        raise UserError(
            f"text.stored needs model.condition='context', not {config.model.condition!r}, and "
            "text.encoder, the workdir of a text encoder."
        )
    condition.check_storable()
    splits = {name: split for name, split in splits.items() if split}  # without an empty 'eval'
    images = {name: conditions.open_images(config, split) for name, split in splits.items()}
    vae.model.latent_shape(sizes.image_shape(config.data))  # raises unless the images fit
    provenance = {
        "record_format": RECORD_FORMAT,
        "vae_digest": vae.digest,
        "published": list(vae.published) if vae.published else None,
        "source": {name: f"{config.data.name}: {split}" for name, split in splits.items()},
        "num_images": {name: len(source) for name, source in images.items()},
        "dataset": {name: _identify(source) for name, source in images.items()},
        "crop": "adm",
        "image_size": sizes.to_json(config.data.image_size),
        "mirrored": config.data.flip,
        "shard_images": shard_images,
        "dtype": dtype,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "pillow")},
    }
    if not config.model.num_classes:
        provenance["labels"] = False
    if config.data.caption_feature:
        provenance["captions"] = f"{config.data.caption_feature}: {config.data.captions_per_image}"
    if encoder:
        provenance["text_encoder_digest"] = encoder.digest
    return mesh, vae, encoder, images, provenance


def _identify(source):
    """Returns the identity of images without the files' times, which do not change moments."""
    return {key: value for key, value in identity.identify(source).items() if key != "times"}


def _round_to_groups(batch_size, config):
    """Rounds a batch size up to a multiple of the group that the VAE takes together."""
    # In a smaller group the floats round differently, so moments would depend on the batch size.
    group_size = codec.images_at_once(sizes.image_shape(config.data))
    return math.ceil(batch_size / group_size) * group_size


def _compile_batch(vae, encoder, mesh, mirrored, features) -> Callable:
    """Returns the function (image [B, H, W, C], examples) -> (moments, count, annotations).

    moments: [B or 2B, h, w, 2C] f16 on the devices; each image is followed by its mirror image.
    count: the number of examples; the images after them only fill up the batch.
    annotations: {feature: values} of the examples.
    """
    batch_sharding = sharding.batch_sharding(mesh)

    def compile_sharded(function, network):
        jitted = jax.jit(function, out_shardings=batch_sharding)
        return lambda array: jitted(network, jax.device_put(array, batch_sharding))

    def encode_images(vae, image):  # [B, H, W, C] uint8
        if mirrored:
            pairs = jnp.stack([image, pixels.mirror(image)], axis=1)
            image = pairs.reshape(-1, *image.shape[1:])
        return codec.encode_in_groups(vae, image, mesh)

    def encode_tokens(encoder, tokens):  # [B, K, M] int32 -> [B, K, M, D] f16
        context = encoder(tokens.reshape(-1, tokens.shape[-1]))
        return context.reshape(*tokens.shape, -1).astype(jnp.float16)

    encode_images = compile_sharded(encode_images, vae)
    encode_tokens = compile_sharded(encode_tokens, encoder)

    def encode_batch(image, examples):
        names = [name for name in features if name in examples[0]]
        annotations = {name: [example[name] for example in examples] for name in names}
        if encoder:
            tokens = np.stack([example["tokens"] for example in examples])
            # The compiled function takes full batches only, so repeats of the tokens fill it up.
            tokens = np.resize(tokens, (len(image), *tokens.shape[1:]))
            annotations["context"] = encode_tokens(tokens)
        return encode_images(image), len(examples), annotations

    return encode_batch


def _describe_features(config, vae):
    """Returns the TFDS description of a record's features."""
    num_captions = config.data.captions_per_image
    *size, channels = vae.model.latent_shape(sizes.image_shape(config.data))

    def make_tensor(*shape):
        # Without encoding="bytes" TFDS stores f32, which takes twice the space and 40 times longer.
        return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")

    features = {"moments": make_tensor(*size, 2 * channels)}
    if config.model.num_classes:
        features["label"] = tfds.features.ClassLabel(num_classes=config.model.num_classes)
    if config.data.caption_feature:
        features["captions"] = tfds.features.Sequence(tfds.features.Text(), length=num_captions)
    if config.text.stored:
        length = conditions.build(config).make_tokenizer().length
        features["context"] = make_tensor(num_captions, length, config.model.context_size)
    return tfds.features.FeaturesDict(features)


def _make_bar(name, source, missing, shown):
    """Returns the progress bar of a split; it begins with the images in finished shards."""
    num_done = len(source) - sum(map(len, missing.values()))
    return tqdm(total=len(source), initial=num_done, desc=name, unit="img", disable=not shown)


def _encode_shards(source, missing, batch_size, encode_batch, threads):
    """Encodes the missing shards: yields (path, batches) for `shards.write_shard`."""
    examples = _read_batches(source, missing, batch_size, threads)
    encoded = ((path, encode_batch(*batch)) for path, *batch in examples)
    # The devices encode a batch while the host writes the previous batch.
    for path, shard in itertools.groupby(_run_ahead(encoded, 1), key=operator.itemgetter(0)):
        yield path, (batch for _, batch in shard)


def _read_batches(source, missing, batch_size, threads):
    """Reads the missing shards: yields (path, image [batch_size, H, W, C], examples).

    In a shard's last batch repeated images follow those of the examples.
    """

    def read(index):
        has_captions = source.annotations.caption_feature
        return source[index] | ({"captions": source.captions(index)} if has_captions else {})

    reading = (
        (path, [threads.submit(read, i) for i in indices[start : start + batch_size]])
        for path, indices in missing.items()
        for start in range(0, len(indices), batch_size)
    )
    for path, futures in _run_ahead(reading, BATCHES_AHEAD):
        examples = [future.result() for future in futures]
        image = np.stack([example["image"] for example in examples])
        # The compiled function takes full batches only, so repeats of the images fill it up.
        yield path, np.resize(image, (batch_size, *image.shape[1:])), examples


def _run_ahead(items, count):
    """Yields the items of an iterator that runs `count` items ahead."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def describe_progress(out: pathlib.Path) -> str:
    """Returns which part of the dataset is kept, for a message."""
    if shards.are_begun(out):
        kept = f"the shards that are complete are kept in {out}"
        return f"{kept}; they go with the images that this began with"
    return "no shard is complete yet"
