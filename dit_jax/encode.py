"""Encoding of images to a TFDS dataset of VAE moments, shard by shard.

  python -m dit_jax.encode --config configs/imagenet256.py --vae runs/vae --out DIR

Reads the images of `config.data`: its train_split becomes 'train', its eval_split 'eval'. A record
holds:

  moments   [h, w, 2C] f16, mean and log-variance of the posterior, unscaled
  label     for a model with classes
  captions  K of them, with data.caption_feature
  context   [K, M, D] f16, the text encoder's outputs for the captions, with text.stored

With data.flip every image is followed by its mirror, because an image is flipped before the VAE
encodes it. A command that was killed can be run again on the same devices: it writes the missing
shards, and the result has the same bytes. Several processes share the shards.
"""

import sys

import numpy as np
from absl import flags

from dit_jax import cli
from dit_jax.latents import store

FLAGS = flags.FLAGS


def main(_):
    metadata = store.encode(
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
    cli.run(main, kept=lambda: store.describe_progress(FLAGS.out))
