"""DDPM's UNet on CIFAR-10, without labels.

  python -m dit_jax.train --config configs/unet_cifar10.py --workdir runs/cifar10

Paper: Ho et al. 2020, appendix B: 800K steps of batch 128, learning rate 2e-4 after 5,000 steps of
warm-up, gradients clipped at norm 1, EMA 0.9999, dropout 0.1, flips. FID 3.17 with 1,000 sampling
steps, the variances beta, and x_0 clipped to [-1, 1].

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import unet_presets


def get_config():
    """Returns the config."""
    config = default.get_config("unet")
    config.model.update(unet_presets.get("ddpm-cifar10"))
    config.update(total_steps=800_000, batch_size=128)
    config.data.update(name="cifar10", eval_split="test", image_size=32, cache=True)
    config.latents.source = "pixels"
    config.optim.update(learning_rate=2e-4, warmup_steps=5_000, grad_clip_norm=1.0)
    # No guidance: the model has no labels, so no null condition either.
    config.sample.update(steps=1_000, cfg_scale=1.0, clip_x_0=True)
    return config
