"""The VAE of a run: loaded from its workdir, and compared with what the run recorded."""

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
    """The config with what only the data know: the VAE's digest, and scale and shift if empty.

    Args: recorded, the moments' metadata, or of a VAE that encodes in every step 'vae_digest' and
      'published'.
    Raises: ValueError if scale or shift is empty and nothing is recorded, or if the config's
      digest is of another VAE.
    """
    config = config.copy_and_resolve_references()
    latents_config = config.latents
    if "vae_digest" in recorded:
        name = f"the VAE of latents.moments={latents_config.moments}"
        check_digest(config, recorded["vae_digest"], name)
        latents_config.vae_digest = recorded["vae_digest"]
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
    latents_config.scale = latents_config.scale or tuple(1 / std for std in recorded["std"])
    latents_config.shift = latents_config.shift or tuple(recorded["mean"])
    return config


def check_digest(config: ConfigDict, digest: str, name: str) -> None:
    """Demands that a VAE, described by `name`, is the one of `config.latents`, if that says which.

    Raises: ValueError with both digests.
    """
    if config.latents.vae_digest not in ("", digest):
        raise UserError(
            f"{name} has digest {digest}, but latents.vae_digest={config.latents.vae_digest} is of "
            "another VAE: give that one, or moments that it encoded."
        )


def load_run_vae(config: ConfigDict, mesh: jax.sharding.Mesh, encodes: bool = False) -> codec.Vae:
    """The VAE of `config.latents`, which must be the one that the moments are of.

    Args: encodes, the images of `config.data`, whose channels it must have.
    Raises: ValueError for another one, or one of another factor; as `latents.load_vae`.
    """
    workdir = files.to_path(config.latents.vae, "latents.vae")
    vae = load_vae(workdir, mesh, config.model.dtype)
    check_digest(config, vae.digest, f"latents.vae={config.latents.vae}")
    height, width, image_channels = sizes.image_shape(config.data)
    factor = vae.model.factor
    image_size = sizes.simplify((height, width))
    wrong_channels = encodes and image_channels != vae.model.image_channels
    if height % factor or width % factor or wrong_channels:
        raise UserError(
            f"latents.vae={config.latents.vae} takes images of {vae.model.image_channels} channels "
            f"and multiples of {factor} pixels, not {image_channels=} and {image_size=}."
        )
    makes = height // factor, width // factor, vae.model.latent_channels
    takes = sizes.input_shape(config.model)
    if makes != takes:
        raise UserError(
            f"latents.vae={config.latents.vae} makes latents {makes} of {image_size=}, but "
            f"model.input_size and model.in_channels take {takes}."
        )
    return vae


def load_vae(workdir: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str) -> codec.Vae:
    """The VAE of a workdir, trained or converted, replicated over the mesh.

    Args: dtype, of its activations.
    Raises: FileNotFoundError or OSError as `restore_params`; ValueError if it holds no VAE.
    """
    model, params = checkpoint.load_model(workdir, mesh, dtype, "vae")
    config = workdirs.load_config(workdir).model
    published = (config.scale, config.shift) if config.get("scale") else None
    return codec.Vae(params, model, digests.digest(params), published)
