"""The frozen text encoder of a run, from its workdir."""

import flax.linen as nn
import jax
from flax import struct
from ml_collections import ConfigDict

from dit_jax.data import sources
from dit_jax.workdirs import checkpoint, digests


@struct.dataclass
class TextEncoder:
    """A frozen encoder; a tree of its parameters, so that jitted functions take it."""

    params: dict
    model: nn.Module = struct.field(pytree_node=False)
    digest: str = struct.field(pytree_node=False)  # of the parameters

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, M] to [B, M, D] f32."""
        return self.model.apply({"params": self.params}, tokens)


def load_encoder(
    config: ConfigDict, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> TextEncoder | None:
    """The frozen encoder of `config.text`, replicated over the mesh; None if the model needs none.

    Args: dtype, of its activations; None is the model's.
    Raises: as `checkpoint.load_model`; ValueError for an encoder of another width, or another one
      than `config.text.encoder_digest`, if that says which.
    """
    if config.model.condition != "context":
        return None
    workdir = sources.encoder_workdir(config)
    model, params = checkpoint.load_model(workdir, mesh, dtype or config.model.dtype, "clip")
    if model.hidden_size != config.model.context_size:
        raise ValueError(
            f"text.encoder={workdir} is {model.hidden_size} wide, but the model was built for "
            f"model.context_size={config.model.context_size}."
        )
    digest = digests.digest(params)
    if config.text.encoder_digest not in ("", digest):
        raise ValueError(
            f"text.encoder={workdir} has digest {digest}, but text.encoder_digest="
            f"{config.text.encoder_digest} is of another text encoder, whose outputs the model is "
            "trained on: give that one."
        )
    return TextEncoder(params, model, digest)


def resolve(
    config: ConfigDict, recorded: dict, mesh: jax.sharding.Mesh
) -> tuple[ConfigDict, TextEncoder | None]:
    """The config with the frozen encoder's digest, and the encoder; None if the model needs none.

    Args: recorded, the moments' metadata, which names the encoder of stored captions.
    Raises: as `load_encoder`, if it is not that one.
    """
    if config.model.get("condition") != "context":
        return config, None
    config = config.copy_and_resolve_references()
    if config.text.stored and "text_encoder_digest" in recorded:
        config.text.encoder_digest = recorded["text_encoder_digest"]
    encoder = load_encoder(config, mesh)
    config.text.encoder_digest = encoder.digest
    return config, encoder
