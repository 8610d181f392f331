"""Conversions between stored examples and x_0: pixels, the VAE's moments, latents, and back."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dit_jax import sharding

# The largest group of images that a VAE takes together on a device, so that large ones fit in its
# memory: 8 images of 256 x 256, 2 of 512 x 512, and never more than IMAGES_PER_DEVICE.
PIXELS_PER_DEVICE, IMAGES_PER_DEVICE = 8 * 256**2, 32
# The clamp of the published autoencoder. Log-variances in f16 may be far outside of it.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


@struct.dataclass
class Vae:
    """A trained autoencoder, as a pytree of its parameters: jitted functions take it."""

    params: dict
    model: nn.Module = struct.field(pytree_node=False)
    digest: str = struct.field(pytree_node=False)  # of the parameters
    # (scale, shift) of the publisher; None for a VAE that was trained here.
    published: tuple[float, float] | None = struct.field(pytree_node=False, default=None)


def encode(vae: Vae, image: jax.Array) -> jax.Array:
    """Encodes images [B, H, W, C] uint8 as moments [B, h, w, 2C] f32: mean and log-variance.

    The moments are not scaled.
    """
    pixels = pixels_from_image(image)
    return vae.model.apply({"params": vae.params}, pixels, method="encode")


def decode(vae: Vae, config, x_0: jax.Array) -> jax.Array:
    """Decodes x_0 [B, h, w, C] f32 to images [B, H, W, C] uint8.

    Args: config, the `config.latents` whose scale and shift x_0 has.
    """
    z = unscale(config, x_0)
    return image_from_x_0(vae.model.apply({"params": vae.params}, z, method="decode"))


def images_at_once(image_shape: Sequence[int]) -> int:
    """Returns the number of images (H, W, C) that a VAE takes together on each device."""
    *size, _ = image_shape
    return min(max(PIXELS_PER_DEVICE // math.prod(size), 1), IMAGES_PER_DEVICE)


def encode_in_groups(vae: Vae, image: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """Encodes images [B, H, W, C] uint8 as moments [B, h, w, 2C] f16, the dtype of stored moments.

    Each device encodes its own images, `images_at_once` together.
    """
    group_size = images_at_once(image.shape[1:])
    return sharding.map_groups(
        mesh, lambda image: encode(vae, image).astype(jnp.float16), image, group_size
    )


def decode_in_groups(vae: Vae, config, x_0: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """Decodes as `decode`; each device decodes its own images, `images_at_once` together."""
    group_size = images_at_once(vae.model.image_shape(x_0.shape[1:]))
    return sharding.map_groups(mesh, lambda x_0: decode(vae, config, x_0), x_0, group_size)


def make_decode_fn(config, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the jitted function (vae, x_0) -> images of `decode_in_groups`."""
    return jax.jit(lambda vae, x_0: decode_in_groups(vae, config, x_0, mesh))


def reconstruct(vae: Vae, image: jax.Array) -> jax.Array:
    """Encodes images [B, H, W, C] uint8, and decodes the posterior's mean to images again."""
    z, _ = posterior(encode(vae, image))
    return image_from_x_0(vae.model.apply({"params": vae.params}, z, method="decode"))


def pixels_from_image(image: jax.Array) -> jax.Array:
    """Converts uint8 0..255 to f32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def posterior(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits moments [B, h, w, 2C] into mean and log-variance, each [B, h, w, C] f32.

    The log-variance is clamped to MIN_LOG_VARIANCE..MAX_LOG_VARIANCE.
    """
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)


def posterior_sample(mean: jax.Array, log_variance: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns a sample z [B, h, w, C] of the posterior, not scaled, from standard normal eps."""
    return mean + jnp.exp(0.5 * log_variance) * eps


def scale(config, z: jax.Array) -> jax.Array:
    """Returns x_0 = (z - shift) * scale for latents z [B, h, w, C].

    Args: config, `config.latents`. Its shift and scale have one value, or one for each channel.
    """
    # The latents of Stable Diffusion 1 have std 5.5; its scale of 0.18215 makes that 1.
    return (z - _expand(config.shift, z)) * _expand(config.scale, z)


def unscale(config, x_0: jax.Array) -> jax.Array:
    """Returns the latents z of x_0; the inverse of `scale`."""
    return x_0 / _expand(config.scale, x_0) + _expand(config.shift, x_0)


def _expand(values, x):
    """Returns the values of the channels as an array with as many axes as x."""
    # Explicit axes: the tests run with jax_numpy_rank_promotion="raise".
    return jnp.array(values, jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)


def image_from_x_0(x_0: jax.Array) -> jax.Array:
    """Converts f32 in [-1, 1] to uint8 0..255, truncated as in the published samples."""
    return jnp.clip(127.5 * x_0 + 128, 0, 255).astype(jnp.uint8)
