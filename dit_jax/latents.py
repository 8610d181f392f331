"""Between stored examples and x_0: pixels to [-1, 1], moments to latents, x_0 to pixels."""

import jax
import jax.numpy as jnp


def x_0_from_batch(
    batch: dict[str, jax.Array], key: jax.Array, scale: float, shift: float
) -> jax.Array:
    """The clean x_0 of a batch of images or of stored VAE moments.

    Args:
      batch: 'image' [B, H, W, C] uint8, or 'moments' [B, h, w, 2C] f16: mean, log-variance,
        unscaled.
      key: draws the posterior sample of moments, afresh for each call.
      scale, shift: of latents, (z - shift) * scale; not used for images.
    Returns: [B, h, w, C] f32.
    """
    if "image" in batch:
        return batch["image"].astype(jnp.float32) / 127.5 - 1
    mean, log_variance = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    # The clamp of the published autoencoder: an f16 log-variance may lie far outside.
    std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
    z = mean + std * jax.random.normal(key, mean.shape)
    # SD latents have std 5.5; 0.18215 makes it 1. Applied here and nowhere else.
    return (z - shift) * scale


def image_from_x_0(x_0: jax.Array) -> jax.Array:
    """x_0 [B, H, W, C] f32 of a pixel model to uint8, truncated as the published samples are."""
    return jnp.clip(127.5 * x_0 + 128, 0, 255).astype(jnp.uint8)
