"""A dataset of moments: images encoded by a VAE, shard by shard, so that a killed run resumes."""

import collections
import concurrent.futures
import functools
import importlib.metadata
import itertools
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
from dit_jax.data import folders
from dit_jax.errors import UserError
from dit_jax.latents import codec, loading, shards
from dit_jax.system import files, locks, stopping
from dit_jax.workdirs import identity

LOCK = "encode.lock"  # in the dataset's directory
RECORD_FORMAT = 1  # raised when the same images and VAE give other bytes
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
    """Writes the dataset to the directory `out`; returns the metadata that it records.

    Args:
      shard_images: images of a shard, the unit of work.
      batch_size: images at a time per device, rounded up to a multiple of
        `codec.images_at_once`. The VAE takes no more than that number together.
      dtype: of the VAE's activations.
    Raises: ValueError if the config cannot be encoded, if `out` cannot be made or was begun with
      other images, VAE or versions, or if the VAE does not take images of this size;
      FileNotFoundError without a VAE; OSError if a shard cannot be written, or if another process
      failed.
    """
    folders.check_output_outside_data(config, out)
    files.check_utf8(out)
    # If a process cannot open its inputs, all raise, so that none waits for it.
    mesh, vae, encoder, images, provenance = sharding.in_every_process(
        lambda: _open(config, vae_workdir, shard_images, dtype)
    )
    # One command at a time writes the dataset, and it refuses shards that were made otherwise.
    with locks.hold(out / LOCK) as lock:
        splits = {n: shards.list_shards(out, n, len(s), shard_images) for n, s in images.items()}
        shards.claim(out, provenance, splits)
        features = _describe_features(config, vae)
        batch_size = mesh.size * _round_to_groups(batch_size, config)
        views = 1 + config.data.flip
        encode_batch = _compile_batch(vae, encoder, mesh, config.data.flip, features)

        def write_missing(threads):
            for name, source in images.items():
                # The processes share the shards in turn.
                mine = list(splits[name].items())[jax.process_index() :: jax.process_count()]
                missing = shards.find_missing(dict(mine), threads)
                encoded = _encode_shards(source, missing, batch_size, encode_batch, threads)
                with _make_bar(name, source, missing, progress) as bar:
                    for path, batches in encoded:
                        lock.check()  # nothing is written if the directory was moved
                        shards.write_shard(path, batches, views, features, provenance, bar)

        # An error then tells which shards are kept.
        same_images = "they go with the images that this began with"
        with (
            stopping.attach_kept_message(lambda: f"{describe_progress(out)}; {same_images}"),
            concurrent.futures.ThreadPoolExecutor(max(config.data.num_threads, 1)) as threads,
        ):
            sharding.in_every_process(functools.partial(write_missing, threads))
        # All processes have written their shards, so the sums of all can be read.
        metadata = provenance | shards.compute_statistics(splits["train"])
        if jax.process_index() == 0:
            shards.write_metadata(out, splits, features, metadata)
    return metadata


def _open(config, vae_workdir, shard_images, dtype):
    """Returns (mesh, VAE, text encoder, {split: images}, provenance) before any work is done.

    The provenance is JSON of all that decides the bytes.
    """
    if "num_classes" not in config.model:
        raise UserError(
            f"the config's model, a {config.model.name!r}, has no num_classes for the labels: "
            "give the config of what will train on the moments, such as configs/digits_latents.py."
        )
    splits = {"train": config.data.train_split, "eval": config.data.eval_split}
    if not splits["train"]:
        raise UserError("data.train_split is empty: there is nothing to encode.")
    mesh = sharding.local_mesh()  # each process encodes shards of its own
    vae, condition = loading.load_vae(vae_workdir, mesh, dtype), conditions.build(config)
    encoder = condition.load_encoder(mesh, dtype) if config.text.stored else None
    if config.text.stored and not encoder:
        raise UserError(
            f"text.stored needs model.condition='context' and text.encoder, the workdir of a text "
            f"encoder, not {config.model.condition!r}."
        )
    condition.check_storable()
    images = {n: conditions.open_images(config, split) for n, split in splits.items() if split}
    # Traced only: it raises if the VAE does not take images of this shape.
    shape = (mesh.size, *sizes.image_shape(config.data))
    jax.eval_shape(codec.encode, vae, jax.ShapeDtypeStruct(shape, np.uint8))
    provenance = {
        "record_format": RECORD_FORMAT,
        "vae_digest": vae.digest,
        "published": vae.published and list(vae.published),
        "source": {n: f"{config.data.name}: {split}" for n, split in splits.items() if split},
        "num_images": {name: len(source) for name, source in images.items()},
        "dataset": {name: _identify(source) for name, source in images.items()},
        "crop": "adm",
        "image_size": sizes.to_json(config.data.image_size),
        "mirrored": config.data.flip,
        "shard_images": shard_images,
        "dtype": dtype,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "pillow")},
    }
    if not config.model.num_classes:
        provenance["labels"] = False
    if config.data.caption_feature:
        provenance["captions"] = f"{config.data.caption_feature}: {config.data.captions_per_image}"
    if encoder:
        provenance["text_encoder_digest"] = encoder.digest
    return mesh, vae, encoder, images, provenance


