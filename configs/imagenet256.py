"""DiT on ImageNet 256x256 in latents of the Stable Diffusion VAE, any size of the paper.

  python -m dit_jax.convert vae VAE runs/vae      # VAE: the directory of diffusers' AutoencoderKL
  python -m dit_jax.encode --config configs/imagenet256.py --vae runs/vae --out DIR
  python -m dit_jax.train --config configs/imagenet256.py:DiT-XL/2 --workdir runs/xl2 \
      --config.latents.moments=DIR

Paper: Peebles & Xie 2023, table 4; FID-50K 19.47 after 400K steps without guidance. Here the
hyper-parameters are the paper's and the activations bfloat16, where the paper's run was f32.

Images: the TFDS dataset `imagenet2012`, or an image folder. Their moments, with those of the
mirrors, are 2 x 1,281,167 x 16 KiB = 42 GB. docs/imagenet.md has all steps, with disk and time.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import dit


def get_config(name: str = "DiT-XL/2"):
    """Args: name, of the paper; 'DiT-XL/2,flow' takes another process of configs/default.py."""
    name, _, process = name.partition(",")
    config = default.get_config(process=process or "ddpm")
    config.model.update(dtype="bfloat16", scan_unroll=True, **dit.parse_name(name))
    return config
