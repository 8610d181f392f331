"""The Stable Diffusion VAE's architecture on ImageNet 256x256, trained from scratch.

  python -m dit_jax.train --config configs/vae_imagenet256.py --workdir runs/vae

Source of the sizes, the L1 distance and the KL weight: Rombach et al. 2022, appendix G. The paper
adds a perceptual and an adversarial loss, so reconstructions here are smoother. To reproduce
published results, convert the published weights instead (docs/weights.md).

Cost and result: not measured.
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config("vae")
    config.update(batch_size=64, sample_every_steps=10_000)
    config.optim.update(b2=0.99, grad_clip_norm=1.0)
    config.model.update(dtype="bfloat16", remat=True)
    return config
