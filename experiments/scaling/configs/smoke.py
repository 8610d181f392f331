"""Four tiny cells on the digits in pixels, two compute points each: for tests and first tries.

python -m dit_jax.datasets.digits
python -m experiments.scaling.sweep --config experiments/scaling/configs/smoke.py --workdir runs/smoke_sweep
"""  # noqa: E501

from configs import smoke
from experiments.scaling.configs import default


def get_config():
    """Returns the sweep."""
    base = smoke.get_config()
    # Several compute points need a constant learning rate.
    base.update(eval_draws=2, optim=dict(schedule="constant"))
    base.sample.update(sampler="ddim", steps=5, cfg_scale=1.0)
    config = default.get_config(base)
    config.sizes = dict(
        XS=dict(hidden_size=16, depth=1, num_heads=1), S=dict(hidden_size=32, depth=2, num_heads=2)
    )
    config.grids = dict(main=dict(size=("XS", "S"), model=dict(patch_size=(2, 4))))
    config.steps = (20, 40)
    config.evaluate.num = 100
    return config.lock()
