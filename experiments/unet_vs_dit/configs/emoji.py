"""DiTs and UNets with captions at equal multiply-adds, on emoji at 32x32 pixels, on a CPU.

  pip install -e '.[openmoji]'
  python -m dit_jax.datasets.openmoji --size 32
  python -m experiments.scaling.sweep --config experiments/unet_vs_dit/configs/emoji.py \
      --workdir runs/unet_vs_dit --parallel 2

The learning rate is constant, so a checkpoint at any step is the result of a run of that length.
Cost: see experiments/unet_vs_dit/README.md.
"""

from configs import openmoji32_text
from experiments.scaling.configs import default

# Multiply-adds of a forward pass (DiT, UNet): S 14.5 M, 14.7 M; M 32.2 M, 32.4 M; L 69.8 M, 70.8 M.
# Of each, 2.7 M are in the text encoder, which all models share. A patch has 48 numbers, and every
# DiT is wider than that.
DITS = {
    "dit-S": dict(hidden_size=72, depth=2, num_heads=3),
    "dit-M": dict(hidden_size=96, depth=3, num_heads=3),
    "dit-L": {},  # the DiT of configs/openmoji32_text.py
}
UNETS = {
    "unet-S": dict(base_channels=8, channel_mult=(1, 1, 2)),
    "unet-M": dict(base_channels=8, channel_mult=(1, 2, 4)),
    "unet-L": {},  # the UNet of configs/openmoji32_text.py
}
# Constant over training. In the sweep `rates`, 1e-2 has a lower loss after as many steps, but its
# models hardly follow their captions.
LEARNING_RATES = {"dit": 3e-3, "unet": 3e-3}


def get_config(part: str = "main"):
    """Returns one of two sweeps.

    Args: part, 'main', or 'rates' to compare learning rates of each network at size M.
    """
    base = openmoji32_text.get_config("dit")
    base.update(eval_draws=8, sample_every_steps=0)
    base.sample.cfg_scale = 1.0
    config = default.get_config(base)
    for network, sizes in (("dit", DITS), ("unet", UNETS)):
        for name, keys in sizes.items():
            # Every size is a whole model with its name, because the base is a DiT.
            model = openmoji32_text.get_config(network).model
            model.update(keys)
            config.sizes[name] = model
    if part == "rates":
        axes = dict(optim=dict(learning_rate=(1e-3, 3e-3, 1e-2)), seed=(0,))
        config.grids = dict(rates=dict(size=("dit-M", "unet-M"), **axes))
        config.steps = (1_500,)
        config.evaluate.num = 0
        return config.lock()
    for network, sizes in (("dit", DITS), ("unet", UNETS)):
        axes = dict(optim=dict(learning_rate=(LEARNING_RATES[network],)), seed=(0, 1))
        config.grids[network] = dict(size=tuple(sizes), **axes)
    config.steps = (750, 1_500, 3_000)
    config.evaluate.num = 1_000  # samples, for captions of the held-out images
    return config.lock()
