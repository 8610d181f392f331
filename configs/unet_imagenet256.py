"""A class-conditional UNet on ImageNet 256x256 in Stable Diffusion's latents, beside DiT.

  python -m dit_jax.convert vae VAE runs/vae
  python -m dit_jax.encode --config configs/unet_imagenet256.py --vae runs/vae --out DIR
  python -m dit_jax.train --config configs/unet_imagenet256.py --workdir runs/unet \
      --config.latents.moments=DIR

No published model: ADM's blocks in DiT's latents, at 80.6 G multiply-adds as DiT-L/2's 80.7 G, with
its data, process, batch and learning rate. The moments are those of configs/imagenet256.py.

Cost and result: not measured.
"""

from configs import default


def get_config():
    config = default.get_config("unet")
    config.model.update(base_channels=320, channel_mult=(1, 2, 4), attention_levels=(1, 2))
    config.model.update(blocks_per_level=3, dtype="bfloat16")
    return config
