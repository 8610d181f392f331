"""Blocks of the UNet: residual, attention and transformer blocks, downsampling and upsampling.

Modules have the same names as in diffusers' checkpoints. At initialisation the last layer of each
residual branch is zero, as in DDPM and ADM: a block returns its input, or its shortcut's output.
Sources: Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, section 3; Rombach et al. 2022, section
3.3 and appendix E.2.1.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax import sharding
from dit_jax.models import layers

TRANSFORMER_NORM_EPSILON = 1e-6  # of the GroupNorm before the transformer blocks
FEED_FORWARD_RATIO = 4
_layer_norm = functools.partial(layers.layer_norm, 1e-5)  # of the transformer blocks
zeros = nn.initializers.zeros


class ResnetBlock(nn.Module):
    """x + a branch with two convolutions; if the channels change, x passes a 1x1 convolution.

    The time embedding [B, 4D] is added after the first convolution, or scales and shifts the second
    norm. With `resample`, x is resampled, and so is the branch before its first convolution.
    """

    channels: int
    groups: int
    epsilon: float
    dropout: float  # rate before the second convolution, if there is a random key 'dropout'
    time_scale_shift: bool
    dtype: str
    resample: Callable | None = None  # `halve` or `double`

    @nn.compact
    def __call__(self, x, t_emb):
        x = sharding.pin_batch(x)
        h = nn.silu(layers.group_norm(self.groups, self.epsilon, self.dtype, "norm1")(x))
        if self.resample:
            x, h = self.resample(x), self.resample(h)
        h = conv(self.channels, self.dtype, "conv1")(h)
        parts = 2 if self.time_scale_shift else 1
        time_emb_proj = linear(parts * self.channels, self.dtype, "time_emb_proj")
        t_emb = time_emb_proj(nn.silu(t_emb))[:, None, None]  # [B, 1, 1, D or 2D]
        norm2 = layers.group_norm(self.groups, self.epsilon, self.dtype, "norm2")
        if self.time_scale_shift:
            scale, shift = jnp.split(t_emb, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + t_emb)
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(nn.silu(h))
        h = conv(self.channels, self.dtype, "conv2", zeros)(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, self.dtype, "conv_shortcut", kernel=1)(x)
        return sharding.pin_batch(x + h)


class AttentionBlock(nn.Module):
    """x + self-attention over all positions, softmax in f32; the context is not used."""

    num_heads: int
    groups: int
    epsilon: float
    dtype: str
    attention: str  # 'xla' or 'cudnn'

    @nn.compact
    def __call__(self, x, context):
        batch, height, width, channels = x.shape
        heads = (batch, height * width, self.num_heads, channels // self.num_heads)
        x = sharding.pin_batch(x)
        h = layers.group_norm(self.groups, self.epsilon, self.dtype, "group_norm")(x)
        h = h.reshape(batch, height * width, channels)  # [B, N, D]
        q, k, v = (
            linear(channels, self.dtype, f"to_{part}")(h).reshape(heads) for part in "qkv"
        )  # [B, N, H, D/H]
        h = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
        h = linear(channels, self.dtype, "to_out_0", zeros)(h.reshape(batch, -1, channels))
        return sharding.pin_batch(x + h.reshape(x.shape))


class SpatialTransformer(nn.Module):
    """x + `depth` transformer blocks over all positions, with a context [B, M, any size]."""

    depth: int
    num_heads: int
    groups: int
    dtype: str
    attention: str  # 'xla' or 'cudnn', of self-attention

    @nn.compact
    def __call__(self, x, context):
        batch, height, width, channels = x.shape
        x = sharding.pin_batch(x)
        h = layers.group_norm(self.groups, TRANSFORMER_NORM_EPSILON, self.dtype, "norm")(x)
        h = h.reshape(batch, height * width, channels)  # [B, N, D]
        h = linear(channels, self.dtype, "proj_in")(h)
        fields = self.num_heads, self.dtype, self.attention
        for i in range(self.depth):
            h = TransformerBlock(*fields, name=f"transformer_blocks_{i}")(h, context)
        h = linear(channels, self.dtype, "proj_out", zeros)(h)
        return sharding.pin_batch(x + h.reshape(x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward, each after a LayerNorm.

    The inputs and outputs of all three are pinned, as in DiT's blocks: see `sharding.pin_batch`.
    """

    num_heads: int
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, x, context):
        attn1 = Attention(self.num_heads, self.dtype, self.attention, name="attn1")
        # With few keys, a fused kernel would save nothing.
        attn2 = Attention(self.num_heads, self.dtype, "xla", name="attn2")
        h = sharding.pin_batch(_layer_norm(self.dtype, "norm1")(x))
        x = x + sharding.pin_batch(attn1(h, h))
        h = sharding.pin_batch(_layer_norm(self.dtype, "norm2")(x))
        x = x + sharding.pin_batch(attn2(h, sharding.pin_batch(context)))
        h = sharding.pin_batch(_layer_norm(self.dtype, "norm3")(x))
        return x + sharding.pin_batch(FeedForward(self.dtype, name="ff")(h))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] to a sequence [B, M, any size]; softmax in f32."""

    num_heads: int
    dtype: str
    implementation: str

    @nn.compact
    def __call__(self, x, sequence):
        size = x.shape[-1]
        project = functools.partial(
            nn.DenseGeneral,
            (self.num_heads, size // self.num_heads),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=layers.xavier_uniform,
        )
        q = project(name="to_q")(x)  # [B, N, H, D/H]
        k, v = project(name="to_k")(sequence), project(name="to_v")(sequence)  # [B, M, H, D/H]
        h = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        return linear(size, self.dtype, "to_out_0")(h.reshape(x.shape))


class FeedForward(nn.Module):
    """GEGLU: Linear(h GELU(gate)), where h and gate are Linears of x, and the GELU is exact."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        h_and_gate = nn.DenseGeneral(
            (2, FEED_FORWARD_RATIO * size),
            dtype=self.dtype,
            kernel_init=layers.xavier_uniform,
            name="net_0_proj",
        )(x)  # [B, N, 2, 4D]
        h, gate = h_and_gate[:, :, 0], h_and_gate[:, :, 1]
        return linear(size, self.dtype, "net_2")(h * layers.exact_gelu(gate))


