"""Between stored examples and x_0: pixels, the VAE and its moments, latents, and back."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

# The clamp of the published autoencoder; an f16 log-variance may lie far outside.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


@dataclasses.dataclass(frozen=True, eq=False)
class Vae:
    """A trained autoencoder, its parameters replicated over a mesh."""

    model: nn.Module
    params: dict
    digest: str  # of the parameters: two VAEs with the same one have the same latents


def encode(vae_model: nn.Module, params, image: jax.Array) -> jax.Array:
    """Images [B, H, W, C] uint8 to moments [B, h, w, 2C] f32, unscaled: mean, log-variance."""
    pixels = pixels_from_image(image)
    return vae_model.apply({"params": params}, pixels, method="encode")


def pixels_from_image(image: jax.Array) -> jax.Array:
    """uint8 0..255 to f32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


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
        return pixels_from_image(batch["image"])
    mean, log_variance = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    std = jnp.exp(0.5 * jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))
    z = mean + std * jax.random.normal(key, mean.shape)
    # SD latents have std 5.5; 0.18215 makes it 1. Applied here and nowhere else.
    return (z - shift) * scale


def image_from_x_0(x_0: jax.Array) -> jax.Array:
    """x_0 [B, H, W, C] f32 of a pixel model to uint8, truncated as the published samples are."""
    return jnp.clip(127.5 * x_0 + 128, 0, 255).astype(jnp.uint8)
