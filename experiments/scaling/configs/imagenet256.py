"""The paper's twelve models on ImageNet 256x256: table 4 and figures 2, 5 to 9 of Peebles & Xie.

  python -m experiments.scaling.sweep --config experiments/scaling/configs/imagenet256.py \
      --workdir runs/scaling_imagenet --executor slurm --config.base.latents.moments=DIR \
      --config.base.latents.vae=runs/vae --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz

docs/imagenet.md describes how to make the moments. Training the twelve models takes 1.8e21 FLOPs,
as published; FID-50K at four compute points of each model is not included.
Cost and result: not measured.
"""

from configs import imagenet256
from dit_jax.models import dit
from experiments.scaling.configs import default


def get_config():
    """Returns the sweep."""
    base = imagenet256.get_config()
    base.update(eval_every_steps=0)
    base.sample.update(cfg_scale=1.0)
    config = default.get_config(base)
    # The patch size is an axis of the grid, so a size must not set it.
    for name in dit.SIZES:
        config.sizes[name] = {
            key: value
            for key, value in dit.parse_name(f"DiT-{name}/2").items()
            if key != "patch_size"
        }
    config.grids = dict(main=dict(size=tuple(dit.SIZES), model=dict(patch_size=(2, 4, 8))))
    config.steps = (50_000, 100_000, 200_000, 400_000)
    config.evaluate.update(num=50_000, labels="random", extractor="inception")
    config.slurm.update(gpus_per_node=8, cpus_per_task=64, mem_gb=500, timeout_min=7 * 24 * 60)
    return config.lock()
