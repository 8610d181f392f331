"""The published DiT-XL/2 of ImageNet 256x256, and how the paper draws samples from it.

  python -m dit_jax.convert dit DiT-XL-2-256x256.pt runs/dit
  python -m dit_jax.convert vae VAE runs/vae      # VAE: the directory of diffusers' AutoencoderKL
  python -m dit_jax.sample --workdir runs/dit --vae runs/vae

Converting takes this config where none is given; another size overrides the model's sizes.
docs/weights.md says where the files are.

Paper: Peebles & Xie 2023, table 2; after 7M steps, with guidance 1.5 of the first three channels
and 250 steps of DDPM, FID-50K 2.27. The publisher drew the samples with the decoder ft-EMA.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import dit


def get_config():
    config = default.get_config()
    config.model.update(dtype="float32", **dit.parse_name("DiT-XL/2"))
    config.latents.update(source="moments", scale=(0.18215,), shift=(0.0,))
    config.sample.update(sampler="ddpm", steps=250, cfg_scale=1.5, cfg_channels=3)
    return config
