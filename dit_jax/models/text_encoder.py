"""A small transformer that reads captions and is trained along with what it tells them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import blocks, layers


class TextEncoder(nn.Module):
    """Plain blocks over all tokens, padding among them: that the text has ended is told too.

    Parameters of the blocks are stacked over depth, as a DiT's.
    """

    vocab_size: int
    length: int  # tokens of a caption
    hidden_size: int
    depth: int
    num_heads: int
    dtype: str  # of the activations; parameters and output are f32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, M] int32 to [B, M, hidden_size] f32."""
        if tokens.shape[1:] != (self.length,):
            raise UserError(f"captions have {tokens.shape[1:]} tokens; the model: {self.length}.")
        embed = nn.Embed(
            self.vocab_size,
            self.hidden_size,
            embedding_init=nn.initializers.normal(1.0),  # or the blocks' sums drown it
            name="token_embedding",
        )
        shape = (self.length, self.hidden_size)
        position = self.param("position_embedding", layers.normal_002, shape)
        x = (embed(tokens) + position[None]).astype(self.dtype)  # [B, M, D]
        stack = nn.scan(
            blocks.InContextBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )(self.num_heads, 4.0, self.dtype, "xla", name="blocks")
        x, _ = stack(x)
        return layers.LayerNorm(name="final_norm")(x).astype(jnp.float32)
