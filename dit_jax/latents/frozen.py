"""What every training step reads and none changes: frozen networks, and data on the devices."""

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from dit_jax import conditions, sharding
from dit_jax.data import sources
from dit_jax.latents import codec, device, loading
from dit_jax.system import files
from dit_jax.workdirs import checkpoint


@struct.dataclass
class Frozen:
    """A tree of arrays that jitted steps take; what a run does not need is None."""

    vae: codec.Vae | None = None  # encodes images in each step, decodes pictures
    text_encoder: conditions.TextEncoder | None = None
    null: jax.Array | None = None  # the empty caption as the data have it: [M] int32, [M, D] f16
    lpips: dict | None = None  # its parameters
    records: dict[str, jax.Array] | None = None  # all moments, and their labels or captions

    def with_records(
        self, config: ConfigDict, mesh: jax.sharding.Mesh, source: sources.Source
    ) -> "Frozen":
        """The same with all of a source on the devices, where latents.source is 'device'.

        Raises: as `load_moments`, if they do not fit.
        """
        if config.latents.source != "device":
            return self
        return self.replace(records=device.load_moments(mesh, source))


def load_frozen(
    config: ConfigDict, mesh: jax.sharding.Mesh, metadata: dict | None = None
) -> tuple[ConfigDict, Frozen]:
    """Returns the config with what only data and networks know, and the networks on the mesh.

    Each network is read once, and compared with the digest that the config or the data record.
    Args: metadata, of the moments that the run trains on.
    Raises: as `resolve`, `load_run_vae`, `conditions.resolve` and `checkpoint.load_model`.
    """
    metadata = metadata or {}
    draws = config.sample_every_steps or config.get("fid", {}).get("every_steps", 0)
    config = loading.resolve(config, metadata)
    config, text_encoder = conditions.resolve(config, metadata, mesh)
    vae = None
    if config.latents.source != "pixels" and config.latents.vae:
        vae = loading.load_run_vae(config, mesh)
        if config.latents.source == "images":  # nothing else has recorded which one it is
            recorded = dict(vae_digest=vae.digest, published=vae.published)
            config = loading.resolve(config, recorded)
        elif not draws:  # its digest was asked for, and memory is dear
            vae = None
    null = None
    if config.model.get("condition", "label") != "label":
        null = jnp.asarray(conditions.from_captions(config, [""]).cond)  # [1, M]
        if config.text.stored:
            null = text_encoder(null).astype(jnp.float16)  # [1, M, D], as captions are stored
        null = jax.device_put(null[0], sharding.replicated(mesh))
    if config.get("text", {}).get("stored") and not draws:
        text_encoder = None
    lpips = None
    if config.get("autoencoder", {}).get("lpips_weight"):
        workdir = files.to_path(config.autoencoder.lpips, "autoencoder.lpips")
        _, lpips = checkpoint.load_model(workdir, mesh, config.model.dtype, "lpips")
    return config, Frozen(vae, text_encoder, null, lpips)
