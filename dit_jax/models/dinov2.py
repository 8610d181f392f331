"""DINOv2's vision transformer, whose features FD-DINOv2 compares, and Pillow's image resize.

Sources: Oquab et al. 2023, "DINOv2", arXiv 2304.07193, for the network. Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion
models", arXiv 2306.04675, for FD-DINOv2; its code, dgm-eval, resizes images with Pillow.
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
WEIGHT_BITS = 22  # fractional bits of the fixed-point weights, as in Pillow
_layer_norm = functools.partial(layers.layer_norm, 1e-6)


def resize(image: jax.Array, size: int) -> jax.Array:
    """Resizes to size x size with an antialiased bicubic filter (a = -1/2).

    The result is bit for bit that of Pillow before version 13. Pillow 13 reverses the order of the
    two passes for some tall images.
    Args: image [B, H, W, C] uint8.   Returns: [B, size, size, C] uint8.
    """
    x = image.astype(jnp.int32)
    # The order of the passes matters, because each pass rounds.
    x = _resize_axis(x, 2, size)  # [B, H, size, C]
    x = _resize_axis(x, 1, size)  # [B, size, size, C]
    return x.astype(jnp.uint8)


def _resize_axis(x, axis, size):
    """Resizes int32 pixels along one axis; the result is rounded and clipped to 0..255."""
    indices, weights = compute_resize_weights(x.shape[axis], size)
    weight_shape = [1] * x.ndim
    weight_shape[axis] = size
    total = jnp.int32(1 << (WEIGHT_BITS - 1))  # makes the shift below round to nearest
    for index, weight in zip(indices.T, weights.T, strict=True):
        total = total + jnp.take(x, index, axis) * weight.reshape(weight_shape)
    return jnp.clip(total >> WEIGHT_BITS, 0, 255)


def compute_resize_weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which input pixels each output pixel averages along an axis, and their weights.

    Args:
      length: number of input pixels.
      size: number of output pixels.
    Returns: indices [size, taps] int32 of input pixels, and weights [size, taps] int32, multiplied
      by 2^22. Pixels outside the image have weight 0.
    """
    stretch = max(length / size, 1.0)  # against aliasing, a smaller image averages more pixels
    center = (np.arange(size) + 0.5) * (length / size)
    first = np.maximum(np.floor(center - 2 * stretch + 0.5), 0).astype(np.int32)
    num_taps = 2 * int(np.ceil(2 * stretch)) + 1
    index = first[:, None] + np.arange(num_taps, dtype=np.int32)[None]
    weight = cubic((index + 0.5 - center[:, None]) / stretch, -0.5) * (index < length)
    weight /= weight.sum(axis=1, keepdims=True)
    fixed_point = np.copysign(np.floor(np.abs(weight) * 2**WEIGHT_BITS + 0.5), weight)
    return np.minimum(index, length - 1), fixed_point.astype(np.int32)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns the cubic convolution kernel at distance x, in pixels.   Source: Keys 1981."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


class LayerScale(nn.Module):
    """Multiplies each channel of x [B, N, D] by a learned factor."""

    @nn.compact
    def __call__(self, x):
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape(1, 1, -1)


class Block(nn.Module):
    """Self-attention and MLP, each between a LayerNorm and a LayerScale."""

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
    """ViT without registers, for images of 224 x 224 pixels in patches of 14 x 14.

    The blocks' parameters are stacked over depth: every leaf under 'blocks' is [L, ...].
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

        Args: image, [B, H, W, 3] or grey [B, H, W, 1], uint8, of any size. It is resized first.
        Returns: 'features' [B, hidden_size] f32, the class token after the last LayerNorm.
        Raises: ValueError for another shape or dtype.
        """
        if image.ndim != 4 or image.shape[-1] not in (1, 3) or image.dtype != jnp.uint8:
            raise UserError(
                f"image has shape {image.shape} and dtype {image.dtype}; DINOv2 takes uint8 of "
                "shape [B, H, W, 3] or [B, H, W, 1]."
            )
        with layers.product_precision(self.dtype):
            return {"features": self._compute_class_token(resize(image, IMAGE_SIZE))}

    def _compute_class_token(self, image):
        x = image.astype(jnp.float32) / 255  # [B, 224, 224, 1 or 3]
        # MEAN has three channels, so a grey image is broadcast to three here.
        x = (x - jnp.array(MEAN).reshape(1, 1, 1, 3)) / jnp.array(STD).reshape(1, 1, 1, 3)
        x = dit.patchify(x, PATCH_SIZE)  # [B, 256, 14*14*3]
        x = nn.Dense(self.hidden_size, dtype=self.dtype, name="patch_embed")(x)  # [B, 256, D]
        normal, size = layers.normal_002, self.hidden_size
        cls_token = self.param("cls_token", normal, (1, 1, size))
        pos_embed = self.param("pos_embed", normal, (1, 1 + GRID_SIZE**2, size))
        cls_token = jnp.broadcast_to(cls_token.astype(x.dtype), (len(x), 1, size))
        x = jnp.concatenate([cls_token, x], axis=1) + pos_embed.astype(x.dtype)  # [B, 257, D]
        blocks = layers.stack(Block, self.depth)(self.num_heads, self.dtype, name="blocks")
        x, _ = blocks(x)  # [B, 257, D]
        return _layer_norm("float32", "norm")(x[:, 0].astype(jnp.float32))  # [B, D]


def from_config(config) -> DinoV2:
    """Builds the module from `config.model` of a feature extractor.

    Raises: ValueError if num_heads does not divide hidden_size.
    """
    options.check_heads(config.num_heads, config.hidden_size)
    return DinoV2(**config)
