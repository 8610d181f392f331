"""The frozen text encoder of a run, loaded from its workdir."""

import pathlib

import flax.linen as nn
import jax
from flax import struct
from ml_collections import ConfigDict

from dit_jax.errors import UserError
from dit_jax.system import files
from dit_jax.workdirs import checkpoint, digests


@struct.dataclass
class TextEncoder:
    """A frozen text encoder; a pytree of its parameters, so that jitted functions take it."""

    params: dict
    model: nn.Module = struct.field(pytree_node=False)
    digest: str = struct.field(pytree_node=False)  # of the parameters

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Encodes token ids [B, M] as [B, M, D] f32."""
        return self.model.apply({"params": self.params}, tokens)


def get_workdir(config: ConfigDict) -> pathlib.Path:
    """Returns the workdir of the frozen text encoder.

    Raises: ValueError if `text.encoder` is empty.
    """
    if not config.text.encoder:
        raise UserError(
            "text.encoder is empty: model.condition='context' needs the workdir of a text encoder. "
            "python -m dit_jax.convert clip writes one."
        )
    return files.to_path(config.text.encoder, "text.encoder")


def load(config: ConfigDict, mesh: jax.sharding.Mesh, dtype: str | None = None) -> TextEncoder:
    """Loads the frozen encoder of `config.text`, replicated over the mesh.

    Args: dtype, of its activations; None is the model's.
    Raises: as `checkpoint.load_model`; ValueError for an encoder whose width is not
      `model.context_size`, or whose digest is not `text.encoder_digest`, if that is set.
    """
    workdir = get_workdir(config)
    model, params = checkpoint.load_model(workdir, mesh, dtype or config.model.dtype, "clip")
    if model.hidden_size != config.model.context_size:
        raise UserError(
            f"text.encoder={workdir} is {model.hidden_size} wide, but the model was built for "
            f"model.context_size={config.model.context_size}."
        )
    digest = digests.digest(params)
    # An empty digest accepts any encoder: a new run fills it in.
    if config.text.encoder_digest not in ("", digest):
        raise UserError(
            f"text.encoder={workdir} has digest {digest}, but text.encoder_digest="
            f"{config.text.encoder_digest} is of another text encoder, whose outputs "
            "the model is trained on. Give the workdir of that encoder."
        )
    return TextEncoder(params, model, digest)
