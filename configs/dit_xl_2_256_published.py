"""The published DiT-XL/2 on ImageNet 256x256, with the paper's sampling settings.

  python -m dit_jax.convert dit DiT-XL-2-256x256.pt runs/dit
  python -m dit_jax.convert vae VAE runs/vae      # VAE: the directory of diffusers' AutoencoderKL
  python -m dit_jax.sample --workdir runs/dit --vae runs/vae

`dit_jax.convert dit` uses this config by default; for another size it overrides the model's sizes.
docs/weights.md has the addresses of the files.

Paper: Peebles & Xie 2023, table 2: FID-50K 2.27 after 7M training steps, with 250 DDPM steps and
guidance 1.5 on the first three channels. The authors decoded the samples with the VAE ft-EMA.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import dit


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.model.update(dtype="float32", **dit.parse_name("DiT-XL/2"))
    config.latents.update(source="moments", scale=(0.18215,), shift=(0.0,))
    config.sample.update(sampler="ddpm", steps=250, cfg_scale=1.5, cfg_channels=3)
    return config
