"""DINOv2's vision transformer, whose features FD-DINOv2 compares, and its resize of images.

Sources: Oquab et al. 2023, "DINOv2", arXiv 2304.07193; Stein et al. 2023, "Exposing flaws of
generative model evaluation metrics and their unfair treatment of diffusion models", arXiv
2306.04675, which resizes images with Pillow.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.models import dit, layers, options

IMAGE_SIZE, PATCH_SIZE = 224, 14
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE
# Mean and standard deviation of ImageNet's pixels in [0, 1], per channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHT_BITS = 22  # fraction bits of Pillow's fixed-point weights
_layer_norm = functools.partial(layers.layer_norm, 1e-6)


def resize(image: jax.Array, size: int) -> jax.Array:
    """Resizes to size x size by antialiased bicubic (a = -1/2), equal to Pillow's in every bit.

    Args: image [B, H, W, C] uint8.   Returns: [B, size, size, C] uint8.
    """
    x = image.astype(jnp.int32)
    # Each pass rounds, so that the order matters. Pillow 13 reverses it for some upright images.
    x = _resample(x, 2, size)  # [B, H, size, C]
    x = _resample(x, 1, size)  # [B, size, size, C]
    return x.astype(jnp.uint8)


def _resample(x, axis, size):
    """Resizes int32 pixels along one axis, rounded and clipped to 0..255."""
    index, weight = resize_taps(x.shape[axis], size)
    along = [1] * x.ndim
    along[axis] = size
    total = jnp.int32(1 << (WEIGHT_BITS - 1))  # makes the shift below round to nearest
    for i, w in zip(index.T, weight.T, strict=True):
        total = total + jnp.take(x, i, axis) * w.reshape(along)
    return jnp.clip(total >> WEIGHT_BITS, 0, 255)


def resize_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of `length` pixels make each of `size` pixels, and their weights times 2^22.

    Returns: index, weight [size, taps] int32; weights of pixels outside the image are 0.
    """
    stretch = max(length / size, 1.0)  # to avoid aliasing, a smaller image uses more pixels
    center = (np.arange(size) + 0.5) * (length / size)
    first = np.maximum(np.floor(center - 2 * stretch + 0.5), 0).astype(np.int32)
    taps = 2 * int(np.ceil(2 * stretch)) + 1
    index = first[:, None] + np.arange(taps, dtype=np.int32)[None]
    weight = cubic((index + 0.5 - center[:, None]) / stretch, -0.5) * (index < length)
    weight /= weight.sum(axis=1, keepdims=True)
    fixed = np.copysign(np.floor(np.abs(weight) * 2**WEIGHT_BITS + 0.5), weight)
    return np.minimum(index, length - 1), fixed.astype(np.int32)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns the cubic convolution kernel, 0 beyond two pixels.   Source: Keys 1981."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


class LayerScale(nn.Module):
    """The product of x [B, N, D] and a learned number per channel."""

    @nn.compact
    def __call__(self, x):
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape(1, 1, -1)


class Block(nn.Module):
    """Self-attention and MLP, each after a LayerNorm, with outputs scaled per channel."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        attn = layers.Attention(self.num_heads, self.dtype, "xla", name="attn")
        x = x + LayerScale(name="ls1")(attn(_layer_norm(self.dtype, "norm1")(x)))
        mlp = layers.Mlp(4 * x.shape[-1], self.dtype, layers.exact_gelu, name="mlp")
        x = x + LayerScale(name="ls2")(mlp(_layer_norm(self.dtype, "norm2")(x)))
        return x, None


class DinoV2(nn.Module):
    """A ViT with patches of 14 pixels and no registers, on images resized to 224 pixels.

    Parameters of the blocks are stacked over depth: every leaf under 'blocks' is [L, ...].
    """

    hidden_size: int
    depth: int
    num_heads: int
    dtype: str  # of the activations; parameters and features are f32

    def example_inputs(self) -> tuple[jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, 1, 1, 3), jnp.uint8),)

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        """Computes the features of images.

        Args: image [B, H, W, 3], or grey [B, H, W, 1], uint8 of any size.
        Returns: 'features' [B, hidden_size] f32, the class token after the last LayerNorm.
        Raises: ValueError for another number of channels or another dtype.
        """
        if image.ndim != 4 or image.shape[-1] not in (1, 3) or image.dtype != jnp.uint8:
            raise UserError(
                f"image has shape {image.shape} and dtype {image.dtype}; DINOv2 takes "
                "[B, H, W, 3] or [B, H, W, 1] of uint8."
            )
        with layers.product_precision(self.dtype):
            return {"features": self._class_token(resize(image, IMAGE_SIZE))}

    def _class_token(self, image):
        x = image.astype(jnp.float32) / 255  # [B, 224, 224, 1 or 3]
        # The means have three channels, so that a grey image is broadcast to three.
        x = (x - jnp.array(MEAN).reshape(1, 1, 1, 3)) / jnp.array(STD).reshape(1, 1, 1, 3)
        x = dit.patchify(x, PATCH_SIZE)  # [B, 256, 14*14*3]
        x = nn.Dense(self.hidden_size, dtype=self.dtype, name="patch_embed")(x)  # [B, 256, D]
        size, normal = self.hidden_size, layers.normal_002
        cls_token = self.param("cls_token", normal, (1, 1, size))
        pos_embed = self.param("pos_embed", normal, (1, 1 + GRID_SIZE**2, size))
        cls_token = jnp.broadcast_to(cls_token.astype(x.dtype), (len(x), 1, size))
        x = jnp.concatenate([cls_token, x], axis=1) + pos_embed.astype(x.dtype)  # [B, 257, D]
        stack = layers.stack(Block, self.depth)(self.num_heads, self.dtype, name="blocks")
        x, _ = stack(x)  # [B, 257, D]
        return _layer_norm("float32", "norm")(x[:, 0].astype(jnp.float32))  # [B, D]


def from_config(config) -> DinoV2:
    """Builds the module that `config.model` of a feature extractor describes.

    Raises: ValueError for heads that do not divide the width.
    """
    options.check_heads(config.num_heads, config.hidden_size)
    return DinoV2(**config)
