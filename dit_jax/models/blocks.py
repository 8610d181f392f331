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
        mlp = layers.Mlp(mlp_size(x.shape[-1], self.mlp_ratio), self.dtype, name="mlp")
        return sharding.pin_batch(mlp(sharding.pin_batch(x)))


class InContextBlock(_Block):
    """Plain block of a ViT. Time and label are tokens of x, like the image's patches."""

    @nn.compact
    def __call__(self, x):
        x = _pin_stream(x)
        x = x + self.self_attend(layers.LayerNorm(name="norm1")(x))
        x = x + self.feed_forward(layers.LayerNorm(name="norm2")(x))
        return x, None  # nn.scan expects (carry, output)


class CrossAttentionBlock(_Block):
    """Plain block with cross-attention to a context [B, M, D] before the MLP; M may vary."""

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
        # Initialised like every other Linear: the paper starts it at zero for adaLN-Zero only.
        modulation = _modulation(c, 4, self.dtype, layers.xavier_uniform)
        shift_a, scale_a, shift_m, scale_m = modulation
        x = x + self.self_attend(layers.modulated_layer_norm(x, shift_a, scale_a))
        x = x + self.feed_forward(layers.modulated_layer_norm(x, shift_m, scale_m))
        return x, None


class AdaLNZeroBlock(_Block):
    """Self-attention and MLP, modulated and gated by c [B, D]; the identity at initialisation."""

    @nn.compact
    def __call__(self, x, c):
        x = _pin_stream(x)
        modulation = _modulation(c, 6, self.dtype, nn.initializers.zeros)  # all gates begin at 0
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        attended = self.self_attend(layers.modulated_layer_norm(x, shift_a, scale_a))
        x = x + gate_a[:, None] * attended
        mixed = self.feed_forward(layers.modulated_layer_norm(x, shift_m, scale_m))
        x = x + gate_m[:, None] * mixed
        return x, None


BLOCKS = {
    "in-context": InContextBlock,
    "cross-attention": CrossAttentionBlock,
    "adaLN": AdaLNBlock,
    "adaLN-Zero": AdaLNZeroBlock,
}


def mlp_size(hidden_size: int, mlp_ratio: float) -> int:
    """Returns how many hidden channels a block's MLP has.   Raises: ValueError if it has none."""
    size = int(hidden_size * mlp_ratio)
    if size < 1:
        raise UserError(
            f"{mlp_ratio=} gives an MLP without channels for {hidden_size=}. It must be at least "
            f"1 / {hidden_size}; DiT takes 4."
        )
    return size


class FinalLayer(nn.Module):
    """LayerNorm and a Linear from tokens to patches; returns 0 at initialisation.

    If c [B, D] is given, it modulates the LayerNorm.
    """

    output_size: int  # values in a patch
    dtype: str

    @nn.compact
    def __call__(self, x, c=None):
        zeros = nn.initializers.zeros
        if c is None:
            x = layers.LayerNorm(name="norm")(x)
        else:
            x = layers.modulated_layer_norm(x, *_modulation(c, 2, self.dtype, zeros))
        return nn.Dense(self.output_size, dtype=self.dtype, kernel_init=zeros, name="linear")(x)


def _pin_stream(x: jax.Array) -> jax.Array:
    """Pins the residual stream [B, N, D] that enters a block to the mesh, in row-major layout."""
    # Otherwise XLA on GPUs stores it with the batch axis innermost, which costs transposes.
    return with_layout_constraint(sharding.pin_batch(x), Layout((0, 1, 2)))


def _modulation(c: jax.Array, num_parts: int, dtype: str, kernel_init) -> list[jax.Array]:
    """Applies SiLU and the Linear 'adaLN_modulation' to c [B, D]; returns num_parts [B, D]."""
    linear = nn.DenseGeneral(
        (num_parts, c.shape[-1]), dtype=dtype, kernel_init=kernel_init, name="adaLN_modulation"
    )
    modulation = linear(nn.silu(c))  # [B, num_parts, D]
    return [modulation[:, i] for i in range(num_parts)]
