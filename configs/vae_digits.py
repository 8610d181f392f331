"""A VAE for the 8x8 digits, with 4x4 latents: the first half of `make demo`.

  python -m dit_jax.datasets.digits
  python -m dit_jax.train --config configs/vae_digits.py --workdir runs/digits/vae

Cost: 39 s of training on two CPU cores (1,600 images/s), compilation not counted.
Result: held-out PSNR 26.5 dB, KL 191 nats per image (EMA, seed 0, posterior samples).
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config("vae")
    config.update(
        total_steps=1_000,
        batch_size=64,
        eval_every_steps=250,
        sample_every_steps=500,
        sample_num_images=20,
        checkpoint_every_steps=500,
        optim=dict(learning_rate=2e-3, schedule="cosine", warmup_steps=50, ema_decay=0.99),
        data=dict(name="digits", eval_split="test", image_size=8, image_channels=1, flip=False),
        autoencoder=dict(distance="l2", kl_weight=1e-3),
    )
    # On two cores reader threads would compete with the training step.
    config.data.update(cache=True, num_threads=0, prefetch_batches=0)
    config.model.update(image_channels=1, latent_channels=4, block_channels=(16, 32))
    config.model.update(layers_per_block=1, norm_groups=8, mid_attention=False)
    return config
