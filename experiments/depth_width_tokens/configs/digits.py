"""The study of README.md: sizes, patches, depths and seeds on the digits' latents, on a CPU.

  make demo     # its VAE and moments, in runs/digits
  python -m experiments.scaling.sweep --config experiments/depth_width_tokens/configs/digits.py \
      --workdir runs/scaling_digits --parallel 2

The learning rate is constant, so that every checkpoint is a run of its own length. All heads have
32 numbers. Cost: see README.md.
"""

from configs import digits_latents
from experiments.scaling.configs import default

# Hidden size, depth. At patch size 4 the single token has 64 numbers: a model that is no wider
# cannot even hand on the noise, so these four are.
SIZES = {"S": (96, 3), "M": (128, 5), "L": (160, 8), "XL": (192, 12)}
# Narrow ones, of patch sizes 1 and 2 alone, and one width at five depths.
NARROW = {"32x2": (32, 2)} | {f"64x{depth}": (64, depth) for depth in (1, 2, 4, 8, 16)}
# Wide and shallow, with the parameters of 64x8 and 64x16.
SHALLOW = {f"128x{depth}": (128, depth) for depth in (2, 4)}


def get_base():
    """The run of every cell, for sweeps on these data."""
    base = digits_latents.get_config()
    base.update(log_every_steps=50, eval_draws=8, sample_every_steps=0)
    base.optim.update(schedule="constant", learning_rate=1e-3, warmup_steps=50, ema_decay=0.99)
    # Loops: their compilation is a part of what the large ones take.
    base.model.scan_unroll = False
    base.sample.update(sampler="dpmpp2m", steps=20, cfg_scale=1.0)
    return base


def model(width: int, depth: int) -> dict[str, int]:
    """A size, with heads of 32."""
    return dict(hidden_size=width, depth=depth, num_heads=width // 32)


def get_config():
    config = default.get_config(get_base())
    config.sizes = {name: model(*size) for name, size in (SIZES | NARROW | SHALLOW).items()}
    # The latents have 4 x 4 positions: 16 tokens, 4, or a single one.
    config.grids = dict(
        main=dict(size=tuple(SIZES), model=dict(patch_size=(1, 2, 4)), seed=(0, 1)),
        narrow=dict(size=tuple(NARROW), model=dict(patch_size=(1, 2)), seed=(0, 1)),
        shallow=dict(size=tuple(SHALLOW), model=dict(patch_size=(1,)), seed=(0, 1)),
    )
    config.steps = (250, 500, 1_000, 2_000)
    return config.lock()