class MidBlock(nn.Module):
    """A residual block, then attention or transformer blocks, then another residual block."""

    resnet: Callable  # name -> module of (x, t_emb)
    attention: Callable  # name -> module of (x, context)

    @nn.compact
    def __call__(self, x, t_emb, context):
        x = self.resnet(name="resnets_0")(x, t_emb)
        x = self.attention(name="attentions_0")(x, context)
        return self.resnet(name="resnets_1")(x, t_emb)


class Downsample(nn.Module):
    """A strided convolution that halves the size; the time embedding is not used."""

    channels: int
    dtype: str

    @nn.compact
    def __call__(self, x, t_emb):
        return sharding.pin_batch(conv(self.channels, self.dtype, "conv", strides=2)(x))


class Upsample(nn.Module):
    """Doubles the size by repeating every value, then applies a convolution."""

    channels: int
    dtype: str

    @nn.compact
    def __call__(self, x, t_emb):
        return sharding.pin_batch(conv(self.channels, self.dtype, "conv")(double(x)))


class TimeEmbedding(nn.Module):
    """An MLP from the sinusoids of the time [B, D] to [B, 4D], always in f32."""

    size: int

    @nn.compact
    def __call__(self, h):
        h = linear(self.size, "float32", "linear_1")(h)
        return linear(self.size, "float32", "linear_2")(nn.silu(h))


def halve(x: jax.Array) -> jax.Array:
    """Averages 2x2 positions: [B, h, w, D] -> [B, h/2, w/2, D]."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def double(x: jax.Array) -> jax.Array:
    """Repeats every value four times: [B, h, w, D] -> [B, 2h, 2w, D]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def conv(channels, dtype, name, kernel_init=layers.xavier_uniform, kernel=3, strides=1):
    """Returns a convolution that keeps the size, or divides it by the strides."""
    # All sides get the same padding, as in ADM. With strides, "SAME" would pad one side only.
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=strides,
        padding=kernel // 2,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


def linear(size, dtype, name, kernel_init=layers.xavier_uniform):
    """Returns a Linear with `size` outputs."""
    return nn.Dense(size, dtype=dtype, kernel_init=kernel_init, name=name)
