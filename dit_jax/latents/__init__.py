"""Conversions between images, moments and x_0: the VAE, and datasets of moments.

`store` and `shards` write such datasets. Only `dit_jax.encode` imports them: they need TFDS.
"""

from dit_jax.latents.codec import (
    Vae,
    encode,
    encode_in_groups,
    image_from_x_0,
    make_decode_fn,
    pixels_from_image,
    posterior,
    posterior_sample,
    reconstruct,
    scale,
    unscale,
)
from dit_jax.latents.kinds import KINDS, Latents, build, open_split
from dit_jax.latents.loading import load_vae

__all__ = [
    "KINDS",
    "Latents",
    "Vae",
    "build",
    "encode",
    "encode_in_groups",
    "image_from_x_0",
    "load_vae",
    "make_decode_fn",
    "open_split",
    "pixels_from_image",
    "posterior",
    "posterior_sample",
    "reconstruct",
    "scale",
    "unscale",
]
