"""DiT on ImageNet 256x256 in latents of the Stable Diffusion VAE, in any of the paper's sizes.

  python -m dit_jax.convert vae VAE runs/vae      # VAE: the directory of diffusers' AutoencoderKL
  python -m dit_jax.encode --config configs/imagenet256.py --vae runs/vae --out DIR
  python -m dit_jax.train --config configs/imagenet256.py:DiT-XL/2 --workdir runs/xl2 \
      --config.latents.moments=DIR

Paper: Peebles & Xie 2023, table 4: DiT-XL/2 has FID-50K 19.47 after 400K steps without guidance.
The hyper-parameters are the paper's. Activations are bfloat16; the paper's run was f32.

Images: the TFDS dataset `imagenet2012`, or an image folder. The moments of all images and of their
mirror images take 2 x 1,281,167 x 16 KiB = 42 GB. docs/imagenet.md lists all steps, with disk
space and time.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import dit


def get_config(name: str = "DiT-XL/2"):
    """Returns the config of one model.

    Args: name, a size of the paper, such as 'DiT-XL/2'; 'DiT-XL/2,flow' adds one of PROCESSES in
      configs/default.py.
    """
    name, _, process = name.partition(",")
    config = default.get_config(process=process or "ddpm")
    config.model.update(dtype="bfloat16", scan_unroll=True, **dit.parse_name(name))
    return config
