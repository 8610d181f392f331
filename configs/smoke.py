"""A DiT that trains, evaluates, samples and checkpoints in seconds: for tests and first tries.

python -m dit_jax.train --config configs/smoke.py --workdir runs/smoke
"""

from configs import digits


def get_config():
    """Returns configs/digits.py with a smaller model and fewer steps."""
    config = digits.get_config()
    config.update(
        total_steps=40,
        batch_size=16,
        log_every_steps=10,
        eval_every_steps=20,
        sample_every_steps=20,
        sample_num_images=10,
        checkpoint_every_steps=10,
        model=dict(hidden_size=32, depth=2, num_heads=2),
        optim=dict(warmup_steps=10),
        sample=dict(steps=10),
    )
    return config
