"""Conversions between stored examples and x_0: pixels, the VAE's moments, latents, and back."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dit_jax import sharding

# What a VAE takes at a time on each device, so that large images and batches fit in its memory: 8
# images of 256 x 256, 2 of 512 x 512, and at most IMAGES_PER_DEVICE small ones.
PIXELS_PER_DEVICE, IMAGES_PER_DEVICE = 8 * 256**2, 32
# The clamp of the published autoencoder; a log-variance in f16 may be far outside of it.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


@struct.dataclass
class Vae:
    """A trained autoencoder; a pytree of its parameters, so that jitted functions take it."""

    params: dict
    model: nn.Module = struct.field(pytree_node=False)
    digest: str = struct.field(pytree_node=False)  # of the parameters
    published: tuple[float, float] | None = struct.field(pytree_node=False, default=None)
    """Scale and shift that the VAE's publisher uses; None if it was trained here."""


def encode(vae: Vae, image: jax.Array) -> jax.Array:
    """Encodes images [B, H, W, C] uint8 as moments [B, h, w, 2C] f32, the mean and log-variance.

    The moments are unscaled.
    """
    pixels = pixels_from_image(image)
    return vae.model.apply({"params": vae.params}, pixels, method="encode")


def decode(vae: Vae, config, x_0: jax.Array) -> jax.Array:
    """Decodes x_0 [B, h, w, C] f32, scaled by `config.latents`, to images [B, H, W, C] uint8.

    Args: config, `config.latents`.
    """
    z = unscale(config, x_0)
    return image_from_x_0(vae.model.apply({"params": vae.params}, z, method="decode"))


def images_at_once(height: int, width: int) -> int:
    """Returns how many images of this size a VAE takes at a time on each device."""
    return min(max(PIXELS_PER_DEVICE // (height * width), 1), IMAGES_PER_DEVICE)


def encode_in_groups(vae: Vae, image: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """Encodes images [B, H, W, C] uint8 as moments [B, h, w, 2C] f16, rounded as they are stored.

    Each device encodes its own images, `images_at_once` at a time.
    """
    return sharding.map_groups(
        mesh,
        lambda image: encode(vae, image).astype(jnp.float16),
        image,
        images_at_once(*image.shape[1:3]),
    )


def decode_in_groups(vae: Vae, config, x_0: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """Decodes as `decode`; each device decodes its own images, `images_at_once` at a time."""
    height, width = (vae.model.factor * side for side in x_0.shape[1:3])
    return sharding.map_groups(
        mesh, lambda x_0: decode(vae, config, x_0), x_0, images_at_once(height, width)
    )


def make_decode_fn(config, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the jitted `decode(vae, x_0 [B, h, w, C]) -> [B, H, W, channels] uint8` of latents.

    Args: config, `config.latents`.
    """
    return jax.jit(lambda vae, x_0: decode_in_groups(vae, config, x_0, mesh))


def reconstruct(vae: Vae, image: jax.Array) -> jax.Array:
    """Encodes images [B, H, W, C] uint8, and decodes the posterior's mean to uint8 again."""
    z, _ = posterior(encode(vae, image))
    return image_from_x_0(vae.model.apply({"params": vae.params}, z, method="decode"))


def pixels_from_image(image: jax.Array) -> jax.Array:
    """Converts uint8 0..255 to f32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def posterior(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (mean, log-variance), each [B, h, w, C] f32, of moments [B, h, w, 2C].

    The log-variance is clamped to MIN_LOG_VARIANCE..MAX_LOG_VARIANCE.
    """
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)


def posterior_sample(mean: jax.Array, log_variance: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns a posterior sample z [B, h, w, C], unscaled, from standard normal eps."""
    return mean + jnp.exp(0.5 * log_variance) * eps


def scale(config, z: jax.Array) -> jax.Array:
    """Returns (z - shift) * scale for z [B, h, w, C]; each is one number, or one per channel.

    Args: config, `config.latents`.
    """
    # The latents of Stable Diffusion 1 have std 5.5; its scale of 0.18215 makes it 1.
    return (z - _per_channel(config.shift)) * _per_channel(config.scale)


def unscale(config, x_0: jax.Array) -> jax.Array:
    """Returns the z whose `scale` is x_0."""
    return x_0 / _per_channel(config.scale) + _per_channel(config.shift)


def _per_channel(numbers):
    return jnp.array(numbers, jnp.float32).reshape(1, 1, 1, -1)


def image_from_x_0(x_0: jax.Array) -> jax.Array:
    """Converts pixels x_0 [B, H, W, C] f32 to uint8, truncated as the published samples are."""
    return jnp.clip(127.5 * x_0 + 128, 0, 255).astype(jnp.uint8)
