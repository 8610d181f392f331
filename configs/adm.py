"""Class-conditional UNets of ADM on ImageNet, in pixels.

  python -m dit_jax.train --config configs/adm.py:imagenet64 --workdir runs/adm64

Paper: Dhariwal & Nichol 2021, table 11. ImageNet 64: 540K steps of batch 2048, learning rate 3e-4,
dropout 0.1, the cosine schedule; FID 2.07 without guidance. ImageNet 256: 1,980K steps of batch
256, learning rate 1e-4, no dropout, the linear schedule; FID 10.94 without guidance. Both: EMA
0.9999, 1,000 diffusion steps, learned variance, 250 sampling steps.

Differences from the paper: a null class replaces 10% of the labels, for guidance; activations are
bfloat16 instead of float16. `dit_jax.convert adm` reads the published weights.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import unet_presets

RUNS = {
    "imagenet64": dict(steps=540_000, batch=2048, learning_rate=3e-4, schedule="cosine"),
    "imagenet256": dict(steps=1_980_000, batch=256, learning_rate=1e-4, schedule="linear"),
}


def get_config(name: str = "imagenet64"):
    """Returns the config of one dataset.

    Args: name, 'imagenet64' or 'imagenet256'.
    Raises: ValueError for another name.
    """
    if name not in RUNS:
        raise ValueError(f"unknown dataset {name!r}; choose {' or '.join(RUNS)}.")
    run = RUNS[name]
    config = default.get_config("unet")
    config.model.update(unet_presets.get(f"adm-{name}") | dict(null_condition=True))
    config.model.dtype = "bfloat16"
    config.update(total_steps=run["steps"], batch_size=run["batch"])
    config.optim.learning_rate = run["learning_rate"]
    config.data.image_size = config.model.input_size  # in pixels x_0 is the image itself
    config.diffusion.schedule = run["schedule"]
    config.latents.source = "pixels"
    config.sample.update(cfg_scale=1.0, clip_x_0=True)
    return config
