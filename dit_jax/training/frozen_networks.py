"""Constant inputs of every training step: frozen networks, and data on the devices."""

import jax
from flax import struct
from ml_collections import ConfigDict

from dit_jax import conditions, latents, sharding
from dit_jax.data import sources
from dit_jax.latents import loading
from dit_jax.system import files
from dit_jax.workdirs import checkpoint


@struct.dataclass
class Frozen:
    """A pytree of arrays that jitted steps take; an array that a run does not need is None."""

    vae: latents.Vae | None = None  # encodes images in each step, or decodes pictures
    text_encoder: conditions.TextEncoder | None = None
    null: jax.Array | None = None  # from `Condition.load_null`, such as the empty caption [M]
    lpips: dict | None = None  # the LPIPS network's parameters
    records: dict[str, jax.Array] | None = None  # all moments, with their labels or captions

    def with_records(
        self, config: ConfigDict, mesh: jax.sharding.Mesh, source: sources.Source
    ) -> "Frozen":
        """Returns a copy with the data that the run keeps on the devices, if any.

        Raises: as `Latents.load_records`, if the data do not fit.
        """
        return self.replace(records=latents.build(config).load_records(source, mesh))


def load(
    config: ConfigDict, mesh: jax.sharding.Mesh, metadata: dict | None = None
) -> tuple[ConfigDict, Frozen]:
    """Loads the frozen networks; returns the completed config and the networks on the mesh.

    The config gets the digests, and an empty scale or shift, from the data and the networks. Each
    network is read once, and compared with the digest that the config or the data record.
    Args: metadata, of the moments that the run trains on.
    Raises: as `Latents.resolve`, `Latents.load_vae`, `Condition.resolve` and
      `checkpoint.load_model`.
    """
    metadata = metadata or {}
    # A VAE's config has no section fid.
    draws = config.sample_every_steps or config.get("fid", {}).get("every_steps", 0)
    # The data's record comes first: the networks are compared with its digests.
    config = latents.build(config).resolve(metadata)
    config, text_encoder = conditions.build(config).resolve(metadata, mesh)
    condition, x_0 = conditions.build(config), latents.build(config)
    vae = x_0.load_vae(mesh) if x_0.uses_vae and config.latents.vae else None
    if vae:
        if x_0.encodes:  # no dataset has recorded the VAE's digest
            recorded = dict(vae_digest=vae.digest, published=vae.published)
            config = loading.resolve(config, recorded)
        elif not draws:  # only its digest had to be checked, and device memory is scarce
            vae = None
    # A stored null condition is the encoder's output, so it is made before the encoder is dropped.
    null = condition.load_null(text_encoder)
    if null is not None:
        null = jax.device_put(null, sharding.replicated(mesh))
    # Steps read stored outputs, so only drawing still needs the encoder.
    if config.get("text", {}).get("stored") and not draws:
        text_encoder = None
    lpips = None
    if config.get("autoencoder", {}).get("lpips_weight"):
        workdir = files.to_path(config.autoencoder.lpips, "autoencoder.lpips")
        _, lpips = checkpoint.load_model(workdir, mesh, config.model.dtype, "lpips")
    return config, Frozen(vae, text_encoder, null, lpips)
