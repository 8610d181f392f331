"""DiT on ImageNet 256x256 in latents of the Stable Diffusion VAE, any size of the paper.

  python -m dit_jax.train --config configs/imagenet256.py:DiT-XL/2 --workdir runs/xl2 \
      --config.data.data_dir=DIR

Paper: Peebles & Xie 2023, table 4; FID-50K 19.47 after 400K steps without guidance. Here the
hyper-parameters are the paper's and the activations bfloat16, where the paper's run was f32.

Reads the TFDS dataset `imagenet256_moments`: per image a `moments` tensor [32, 32, 8] f16 (mean and
log-variance of the VAE, unscaled) and a `label`; of every image also its mirror, since the flip
comes before the VAE.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import dit


def get_config(name: str = "DiT-XL/2"):
    config = default.get_config()
    config.model.update(dtype="bfloat16", scan_unroll=True, **dit.named(name))
    return config
