"""A small transformer that encodes captions and is trained together with the diffusion model."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import blocks, layers


class TextEncoder(nn.Module):
    """Plain blocks over all tokens, including the padding, which shows where the text ends.

    The blocks' parameters are stacked over depth, as in a DiT.
    """

    vocab_size: int
    length: int  # number of tokens of a caption
    hidden_size: int
    depth: int
    num_heads: int
    dtype: str  # of the activations; parameters and output are f32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids [B, M] int32 to [B, M, hidden_size] f32.

        Raises: ValueError if M is not `length`.
        """
        if tokens.shape[1:] != (self.length,):
            raise UserError(
                f"tokens have shape {tokens.shape}; this text encoder takes [B, {self.length}]."
            )
        embed = nn.Embed(
            self.vocab_size,
            self.hidden_size,
            # With a smaller deviation, embeddings would vanish beside the outputs of the blocks.
            embedding_init=nn.initializers.normal(1.0),
            name="token_embedding",
        )
        shape = (self.length, self.hidden_size)
        position = self.param("position_embedding", layers.normal_002, shape)
        x = (embed(tokens) + position[None]).astype(self.dtype)  # [B, M, D]
        fields = self.num_heads, 4.0, self.dtype, "xla"
        x, _ = layers.stack(blocks.InContextBlock, self.depth)(*fields, name="blocks")(x)
        return layers.LayerNorm(name="final_norm")(x).astype(jnp.float32)
