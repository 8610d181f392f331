"""Inception-2015, whose features the published FID, sFID and Inception Score are computed from.

TensorFlow's classifier of 2015-12-05, which is not torchvision's Inception v3: other weights, 1008
classes, average pools that leave the padding out, and a max pool in the last block. Every module
has the name it has in PyTorch's copies of the weights, so that import is one rule; the batch norms
are part of the convolutions.
Source: Szegedy et al. 2016, table 1; the pools are those of pytorch-fid and torch-fidelity.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.models import layers

SIZE = 299  # pixels of a side, after the resize
CLASSES = 1008
# What sFID is computed from: mixed_6/conv of TensorFlow's graph after its ReLU, which is branch1x1
# here, so these are the block's first channels too.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
MAX_POOLED = ("Mixed_7c",)  # in branch_pool; the paper has an average there, as in the others

# Blocks: for each branch the convolutions that follow one another, (channels, height, width) of the
# kernel; a tuple of two has both on the same input. A block's output is its branches, one after
# another. branch_pool begins with a pool; of a halving block it is nothing else.
FORK = ((384, 1, 3), (384, 3, 1))
POOL = "branch_pool"


def _at_35(pool):
    return dict(
        branch1x1=[(64, 1, 1)],
        branch5x5=[(48, 1, 1), (64, 5, 5)],
        branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        branch_pool=[(pool, 1, 1)],
    )


def _at_17(width):
    tall, wide = (width, 7, 1), (width, 1, 7)
    return dict(
        branch1x1=[(192, 1, 1)],
        branch7x7=[(width, 1, 1), wide, (192, 7, 1)],
        branch7x7dbl=[(width, 1, 1), tall, wide, tall, (192, 1, 7)],
        branch_pool=[(192, 1, 1)],
    )


AT_8 = dict(
    branch1x1=[(320, 1, 1)],
    branch3x3=[(384, 1, 1), FORK],
    branch3x3dbl=[(448, 1, 1), (384, 3, 3), FORK],
    branch_pool=[(192, 1, 1)],
)
BLOCKS = {
    "Mixed_5b": _at_35(32),
    "Mixed_5c": _at_35(64),
    "Mixed_5d": _at_35(64),
    "Mixed_6a": dict(  # 35 to 17
        branch3x3=[(384, 3, 3)],
        branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        branch_pool=[],
    ),
    "Mixed_6b": _at_17(128),
    "Mixed_6c": _at_17(160),
    "Mixed_6d": _at_17(160),
    "Mixed_6e": _at_17(192),
    "Mixed_7a": dict(  # 17 to 8
        branch3x3=[(192, 1, 1), (320, 3, 3)],
        branch7x7x3=[(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
        branch_pool=[],
    ),
    "Mixed_7b": AT_8,
    "Mixed_7c": AT_8,
}


def resize_bilinear_tf1(x: jax.Array, size: int) -> jax.Array:
    """TensorFlow 1's resize_bilinear: neither aligned corners nor half-pixel centres.

    Output pixel i is the input at i * H / size, between two of its pixels: an enlarged picture
    repeats its last row, and one made smaller leaves pixels out.

    Args: x [B, H, W, C] f32.
    Returns: [B, size, size, C] f32.
    """
    # Gathers of known positions: 0.14 ms for an image of 256 pixels on two CPU cores, where
    # products with two matrices of weights took 2.3 ms; not measured on accelerators.
    for axis in (1, 2):
        low, high, fraction = _taps(x.shape[axis], size)
        fraction = np.expand_dims(fraction, [i for i in range(x.ndim) if i != axis])
        a, b = (jnp.take(x, index, axis, mode="clip") for index in (low, high))
        x = a + (b - a) * fraction
    return x


def _taps(length, size):
    """Of each output pixel, the input pixels on both sides and how far it is from the first."""
    at = np.arange(size, dtype=np.float32) * np.float32(length / size)  # f32, as in the graph
    low = at.astype(np.int32)
    return low, np.minimum(low + 1, length - 1), at - low


class Inception(nn.Module):
    """Images to the features of the published measures."""

    dtype: str  # of the activations; parameters and outputs are f32

    def example_inputs(self) -> tuple[jax.Array]:
        """The smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, 1, 1, 3), jnp.uint8),)

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Of the products: for f32 the highest, whatever the caller's; None is the caller's."""
        return jax.lax.Precision.HIGHEST if self.dtype == "float32" else None

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        """Args: image [B, H, W, 3] or [B, H, W, 1] uint8 of any size.

        Returns: f32 arrays: features [B, 2048], TensorFlow's pool_3; spatial [B, 17 * 17 * 7], the
          first channels of its mixed_6/conv, channels last; probabilities [B, 1008], without the
          classifier's bias, as the Inception Score is computed.
        Raises: ValueError for another shape or dtype.
        """
        if image.ndim != 4 or image.shape[-1] not in (1, 3) or image.dtype != jnp.uint8:
            raise UserError(
                f"images are {image.dtype} {image.shape}; Inception reads uint8 [B, H, W, 3] or "
                "[B, H, W, 1], 0..255."
            )
        conv = functools.partial(_conv, dtype=self.dtype, precision=self.precision)
        h = resize_bilinear_tf1(image.astype(jnp.float32), SIZE)
        h = (jnp.broadcast_to(h, (*h.shape[:-1], 3)) - 128) / 128  # [B, 299, 299, 3]
        h = conv(h, (32, 3, 3), "Conv2d_1a_3x3", stride=2)  # [B, 149, 149, 32]
        h = conv(h, (32, 3, 3), "Conv2d_2a_3x3")  # [B, 147, 147, 32]
        h = conv(h, (64, 3, 3), "Conv2d_2b_3x3", padding="SAME")  # [B, 147, 147, 64]
        h = nn.max_pool(h, (3, 3), (2, 2))  # [B, 73, 73, 64]
        h = conv(h, (80, 1, 1), "Conv2d_3b_1x1")  # [B, 73, 73, 80]
        h = conv(h, (192, 3, 3), "Conv2d_4a_3x3")  # [B, 71, 71, 192]
        h = nn.max_pool(h, (3, 3), (2, 2))  # [B, 35, 35, 192]
        for name in BLOCKS:
            h = Block(self.dtype, self.precision, name=name)(h)
            if name == SPATIAL_BLOCK:
                spatial = h[..., :SPATIAL_CHANNELS].astype(jnp.float32)  # [B, 17, 17, 7]
        features = jnp.mean(h, axis=(1, 2), dtype=jnp.float32)  # [B, 2048] of [B, 8, 8, 2048]
        logits = nn.Dense(CLASSES, use_bias=False, precision=self.precision, name="fc")(features)
        return {
            "features": features,
            "spatial": spatial.reshape(len(spatial), -1),
            "probabilities": nn.softmax(logits),
        }


class Block(nn.Module):
    """The block of BLOCKS that has its name."""

    dtype: str
    precision: jax.lax.Precision | None

    @nn.compact
    def __call__(self, x):
        branches = BLOCKS[self.name]
        halves = not branches[POOL]
        conv = functools.partial(_conv, dtype=self.dtype, precision=self.precision)
        outputs = []
        for branch, kernels in branches.items():
            h = _pool(x, self.name, halves) if branch == POOL else x
            for i, kernel in enumerate(kernels, 1):
                name = branch if len(kernels) == 1 else f"{branch}_{i}"
                if kernel is FORK:
                    a = conv(h, FORK[0], f"{name}a", padding="SAME")
                    b = conv(h, FORK[1], f"{name}b", padding="SAME")
                    h = jnp.concatenate([a, b], axis=-1)
                elif halves and i == len(kernels):
                    h = conv(h, kernel, name, stride=2)
                else:
                    h = conv(h, kernel, name, padding="SAME")
            outputs.append(h)
        return jnp.concatenate(outputs, axis=-1)


def _conv(h, kernel, name, *, stride=1, padding="VALID", dtype, precision):
    width, *window = kernel
    conv = nn.Conv(width, window, stride, padding, dtype=dtype, precision=precision, name=name)
    return nn.relu(conv(h))


def _pool(h, block, halves):
    if halves:
        return nn.max_pool(h, (3, 3), (2, 2))
    if block in MAX_POOLED:
        return nn.max_pool(h, (3, 3), padding="SAME")
    return nn.avg_pool(h, (3, 3), padding="SAME", count_include_pad=False)


def from_config(config) -> Inception:
    """The module that `config.model` of a feature extractor describes.

    Raises: ValueError for an unknown dtype.
    """
    layers.check_dtype(config.dtype)
    return Inception(config.dtype)
