"""DiT on ImageNet 512x512 in latents of the Stable Diffusion VAE, any size of the paper.

  python -m dit_jax.convert vae VAE runs/vae      # VAE: the directory of diffusers' AutoencoderKL
  python -m dit_jax.encode --config configs/imagenet512.py --vae runs/vae --out DIR
  python -m dit_jax.train --config configs/imagenet512.py:DiT-XL/2 --workdir runs/xl2-512 \
      --config.latents.moments=DIR

Paper: Peebles & Xie 2023, section 5.1; XL/2 after 3M steps has FID-50K 12.03, with guidance 3.04.
The hyper-parameters are those of 256x256; an image has 1,024 tokens.

Images: as configs/imagenet256.py says. Their moments, with those of the mirrors, are
2 x 1,281,167 x 64 KiB = 168 GB.

Cost and result: not measured.
"""

from configs import imagenet256


def get_config(name: str = "DiT-XL/2"):
    config = imagenet256.get_config(name)
    config.total_steps = 3_000_000
    config.data.image_size = 512
    config.model.input_size = 64
    config.latents.moments = "imagenet512_moments"
    return config
