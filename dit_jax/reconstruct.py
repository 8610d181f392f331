"""Encodes and decodes images with a VAE: PSNR, L1 and KL, and a picture of images in pairs.

  python -m dit_jax.reconstruct --config configs/imagenet256.py --vae runs/vae --num 5000

The images are the first of the config's eval_split, or of its train_split if that is empty.
"""

import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from dit_jax import cli, conditions, latents, sharding
from dit_jax.data import loader
from dit_jax.diffusion import objectives
from dit_jax.sampling import pictures
from dit_jax.system import files

FLAGS = flags.FLAGS
MAX_PAIRS = 16  # in the picture


def reconstruct(
    config: ConfigDict,
    vae_workdir: pathlib.Path,
    num: int,
    batch_size: int = 8,
    dtype: str = "float32",
    progress: bool = False,
) -> tuple[dict[str, float], np.ndarray]:
    """Reconstructs `num` images, or all of a smaller split, from the posterior's mean.

    Args:
      batch_size: images at a time, per device.
      dtype: of the VAE's activations.
    Returns: ({'num_images', and means over the images: 'psnr' in dB, 'l1' of pixels in [-1, 1],
      'kl' in nats per image}, picture [height, width, 3] uint8). The picture has the first images,
      each beside its reconstruction.
    Raises: ValueError if the VAE does not take the images.
    """
    # The config's mesh is for training. Here each device takes its own images.
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)))
    vae = latents.load_vae(vae_workdir, mesh, dtype)
    split = config.data.eval_split or config.data.train_split
    source = conditions.open_images(config, split, labels=False)
    num, batch_size = min(num, len(source)), batch_size * mesh.size
    everywhere = sharding.replicated(mesh)

    # Sums and images are replicated, so that every process has them.
    @functools.partial(jax.jit, out_shardings=everywhere)
    def measure(vae, batch):
        pixels = latents.pixels_from_image(batch["image"])
        mean, log_variance = latents.posterior(latents.encode(vae, batch["image"]))
        decoded = vae.model.apply({"params": vae.params}, mean, method="decode")
        # Only the terms of the loss are used, so the weight of the KL does not matter.
        losses = objectives.autoencoder_loss(
            pixels, decoded, mean, log_variance, distance="l1", kl_weight=0.0
        )
        # Images that fill up the last batch have weight 0.
        sums = {name: jnp.sum(batch["weight"] * loss) for name, loss in losses.items()}
        return sums, latents.image_from_x_0(decoded[:MAX_PAIRS])

    totals, decoded_images = {}, []
    rows = sharding.local_rows(mesh, batch_size)
    batches = loader.eval_batches(source, batch_size, rows, num)
    for batch in tqdm(batches, total=math.ceil(num / batch_size), disable=not progress):
        sums, decoded = measure(vae, sharding.put_batch(mesh, batch))
        totals = {name: totals.get(name, 0) + float(value) for name, value in sums.items()}
        # Only the first batches are in the picture.
        if len(decoded_images) < MAX_PAIRS:
            decoded_images.extend(np.asarray(decoded))
    means = {name: total / num for name, total in totals.items()}
    decoded = np.stack(decoded_images[: min(MAX_PAIRS, num)])
    images = loader.gather(source, range(len(decoded)))["image"]
    pairs = np.concatenate([images, decoded], axis=-2)
    picture = pictures.image_grid(pairs, pictures.grid_columns(len(pairs)))
    # The loss calls its distance 'reconstruction', which is L1 here.
    row = {"psnr": means["psnr"], "l1": means["reconstruction"], "kl": means["kl"]}
    return {"num_images": num, **row}, picture


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png",))
    options = FLAGS.num, FLAGS.batch_size, FLAGS.dtype, sys.stderr.isatty()
    row, picture = reconstruct(FLAGS.config, FLAGS.vae, *options)
    if jax.process_index() == 0:
        files.replace(out, lambda file: Image.fromarray(picture).save(file, "PNG"))
    print(
        f"{row['num_images']} images: PSNR {row['psnr']:.2f} dB  L1 {row['l1']:.4f}  "
        f"KL {row['kl']:.5g} nats per image  picture {out}"
    )


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("vae", None, "Workdir of the VAE, converted or trained.", required=True)
    flags.DEFINE_integer("num", 1000, "Images.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Images at a time, per device.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the VAE's activations.")
    cli.define_path("out", "reconstruction.png", "The picture.")
    cli.run(main)