def _identify(source):
    """Returns the identity of images without file times: equal bytes give equal moments."""
    return {key: v for key, v in identity.identify(source).items() if key != "times"}


def _round_to_groups(batch_size, config):
    """Rounds a batch up to whole groups of the images that the VAE takes together."""
    # A smaller group would change the rounding, so the moments would depend on the batch.
    group = codec.images_at_once(*sizes.height_and_width(config.data.image_size))
    return -(-batch_size // group) * group


def _compile_batch(vae, encoder, mesh, mirrored, features) -> Callable:
    """Returns `encode_batch(image, examples)`, which returns (moments, count, stored).

    moments [B or 2B, h, w, 2C] f16 are on the devices, those of each image before those of its
    mirror. count is the number of examples: images beyond it only fill up the batch. stored is
    {feature: values} of the records' other features, in the examples' order.
    """
    rows = sharding.batch_sharding(mesh)

    def compile_sharded(function, network):
        jitted = jax.jit(function, out_shardings=rows)
        return lambda array: jitted(network, jax.device_put(array, rows))

    def encode_images(vae, image):  # [B, H, W, C] uint8
        if mirrored:
            pairs = jnp.stack([image, image[:, :, ::-1]], axis=1)
            image = pairs.reshape(-1, *image.shape[1:])
        return codec.encode_in_groups(vae, image, mesh)

    def encode_tokens(encoder, tokens):  # [B, K, M] int32 -> [B, K, M, D] f16
        context = encoder(tokens.reshape(-1, tokens.shape[-1]))
        return context.reshape(*tokens.shape, -1).astype(jnp.float16)

    encode_images = compile_sharded(encode_images, vae)
    encode_tokens = compile_sharded(encode_tokens, encoder)

    def encode_batch(image, examples):
        stored = {name: [e[name] for e in examples] for name in features if name in examples[0]}
        if encoder:
            tokens = np.stack([e["tokens"] for e in examples])
            # Filled up like the images, because the compiled function takes whole batches.
            stored["context"] = encode_tokens(np.resize(tokens, (len(image), *tokens.shape[1:])))
        return encode_images(image), len(examples), stored

    return encode_batch


def _describe_features(config, vae):
    """Returns the features of a record, as TFDS describes them."""
    count = config.data.captions_per_image
    size = (side // vae.model.factor for side in sizes.height_and_width(config.data.image_size))

    def numbers(*shape):
        # Without encoding="bytes" TFDS stores f32, twice the size and 40 times slower.
        return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")

    features = {"moments": numbers(*size, 2 * vae.model.latent_channels)}
    if config.model.num_classes:
        features["label"] = tfds.features.ClassLabel(num_classes=config.model.num_classes)
    if config.data.caption_feature:
        features["captions"] = tfds.features.Sequence(tfds.features.Text(), length=count)
    if config.text.stored:
        length = conditions.build(config).make_tokenizer().length
        features["context"] = numbers(count, length, config.model.context_size)
    return tfds.features.FeaturesDict(features)


def _make_bar(name, source, missing, shown):
    """Returns the progress bar of a split, of which the shards that are not missing are done."""
    done = len(source) - sum(map(len, missing.values()))
    return tqdm(total=len(source), initial=done, desc=name, unit="img", disable=not shown)


def _encode_shards(source, missing, batch_size, encode_batch, threads):
    """Yields (path, batches) of the missing shards, as `shards.write_shard` takes them."""
    batches = _read_batches(source, missing, batch_size, threads)
    encoded = ((path, encode_batch(*batch)) for path, *batch in batches)
    # The devices encode a batch while the host writes the one before.
    for path, shard in itertools.groupby(_run_ahead(encoded, 1), key=operator.itemgetter(0)):
        yield path, (batch for _, batch in shard)


def _read_batches(source, missing, batch_size, threads):
    """Yields (path, image [batch_size, H, W, C], examples) of the missing shards.

    A shard's last batch repeats images to be full; `examples` has only the ones that count.
    """

    def read(i):
        captions = {"captions": source.captions(i)} if source.annotations.caption_feature else {}
        return source[i] | captions

    reading = (
        (path, [threads.submit(read, i) for i in numbers[start : start + batch_size]])
        for path, numbers in missing.items()
        for start in range(0, len(numbers), batch_size)
    )
    for path, futures in _run_ahead(reading, BATCHES_AHEAD):
        examples = [future.result() for future in futures]
        image = np.stack([example["image"] for example in examples])
        # The compiled function takes full batches only.
        yield path, np.resize(image, (batch_size, *image.shape[1:])), examples


def _run_ahead(items, count):
    """Yields the items, each after the next `count` were begun."""
    begun = collections.deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


def describe_progress(out):
    """Returns what is kept of the dataset, in words for a message."""
    if shards.are_begun(out):
        return f"the shards that are complete are kept in {out}"
    return "no shard is complete yet"
