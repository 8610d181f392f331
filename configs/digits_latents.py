"""DiT on latents of the digits, from the VAE of configs/vae_digits.py; second half of `make demo`.

  python -m dit_jax.encode --config configs/digits_latents.py --vae runs/digits/vae \
      --out runs/digits/moments
  python -m dit_jax.train --config configs/digits_latents.py --workdir runs/digits/dit

Cost: 134 s of training on two CPU cores (1,900 images/s), compilation not counted.
Result: 1,000 EMA samples, DDPM 100 steps, cfg 1.5, seed 0: label_accuracy 0.994, fd_pixels 0.754
(two halves of the real training digits: 0.340).
"""

from configs import digits


def get_config(process: str = "ddpm"):
    """Returns the config.   Args: process, one of PROCESSES in configs/default.py."""
    config = digits.get_config(process)
    config.diffusion.sigma_data = 1.0  # latents are scaled to unit variance
    config.model.update(input_size=4, in_channels=4, patch_size=1)
    # Empty scale and shift: the values that dit_jax.encode recorded with the moments.
    config.latents.update(
        source="moments", moments="runs/digits/moments", vae="runs/digits/vae", scale=(), shift=()
    )
    return config
