"""Inception-2015, whose features the published FID, sFID and Inception Score are computed from.

This is TensorFlow's classifier of 2015-12-05, not torchvision's Inception v3. The differences are
the weights, 1008 classes, average pools that leave the padding out, and a max pool in the last
block. Modules have the same names as in PyTorch's copies of the weights, so that one rule imports
them. The batch norms are folded into the convolutions.
Source: Szegedy et al. 2016, table 1; for the pools, pytorch-fid and torch-fidelity.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.models import layers

SIZE = 299  # side of an image after the resize, in pixels
CLASSES = 1008
# sFID is computed from mixed_6/conv of TensorFlow's graph, after the ReLU. Here this is branch1x1,
# the first branch, so these are the first channels of the block.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
MAX_POOLED = ("Mixed_7c",)  # blocks with a max pool in branch_pool; the paper's is an average pool

# A block maps each branch to its convolutions in order: (channels, height, width) of each kernel.
# The outputs of all branches are concatenated. FORK is two convolutions of the same input.
# branch_pool begins with a pool; in a block that halves the size, the pool is the whole branch.
FORK = ((384, 1, 3), (384, 3, 1))
POOL = "branch_pool"


def _make_block_35(pool_channels):
    """Returns a block for 35 x 35 positions; branch_pool has pool_channels."""
    return dict(
        branch1x1=[(64, 1, 1)],
        branch5x5=[(48, 1, 1), (64, 5, 5)],
        branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        branch_pool=[(pool_channels, 1, 1)],
    )


def _make_block_17(channels):
    """Returns a block for 17 x 17 positions; `channels` are those inside a branch."""
    tall, wide = (channels, 7, 1), (channels, 1, 7)
    return dict(
        branch1x1=[(192, 1, 1)],
        branch7x7=[(channels, 1, 1), wide, (192, 7, 1)],
        branch7x7dbl=[(channels, 1, 1), tall, wide, tall, (192, 1, 7)],
        branch_pool=[(192, 1, 1)],
    )


BLOCK_8 = dict(  # for 8 x 8 positions
    branch1x1=[(320, 1, 1)],
    branch3x3=[(384, 1, 1), FORK],
    branch3x3dbl=[(448, 1, 1), (384, 3, 3), FORK],
    branch_pool=[(192, 1, 1)],
)
BLOCKS = {
    "Mixed_5b": _make_block_35(32),
    "Mixed_5c": _make_block_35(64),
    "Mixed_5d": _make_block_35(64),
    "Mixed_6a": dict(  # 35 to 17
        branch3x3=[(384, 3, 3)],
        branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        branch_pool=[],
    ),
    "Mixed_6b": _make_block_17(128),
    "Mixed_6c": _make_block_17(160),
    "Mixed_6d": _make_block_17(160),
    "Mixed_6e": _make_block_17(192),
    "Mixed_7a": dict(  # 17 to 8
        branch3x3=[(192, 1, 1), (320, 3, 3)],
        branch7x7x3=[(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
        branch_pool=[],
    ),
    "Mixed_7b": BLOCK_8,
    "Mixed_7c": BLOCK_8,
}


def resize_bilinear_tf1(x: jax.Array, size: int) -> jax.Array:
    """Resizes as TensorFlow 1's resize_bilinear: no aligned corners, no half-pixel centres.

    Output pixel i is interpolated at the input position i * H / size. So a larger image repeats its
    last row, and a smaller image leaves pixels out.

    Args: x [B, H, W, C] f32.
    Returns: [B, size, size, C] f32.
    """
    # For an image of 256 pixels on two CPU cores, gathers took 0.14 ms, and products with two
    # matrices of weights 2.3 ms. Accelerators were not measured.
    for axis in (1, 2):
        # Positions are f32, as in TensorFlow's graph.
        position = np.arange(size, dtype=np.float32) * np.float32(x.shape[axis] / size)
        low = position.astype(np.int32)
        fraction = np.expand_dims(position - low, [i for i in range(x.ndim) if i != axis])
        # Beyond the last pixel, mode "clip" repeats it.
        x_low, x_high = (jnp.take(x, index, axis, mode="clip") for index in (low, low + 1))
        x = x_low + (x_high - x_low) * fraction
    return x


class Inception(nn.Module):
    """The classifier, which gives the features of the published measures."""

    dtype: str  # of the activations; parameters and outputs are f32

    def example_inputs(self) -> tuple[jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, 1, 1, 3), jnp.uint8),)

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        """Computes features and class probabilities of images.

        Args: image, [B, H, W, 3] or grey [B, H, W, 1], uint8, of any size.
        Returns:
          f32 arrays: 'features' [B, 2048], TensorFlow's pool_3; 'spatial' [B, 17 * 17 * 7], the
          first channels of TensorFlow's mixed_6/conv, channels last; 'probabilities' [B, 1008],
          without the classifier's bias, as for the Inception Score.
        Raises: ValueError for another shape or dtype.
        """
        if image.ndim != 4 or image.shape[-1] not in (1, 3) or image.dtype != jnp.uint8:
            raise UserError(
                f"image has shape {image.shape} and dtype {image.dtype}; Inception takes uint8 of "
                "shape [B, H, W, 3] or [B, H, W, 1]."
            )
        with layers.product_precision(self.dtype):
            return self._classify(image)

    def _classify(self, image):
        conv = functools.partial(_conv, dtype=self.dtype)
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
            h = Block(self.dtype, name=name)(h)
            if name == SPATIAL_BLOCK:
                spatial = h[..., :SPATIAL_CHANNELS].astype(jnp.float32)  # [B, 17, 17, 7]
        features = jnp.mean(h, axis=(1, 2), dtype=jnp.float32)  # [B, 8, 8, 2048] -> [B, 2048]
        logits = nn.Dense(CLASSES, use_bias=False, name="fc")(features)
        return {
            "features": features,
            "spatial": spatial.reshape(len(spatial), -1),
            "probabilities": nn.softmax(logits),
        }


class Block(nn.Module):
    """The block that BLOCKS has under the name of this module."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        branches = BLOCKS[self.name]
        halves = not branches[POOL]  # whether this block halves the size
        conv = functools.partial(_conv, dtype=self.dtype)
        outputs = []
        for branch, kernels in branches.items():
            h = _pool(x, self.name, halves) if branch == POOL else x
            for i, kernel in enumerate(kernels, 1):
                name = branch if len(kernels) == 1 else f"{branch}_{i}"
                if kernel is FORK:
                    h_a = conv(h, FORK[0], f"{name}a", padding="SAME")
                    h_b = conv(h, FORK[1], f"{name}b", padding="SAME")
                    h = jnp.concatenate([h_a, h_b], axis=-1)
                # In a block that halves the size, the last convolution of a branch has the stride.
                elif halves and i == len(kernels):
                    h = conv(h, kernel, name, stride=2)
                else:
                    h = conv(h, kernel, name, padding="SAME")
            outputs.append(h)
        return jnp.concatenate(outputs, axis=-1)


def _conv(h, kernel, name, *, stride=1, padding="VALID", dtype):
    """Applies a convolution and a ReLU; `kernel` is (channels, height, width)."""
    channels, *window = kernel
    return nn.relu(nn.Conv(channels, window, stride, padding, dtype=dtype, name=name)(h))


def _pool(h, block_name, halves):
    if halves:
        return nn.max_pool(h, (3, 3), (2, 2))
    if block_name in MAX_POOLED:
        return nn.max_pool(h, (3, 3), padding="SAME")
    return nn.avg_pool(h, (3, 3), padding="SAME", count_include_pad=False)


def from_config(config) -> Inception:
    """Builds the module from `config.model` of a feature extractor."""
    return Inception(**config)
