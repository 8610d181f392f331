"""DiT on ImageNet 512x512 in latents of the Stable Diffusion VAE, in any of the paper's sizes.

  python -m dit_jax.convert vae VAE runs/vae      # VAE: the directory of diffusers' AutoencoderKL
  python -m dit_jax.encode --config configs/imagenet512.py --vae runs/vae --out DIR
  python -m dit_jax.train --config configs/imagenet512.py:DiT-XL/2 --workdir runs/xl2-512 \
      --config.latents.moments=DIR

Paper: Peebles & Xie 2023, section 5.1: DiT-XL/2 after 3M steps has FID-50K 12.03, and 3.04 with
guidance. The hyper-parameters are the same as for 256x256; XL/2 has 1,024 tokens per image.

Images: as in configs/imagenet256.py. The moments of all images and of their mirror images take
2 x 1,281,167 x 64 KiB = 168 GB.

Cost and result: not measured.
"""

from configs import imagenet256


def get_config(name: str = "DiT-XL/2"):
    """Returns the config of one model.   Args: name, as in configs/imagenet256.py."""
    config = imagenet256.get_config(name)
    config.total_steps = 3_000_000
    config.data.image_size = 512
    config.model.input_size = 64
    config.latents.moments = "imagenet512_moments"
    return config
