"""The paper's four conditioning blocks at one model size, on latents of the digits, on a CPU.

  make demo     # writes the VAE and the moments into runs/digits
  python -m experiments.scaling.sweep --config experiments/conditioning/configs/digits.py \
      --workdir runs/conditioning_digits --parallel 2

Cost: see experiments/conditioning/README.md.
"""

from experiments.depth_width_tokens.configs import digits
from experiments.scaling.configs import default


def get_config():
    """Returns the sweep."""
    config = default.get_config(digits.get_base())
    config.sizes = dict(M=digits.make_model_keys(*digits.SIZES["M"]))
    blocks = ("in-context", "cross-attention", "adaLN", "adaLN-Zero")
    config.grids = dict(
        main=dict(size=("M",), model=dict(block=blocks, patch_size=(1,)), seed=(0, 1, 2))
    )
    config.steps = (250, 500, 1_000, 2_000)
    return config.lock()
