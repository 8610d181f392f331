"""Encodes images to a TFDS dataset of VAE moments, shard by shard.

  python -m dit_jax.encode --config configs/imagenet256.py --vae runs/vae --out DIR

Reads the images of `config.data`: its train_split becomes 'train', its eval_split 'eval'. A record
holds:

  moments   [h, w, 2C] f16, mean and log-variance of the posterior, not scaled
  label     for a model with classes
  captions  [K], with data.caption_feature
  context   [K, M, D] f16, the text encoder's outputs for the captions, with text.stored

With data.flip every image is followed by its mirror image, because images must be flipped before
the VAE encodes them. A killed command can be run again on the same devices: it writes the missing
shards, and the dataset has the same bytes. Several processes share the work.
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
    mirrors = ", and their mirror images" if metadata["mirrored"] else ""
    print(f"{FLAGS.out}: {images}{mirrors}")
    print(f"mean {np.round(metadata['mean'], 4)}  std {np.round(metadata['std'], 4)}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("vae", None, "Workdir of the VAE, converted or trained.", required=True)
    cli.define_path("out", None, "Directory of the dataset.", required=True)
    flags.DEFINE_integer("shard_images", 1024, "Images per shard, the unit of work.", 1)
    flags.DEFINE_integer("batch_size", 32, "Images that are read at a time, per device.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of activations.")
    cli.run(main, kept=lambda: store.describe_progress(FLAGS.out))
