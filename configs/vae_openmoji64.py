"""A VAE for the OpenMoji emoji at 64x64 pixels, with 16x16 latents, on one GPU.

  python -m dit_jax.datasets.openmoji --size 64
  python -m dit_jax.train --config configs/vae_openmoji64.py --workdir runs/openmoji64/vae

Cost on one H100 80GB: about 2,350 images/s, so 9 minutes of steps. Result: not measured.
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config("vae")
    config.update(
        total_steps=20_000,
        batch_size=64,
        eval_every_steps=1_000,
        sample_every_steps=2_000,
        checkpoint_every_steps=2_000,
    )
    config.data.update(name="openmoji/64", eval_split="test", image_size=64, flip=False, cache=True)
    config.model.update(block_channels=(64, 128, 256), mid_attention=False, dtype="bfloat16")
    config.optim.update(
        learning_rate=3e-4, schedule="cosine", warmup_steps=500, grad_clip_norm=1.0, ema_decay=0.999
    )
    return config
