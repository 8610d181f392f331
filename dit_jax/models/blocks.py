"""DiT's final layer and its four blocks, which differ in how time and label enter.

Source: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2, figure 3.
"""

import flax.linen as nn
import jax
from jax.experimental.layout import Layout, with_layout_constraint

from dit_jax import sharding
from dit_jax.errors import UserError
from dit_jax.models import layers


class _Block(nn.Module):
    """Base class of the four blocks: their fields, self-attention 'attn' and MLP 'mlp'.

    Attention and MLP pin their inputs and outputs to the mesh: see `sharding.pin_batch`. Pinning an
    input pins its gradient too.
    """

    num_heads: int
    mlp_ratio: float
    dtype: str
    attention: str  # 'xla' or 'cudnn'

    def self_attend(self, x):
        attn = layers.Attention(self.num_heads, self.dtype, self.attention, name="attn")
        return sharding.pin_batch(attn(sharding.pin_batch(x)))

    def feed_forward(self, x):
        mlp = layers.Mlp(compute_mlp_size(x.shape[-1], self.mlp_ratio), self.dtype, name="mlp")
        return sharding.pin_batch(mlp(sharding.pin_batch(x)))


class InContextBlock(_Block):
    """Plain block of a ViT; the time and the label are tokens of x, beside the image's patches."""

    @nn.compact
    def __call__(self, x):
        x = _pin_stream(x)
        x = x + self.self_attend(layers.LayerNorm(name="norm1")(x))
        x = x + self.feed_forward(layers.LayerNorm(name="norm2")(x))
        return x, None  # nn.scan expects (carry, output)


class CrossAttentionBlock(_Block):
    """Plain block with cross-attention to a context [B, M, D] before the MLP, for any M."""

    @nn.compact
    def __call__(self, x, context):
        x = _pin_stream(x)
        x = x + self.self_attend(layers.LayerNorm(name="norm1")(x))
        cross_attn = layers.CrossAttention(self.num_heads, self.dtype, name="cross_attn")
        attended = cross_attn(layers.LayerNorm(name="norm_cross")(x), context)
        x = x + sharding.pin_batch(attended)
        x = x + self.feed_forward(layers.LayerNorm(name="norm2")(x))
        return x, None


class AdaLNBlock(_Block):
    """Self-attention and MLP, each after a LayerNorm that c [B, D] modulates."""

    @nn.compact
    def __call__(self, x, c):
        x = _pin_stream(x)
        # The paper starts adaLN_modulation at zero for adaLN-Zero only.
        modulation = _compute_modulation(c, 4, self.dtype, layers.xavier_uniform)
        shift_attn, scale_attn, shift_mlp, scale_mlp = modulation
        x = x + self.self_attend(layers.modulated_layer_norm(x, shift_attn, scale_attn))
        x = x + self.feed_forward(layers.modulated_layer_norm(x, shift_mlp, scale_mlp))
        return x, None


class AdaLNZeroBlock(_Block):
    """Self-attention and MLP, modulated and gated by c [B, D]; the identity at initialisation."""

    @nn.compact
    def __call__(self, x, c):
        x = _pin_stream(x)
        zeros = nn.initializers.zeros  # so that both gates are 0, and the block is the identity
        modulation = _compute_modulation(c, 6, self.dtype, zeros)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        h = self.self_attend(layers.modulated_layer_norm(x, shift_attn, scale_attn))
        x = x + gate_attn[:, None] * h
        h = self.feed_forward(layers.modulated_layer_norm(x, shift_mlp, scale_mlp))
        x = x + gate_mlp[:, None] * h
        return x, None


BLOCKS = {
    "in-context": InContextBlock,
    "cross-attention": CrossAttentionBlock,
    "adaLN": AdaLNBlock,
    "adaLN-Zero": AdaLNZeroBlock,
}


def compute_mlp_size(hidden_size: int, mlp_ratio: float) -> int:
    """Returns the number of hidden channels of a block's MLP.   Raises: ValueError if it is 0."""
    size = int(hidden_size * mlp_ratio)
    if size < 1:
        raise UserError(
            f"{mlp_ratio=} gives an MLP without channels for {hidden_size=}. Set mlp_ratio to at "
            f"least 1 / {hidden_size}; DiT has 4."
        )
    return size


class FinalLayer(nn.Module):
    """LayerNorm, modulated by c [B, D] if given, and a Linear to patches; 0 at initialisation."""

    output_size: int  # values in a patch
    dtype: str

    @nn.compact
    def __call__(self, x, c=None):
        zeros = nn.initializers.zeros
        if c is None:
            x = layers.LayerNorm(name="norm")(x)
        else:
            shift, scale = _compute_modulation(c, 2, self.dtype, zeros)
            x = layers.modulated_layer_norm(x, shift, scale)
        return nn.Dense(self.output_size, dtype=self.dtype, kernel_init=zeros, name="linear")(x)


def _pin_stream(x: jax.Array) -> jax.Array:
    """Pins the residual stream [B, N, D] that enters a block to the mesh, in row-major layout."""
    # Otherwise XLA on GPUs stores x with the batch axis innermost, which costs transposes.
    return with_layout_constraint(sharding.pin_batch(x), Layout((0, 1, 2)))


def _compute_modulation(c: jax.Array, num_parts: int, dtype: str, kernel_init) -> list[jax.Array]:
    """Applies SiLU and the Linear 'adaLN_modulation' to c [B, D]; returns num_parts [B, D]."""
    linear = nn.DenseGeneral(
        (num_parts, c.shape[-1]), dtype=dtype, kernel_init=kernel_init, name="adaLN_modulation"
    )
    modulation = linear(nn.silu(c))  # [B, num_parts, D]
    return [modulation[:, i] for i in range(num_parts)]
