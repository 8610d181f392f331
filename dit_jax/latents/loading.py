"""The VAE of a run: loaded from its workdir, and compared with the digest that the run recorded."""

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
    """Returns the config with the VAE's digest, and with scale and shift where they were empty.

    Args: recorded, the moments' metadata; for a VAE that encodes in every step, its 'vae_digest'
      and 'published'.
    Raises: ValueError if scale or shift is empty and nothing is recorded, or if the config has the
      digest of another VAE.
    """
    config = config.copy_and_resolve_references()
    latents_config = config.latents
    if "vae_digest" in recorded:
        name = f"the VAE of latents.moments={latents_config.moments}"
        check_digest(config, recorded["vae_digest"], name)
        latents_config.vae_digest = recorded["vae_digest"]
    # A warning only: a config may set a scale of its own.
    used, published = (latents_config.scale, latents_config.shift), recorded.get("published")
    if published and used[0] and used != ((published[0],), (published[1],)):
        logger.warning(
            "latents.scale=%s, latents.shift=%s, but this VAE's publisher uses (%g,), (%g,)",
            *used,
            *published,
        )
    if all(used):
        return config
    if "std" not in recorded:
        raise UserError(
            f"latents.scale={latents_config.scale}, latents.shift={latents_config.shift}: empty "
            "ones are taken from what dit_jax.encode records, but these data have no record."
        )
    # Each channel gets mean 0 and deviation 1.
    latents_config.scale = latents_config.scale or tuple(1 / std for std in recorded["std"])
    latents_config.shift = latents_config.shift or tuple(recorded["mean"])
    return config


def check_digest(config: ConfigDict, digest: str, name: str) -> None:
    """Raises ValueError, with both digests, unless a VAE is the one that `config.latents` records.

    Args:
      digest: of the VAE.
      name: describes the VAE in the message.
    """
    # An empty digest accepts any VAE: a new run fills it in.
    if config.latents.vae_digest not in ("", digest):
        raise UserError(
            f"{name} has digest {digest}, but latents.vae_digest={config.latents.vae_digest} is of "
            "another VAE: give that one, or moments that it encoded."
        )


def load_run_vae(config: ConfigDict, mesh: jax.sharding.Mesh, encodes: bool = False) -> codec.Vae:
    """Loads the VAE of `config.latents`, which must be the one that encoded the moments.

    Args: encodes, whether the VAE must take the images of `config.data` with their channels.
    Raises: ValueError for another VAE, or if its images or latents have other shapes; as
      `load_vae`.
    """
    workdir = files.to_path(config.latents.vae, "latents.vae")
    vae = load_vae(workdir, mesh, config.model.dtype)
    check_digest(config, vae.digest, f"latents.vae={config.latents.vae}")
    *size, channels = sizes.image_shape(config.data)
    if not encodes:  # images have the channels that the VAE decodes
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
    """Loads the VAE of a workdir, trained or converted, replicated over the mesh.

    Args: dtype, of its activations.
    Raises: FileNotFoundError or OSError as `restore_params`; ValueError if the workdir holds no
      VAE.
    """
    model, params = checkpoint.load_model(workdir, mesh, dtype, "vae")
    config = workdirs.load_config(workdir).model
    # Only the config of a converted VAE has the scale and shift of its publisher.
    published = (config.scale, config.shift) if config.get("scale") else None
    return codec.Vae(params, model, digests.digest(params), published)
