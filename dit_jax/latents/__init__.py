"""Images, moments and x_0: the VAE between them, and datasets of moments.

`store` and `shards`, which write such datasets, are imported by `encode` alone: they need TFDS.
"""

from dit_jax.latents.codec import (
    Vae,
    decode,
    decode_in_groups,
    encode,
    encode_in_groups,
    image_from_x_0,
    images_at_once,
    pixels_from_image,
    posterior,
    posterior_sample,
    reconstruct,
    scale,
    unscale,
    x_0_from_batch,
)
from dit_jax.latents.device import load_moments
from dit_jax.latents.frozen import Frozen, load_frozen
from dit_jax.latents.loading import check_digest, load_run_vae, load_vae, resolve

__all__ = [
    "Frozen",
    "Vae",
    "check_digest",
    "decode",
    "decode_in_groups",
    "encode",
    "encode_in_groups",
    "image_from_x_0",
    "images_at_once",
    "load_frozen",
    "load_moments",
    "load_run_vae",
    "load_vae",
    "pixels_from_image",
    "posterior",
    "posterior_sample",
    "reconstruct",
    "resolve",
    "scale",
    "unscale",
    "x_0_from_batch",
]
