"""DiTs and UNets of equal multiply-adds, told captions, on the emoji at 32x32 pixels, on a CPU.

  pip install -e '.[openmoji]'
  python -m dit_jax.datasets.openmoji --size 32
  python -m experiments.scaling.sweep --config experiments/unet_vs_dit/configs/emoji.py \
      --workdir runs/unet_vs_dit --parallel 2

The learning rate is constant, so that every checkpoint is a run of its own length. Cost: see
experiments/unet_vs_dit/README.md.
"""

from configs import openmoji32_text
from experiments.scaling.configs import default

# Multiply-adds of a pass: 14.5 M and 14.7 M, 32.2 M and 32.4 M, 69.8 M and 70.8 M, of which 2.7 M
# are the encoder's of captions, the same in all. The DiTs are wider than a patch has numbers, 48.
DITS = {
    "dit-S": dict(hidden_size=72, depth=2, num_heads=3),
    "dit-M": dict(hidden_size=96, depth=3, num_heads=3),
    "dit-L": {},  # that of configs/openmoji32_text.py
}
UNETS = {
    "unet-S": dict(base_channels=8, channel_mult=(1, 1, 2)),
    "unet-M": dict(base_channels=8, channel_mult=(1, 2, 4)),
    "unet-L": {},
}
# Constant. Of `rates` 1e-2 has the lower loss in as many steps, but hardly heeds captions.
LEARNING_RATES = {"dit": 3e-3, "unet": 3e-3}


def get_config(part: str = "main"):
    """Args: part, main; or rates, which learning rate serves each network at the size M."""
    base = openmoji32_text.get_config("dit")
    base.update(eval_draws=8, sample_every_steps=0)
    base.sample.cfg_scale = 1.0
    config = default.get_config(base)
    for network, sizes in (("dit", DITS), ("unet", UNETS)):
        for name, keys in sizes.items():
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
    config.evaluate.num = 1_000  # of the held-out captions
    return config.lock()
