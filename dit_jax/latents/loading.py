"""Loads VAEs, and checks that a run's VAE is the one whose digest the run recorded."""

import logging
import pathlib

import jax
from ml_collections import ConfigDict

from dit_jax import workdirs
from dit_jax.config import sizes
from dit_jax.errors import UserError
from dit_jax.latents import codec
from dit_jax.system import files
from dit_jax.workdirs import checkpoint, digests

logger = logging.getLogger("dit_jax")


def resolve(config: ConfigDict, recorded: dict) -> ConfigDict:
    """Fills in the VAE's digest, and an empty scale or shift; returns a new config.

    Args: recorded, the metadata of moments, or 'vae_digest' and 'published' of a VAE that encodes
      in every step.
    Raises: ValueError if scale or shift is empty and `recorded` has no statistics, or if the config
      has the digest of another VAE.
    """
    config = config.copy_and_resolve_references()
    latents_config = config.latents
    if "vae_digest" in recorded:
        vae_name = f"the VAE of latents.moments={latents_config.moments}"
        check_digest(config, recorded["vae_digest"], vae_name)
        latents_config.vae_digest = recorded["vae_digest"]
    scale, shift, published = latents_config.scale, latents_config.shift, recorded.get("published")
    # A config may have a scale of its own, so this is no error.
    if published and scale and (scale, shift) != ((published[0],), (published[1],)):
        logger.warning(
            "latents.scale=%s, latents.shift=%s, but this VAE's publisher uses (%g,), (%g,)",
            scale,
            shift,
            *published,
        )
    if scale and shift:
        return config
    if "std" not in recorded:
        raise UserError(
            f"latents.scale={scale} and latents.shift={shift} must not be empty, because these "
            "data have no statistics of dit_jax.encode. Set both."
        )
    # With these each channel of x_0 has mean 0 and deviation 1.
    latents_config.scale = scale or tuple(1 / std for std in recorded["std"])
    latents_config.shift = shift or tuple(recorded["mean"])
    return config


def check_digest(config: ConfigDict, digest: str, name: str) -> None:
    """Raises ValueError unless a VAE's digest is the one in `config.latents`.

    Args: name, of the VAE, for the message.
    """
    # The digest of a new run is empty: it takes any VAE.
    if config.latents.vae_digest not in ("", digest):
        raise UserError(
            f"{name} has digest {digest}, but latents.vae_digest={config.latents.vae_digest} is of "
            "another VAE. Give that VAE, or moments that it encoded."
        )


def load_run_vae(config: ConfigDict, mesh: jax.sharding.Mesh, encodes: bool = False) -> codec.Vae:
    """Loads the VAE of `config.latents`, and checks that it fits the config.

    Args: encodes, whether the VAE must take the images of `config.data` with their channels.
    Raises: ValueError for another digest, or for other shapes of images or latents; as `load_vae`.
    """
    workdir = files.to_path(config.latents.vae, "latents.vae")
    vae = load_vae(workdir, mesh, config.model.dtype)
    check_digest(config, vae.digest, f"latents.vae={config.latents.vae}")
    *size, channels = sizes.image_shape(config.data)
    if not encodes:  # then images have the channels that the VAE decodes
        channels = vae.model.image_channels
    shape = vae.model.latent_shape((*size, channels))
    input_shape = sizes.input_shape(config.model)
    if shape != input_shape:
        raise UserError(
            f"latents.vae={config.latents.vae} makes latents {sizes.show(shape)} of images "
            f"{sizes.show(size)}, but the model takes {sizes.show(input_shape)}. Set "
            "model.input_size and model.in_channels, or give another VAE."
        )
    return vae


def load_vae(workdir: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str) -> codec.Vae:
    """Loads the VAE in a workdir, replicated over the mesh.

    Args: dtype, of the activations.
    Raises: as `checkpoint.load_model`.
    """
    model, params = checkpoint.load_model(workdir, mesh, dtype, "vae")
    config = workdirs.load_config(workdir).model
    # Only the config of a converted VAE has the publisher's scale and shift.
    published = (config.scale, config.shift) if config.get("scale") else None
    return codec.Vae(params, model, digests.digest(params), published)
