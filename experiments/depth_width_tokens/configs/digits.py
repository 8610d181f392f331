"""The sweep of README.md: sizes, patch sizes, depths and seeds, on latents of the digits, on a CPU.

  make demo     # writes the VAE and the moments into runs/digits
  python -m experiments.scaling.sweep --config experiments/depth_width_tokens/configs/digits.py \
      --workdir runs/scaling_digits --parallel 2

The learning rate is constant, so a checkpoint at any step is the result of a run of that length.
Every attention head has 32 channels. Cost: see README.md.
"""

from configs import digits_latents
from experiments.scaling.configs import default

# (hidden size, depth). At patch size 4 the single token has 64 numbers. These models are wider,
# because a narrower one cannot even pass the noise through.
SIZES = {"S": (96, 3), "M": (128, 5), "L": (160, 8), "XL": (192, 12)}
# Narrow models, for patch sizes 1 and 2 only; width 64 has five depths.
NARROW = {"32x2": (32, 2)} | {f"64x{depth}": (64, depth) for depth in (1, 2, 4, 8, 16)}
# Wide and shallow models, with about as many parameters as 64x8 and 64x16.
SHALLOW = {f"128x{depth}": (128, depth) for depth in (2, 4)}


def get_base():
    """Returns the run config of all cells, which the other sweep on this data also uses."""
    base = digits_latents.get_config()
    base.update(log_every_steps=50, eval_draws=8, sample_every_steps=0)
    base.optim.update(schedule="constant", learning_rate=1e-3, warmup_steps=50, ema_decay=0.99)
    # With a loop over the blocks, large models compile in a fraction of the time of unrolled ones.
    base.model.scan_unroll = False
    base.sample.update(sampler="dpmpp2m", steps=20, cfg_scale=1.0)
    return base


def make_model_keys(width: int, depth: int) -> dict[str, int]:
    """Returns the model keys of a size, with 32 channels per attention head."""
    return dict(hidden_size=width, depth=depth, num_heads=width // 32)


def get_config():
    """Returns the sweep."""
    config = default.get_config(get_base())
    sizes = SIZES | NARROW | SHALLOW
    config.sizes = {name: make_model_keys(*size) for name, size in sizes.items()}
    # The latents have 4 x 4 positions: patch sizes 1, 2 and 4 make 16, 4 and 1 tokens.
    config.grids = dict(
        main=dict(size=tuple(SIZES), model=dict(patch_size=(1, 2, 4)), seed=(0, 1)),
        narrow=dict(size=tuple(NARROW), model=dict(patch_size=(1, 2)), seed=(0, 1)),
        shallow=dict(size=tuple(SHALLOW), model=dict(patch_size=(1,)), seed=(0, 1)),
    )
    config.steps = (250, 500, 1_000, 2_000)
    return config.lock()
