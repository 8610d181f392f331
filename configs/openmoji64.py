"""DiT on latents of the OpenMoji emoji at 64x64 pixels, on one GPU.

  python -m dit_jax.encode --config configs/openmoji64.py --vae runs/openmoji64/vae \
      --out runs/openmoji64/moments
  python -m dit_jax.train --config configs/openmoji64.py:DiT-S/2 --workdir runs/openmoji64/dit-s2

The VAE is configs/vae_openmoji64.py. A latent is 16x16x4, which gives 64 tokens at patch size 2.
All moments are kept in device memory (5 MB).

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import dit


def get_config(name: str = "DiT-S/2"):
    """Returns the config of one model.

    Args: name, a size of the paper, such as 'DiT-S/2'; 'DiT-S/2,flow' adds one of PROCESSES in
      configs/default.py.
    """
    name, _, process = name.partition(",")
    config = default.get_config(process=process or "ddpm")
    config.update(
        total_steps=50_000,
        batch_size=128,
        eval_every_steps=5_000,
        sample_every_steps=5_000,
        sample_num_images=64,
        checkpoint_every_steps=5_000,
    )
    config.data.update(name="openmoji/64", eval_split="test", image_size=64, flip=False)
    config.model.update(input_size=16, num_classes=8, dtype="bfloat16", scan_unroll=True)
    config.model.update(dit.parse_name(name))
    config.latents.update(
        source="device", moments="runs/openmoji64/moments", vae="runs/openmoji64/vae"
    )
    # Empty: the values that dit_jax.encode recorded with the moments.
    config.latents.update(scale=(), shift=())
    config.optim.update(learning_rate=3e-4, ema_decay=0.9995)
    return config
