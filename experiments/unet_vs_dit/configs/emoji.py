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

# Multiply-adds of a pass: 13.5 M and 13.4 M, 31.1 M and 31.4 M, 80.8 M and 78.7 M. The DiTs are
# wider than a patch has numbers, 48, and rather wide than deep: of about 27 M, 48x6 learns far
# slower than 64x4, and this than 96x2. The encoder of captions is the same in both networks.
SMALL = dict(context_size=32, text_num_heads=1)
DITS = {
    "dit-S": dict(hidden_size=64, depth=2, num_heads=2, mlp_ratio=3.25, **SMALL),
    "dit-M": dict(hidden_size=96, depth=2, num_heads=3, mlp_ratio=4.5, **SMALL),
    "dit-L": {},  # that of configs/openmoji32_text.py
}
UNETS = {
    "unet-S": dict(base_channels=8, channel_mult=(1, 1, 2), **SMALL),
    "unet-M": dict(base_channels=8, channel_mult=(1, 2, 4), **SMALL),
    "unet-L": {},
}
# Of a constant schedule, the best held-out loss of `rates`; but captions are not heeded at them.
LEARNING_RATES = {"dit": 1e-2, "unet": 1e-2}


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
