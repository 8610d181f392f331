"""AutoencoderKL, which maps images to the moments of a posterior, and latents to images.

Modules have the same names as in diffusers' checkpoints, so that one rule imports them. The height
and the width of latents are those of the image divided by 2^(levels - 1).
Source: Rombach et al. 2022, appendix G.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import sizes
from dit_jax.errors import UserError
from dit_jax.models import layers


class AutoencoderKL(nn.Module):
    """The encoder and the decoder."""

    image_channels: int
    latent_channels: int
    block_channels: tuple[int, ...]  # channels of each level, from the image to the latents
    layers_per_block: int  # residual blocks in a level of the encoder; the decoder has one more
    norm_groups: int
    use_quant_conv: bool  # 1x1 convolutions between encoder, latents and decoder
    mid_attention: bool
    dtype: str  # of the activations; parameters, norm statistics and outputs are f32
    remat: bool  # recompute the residual blocks in the backward pass

    def setup(self):
        sizes = self.block_channels, self.layers_per_block, self.norm_groups
        fields = *sizes, self.mid_attention, self.dtype, self.remat
        self.encoder = Encoder(*fields, out_channels=2 * self.latent_channels)
        self.decoder = Decoder(*fields, out_channels=self.image_channels)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

    def example_inputs(self) -> tuple[jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, self.factor, self.factor, self.image_channels)),)

    @property
    def factor(self) -> int:
        """The number of pixels per latent along a side."""
        return 2 ** (len(self.block_channels) - 1)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape (h, w, latent_channels) of the latents of an image (H, W, channels).

        Raises: ValueError for other channels, or a size that `factor` does not divide.
        """
        *size, channels = image_shape
        if channels != self.image_channels or any(side % self.factor for side in size):
            raise UserError(
                f"the VAE takes images of {self.image_channels} channels and sides that are "
                f"multiples of {self.factor}, not {sizes.show(image_shape)}. Set "
                "data.image_channels and data.image_size, or take another VAE."
            )
        return *(side // self.factor for side in size), self.latent_channels

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape (H, W, image_channels) of the image of latents (h, w, channels)."""
        return *(side * self.factor for side in latent_shape[:-1]), self.image_channels

    def encode(self, image: jax.Array) -> jax.Array:
        """Maps images [B, H, W, image_channels] f32 in [-1, 1] to moments [B, h, w, 2C] f32.

        The moments are the mean and the log-variance of the posterior, unscaled.
        Raises: as `latent_shape`.
        """
        self.latent_shape(image.shape[1:])  # raises unless the images fit
        moments = self.encoder(image).astype(jnp.float32)
        return self.quant_conv(moments) if self.use_quant_conv else moments

    def decode(self, z: jax.Array) -> jax.Array:
        """Maps latents [B, h, w, C] f32, unscaled, to images [B, H, W, image_channels] f32."""
        if z.shape[-1] != self.latent_channels:
            raise UserError(f"z has shape {z.shape}; the VAE has {self.latent_channels} channels.")
        z = self.post_quant_conv(z) if self.use_quant_conv else z
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Decodes the posterior's mean. Initialisation needs a call of all modules."""
        mean, _ = jnp.split(self.encode(image), 2, axis=-1)
        return self.decode(mean)


class _Coder(nn.Module):
    """The base class of the encoder and the decoder: fields, middle blocks and output layers."""

    block_channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    mid_attention: bool
    dtype: str
    remat: bool
    out_channels: int

    def apply_middle(self, x):
        fields = self.norm_groups, self.mid_attention, self.dtype, self.remat
        return MidBlock(*fields, name="mid_block")(x)

    def apply_output(self, x):
        x = nn.silu(_norm(self.norm_groups, self.dtype, "conv_norm_out")(x))
        return _conv(self.out_channels, self.dtype, "conv_out")(x)


class Encoder(_Coder):
    """Levels of residual blocks; the size is halved after every level but the last."""

    @nn.compact
    def __call__(self, x):
        block = _make_block_fn(self.norm_groups, self.dtype, self.remat)
        x = _conv(self.block_channels[0], self.dtype, "conv_in")(x)  # [B, H, W, D_0]
        for i, channels in enumerate(self.block_channels):
            for j in range(self.layers_per_block):
                x = block(channels, name=f"down_blocks_{i}_resnets_{j}")(x)
            if i < len(self.block_channels) - 1:
                x = Downsample(self.dtype, name=f"down_blocks_{i}_downsamplers_0")(x)
        x = self.apply_middle(x)
        return self.apply_output(x)  # [B, h, w, 2C]


class Decoder(_Coder):
    """Levels of residual blocks, last to first; the size is doubled after all but the first."""

    @nn.compact
    def __call__(self, x):
        block = _make_block_fn(self.norm_groups, self.dtype, self.remat)
        x = _conv(self.block_channels[-1], self.dtype, "conv_in")(x)  # [B, h, w, D_last]
        x = self.apply_middle(x)
        for i, channels in enumerate(reversed(self.block_channels)):
            for j in range(self.layers_per_block + 1):
                x = block(channels, name=f"up_blocks_{i}_resnets_{j}")(x)
            if i < len(self.block_channels) - 1:
                x = Upsample(self.dtype, name=f"up_blocks_{i}_upsamplers_0")(x)
        return self.apply_output(x)  # [B, H, W, image channels]


class MidBlock(nn.Module):
    """A residual block, optional attention over all positions, and another residual block."""

    groups: int
    attention: bool
    dtype: str
    remat: bool

    @nn.compact
    def __call__(self, x):
        block = _make_block_fn(self.groups, self.dtype, self.remat)
        x = block(x.shape[-1], name="resnets_0")(x)
        if self.attention:
            x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return block(x.shape[-1], name="resnets_1")(x)


class ResnetBlock(nn.Module):
    """x + a branch with two convolutions; if the channels change, x passes a 1x1 convolution."""

    channels: int
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        h = nn.silu(_norm(self.groups, self.dtype, "norm1")(x))
        h = _conv(self.channels, self.dtype, "conv1")(h)
        h = nn.silu(_norm(self.groups, self.dtype, "norm2")(h))
        h = _conv(self.channels, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention with one head over all positions; softmax in f32."""

    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = _norm(self.groups, self.dtype, "group_norm")(x)
        h = h.reshape(batch, height * width, 1, channels)  # [B, N, one head, D]
        q, k, v = (nn.Dense(channels, dtype=self.dtype, name=f"to_{part}")(h) for part in "qkv")
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + nn.Dense(channels, dtype=self.dtype, name="to_out_0")(h)


class Downsample(nn.Module):
    """A strided convolution that halves the size, with padding only at the bottom and the right."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        padding = ((0, 1), (0, 1))  # as in the published code
        return _conv(x.shape[-1], self.dtype, "conv", strides=2, padding=padding)(x)


class Upsample(nn.Module):
    """Doubles the size by repeating every value, then applies a convolution."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        return _conv(x.shape[-1], self.dtype, "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


def _make_block_fn(groups, dtype, remat):
    """Returns a maker of residual blocks; with `remat`, the backward pass recomputes them."""
    block = nn.remat(ResnetBlock) if remat else ResnetBlock
    return functools.partial(block, groups=groups, dtype=dtype)


def _conv(channels, dtype, name, strides=1, padding=1):
    return nn.Conv(channels, (3, 3), strides, padding, dtype=dtype, name=name)


def _norm(groups, dtype, name):
    return layers.group_norm(groups, 1e-6, dtype, name)


def from_config(config) -> AutoencoderKL:
    """Builds the module from `config.model` of a VAE.

    Raises: ValueError if block_channels is empty, or norm_groups does not divide its values.
    """
    norm_groups = config.norm_groups
    if not config.block_channels:
        raise UserError("block_channels=() needs a number for each level.")
    if indivisible := [channels for channels in config.block_channels if channels % norm_groups]:
        raise UserError(f"{norm_groups=} must divide all block_channels, not {indivisible}.")
    return AutoencoderKL(**config)
