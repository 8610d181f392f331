"""A class-conditional UNet on ImageNet 256x256 in Stable Diffusion's latents, to compare with DiT.

  python -m dit_jax.convert vae VAE runs/vae
  python -m dit_jax.encode --config configs/unet_imagenet256.py --vae runs/vae --out DIR
  python -m dit_jax.train --config configs/unet_imagenet256.py --workdir runs/unet \
      --config.latents.moments=DIR

This model is not published. It uses ADM's blocks on DiT's latents. A forward pass takes 80.6 G
multiply-adds; DiT-L/2 takes 80.7 G. Data, process, batch size and learning rate are DiT's.
The moments are the same as for configs/imagenet256.py.

Cost and result: not measured.
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config("unet")
    config.model.update(base_channels=320, channel_mult=(1, 2, 4), attention_levels=(1, 2))
    config.model.update(blocks_per_level=3, dtype="bfloat16")
    return config
