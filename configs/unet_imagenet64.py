"""ADM's UNet on ImageNet 64x64 in pixels, class-conditional.

  python -m dit_jax.train --config configs/unet_imagenet64.py --workdir runs/adm64

Paper: Dhariwal & Nichol 2021, table 11: 540K steps of batch 2048, learning rate 3e-4, dropout 0.1,
EMA 0.9999, 1,000 steps of the cosine schedule, learned variance; FID 2.07 after 250 steps of
sampling, without guidance. A null class (10% of the labels) is added here for guidance. Activations
are bfloat16, where the paper's were float16. `convert adm` reads the
published weights.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import unet


def get_config():
    config = default.get_config("unet")
    config.model.update(unet.named("adm-imagenet64") | dict(class_dropout_prob=0.1))
    config.model.dtype = "bfloat16"
    config.update(total_steps=540_000, batch_size=2048)
    config.optim.learning_rate = 3e-4
    config.data.image_size = 64
    config.diffusion.schedule = "cosine"
    config.latents.source = "pixels"
    config.sample.update(cfg_scale=1.0, clip_x_0=True)
    return config
