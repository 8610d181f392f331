"""LPIPS: the distance of two images in VGG-16's features, for training autoencoders.

Source: Zhang et al. 2018, eq. 1; the features are Simonyan & Zisserman 2015's configuration D.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Widths of the convolutions of each stage; the last output of a stage is compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# (x - SHIFT) / SCALE maps pixels in [-1, 1] to pixels as in VGG's training.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """A distance: trained linear weights on squared differences of VGG's normalised features."""

    dtype: str  # of the activations; parameters and the distance are f32

    def example_inputs(self) -> tuple[jax.Array, jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        return jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3))

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes the distance of x and y.

        Args: x, y [B, H, W, 3] or [B, H, W, 1] in [-1, 1], at least 16 pixels high and wide.
        Returns: [B] f32.
        """
        # Both images are one batch, so that VGG is compiled and run once.
        h = jnp.concatenate([x, y])
        h = (h - jnp.array(SHIFT).reshape(1, 1, 1, 3)) / jnp.array(SCALE).reshape(1, 1, 1, 3)
        distance, index = jnp.zeros(len(x)), 0
        for stage, widths in enumerate(STAGES):
            if stage:
                h, index = nn.max_pool(h, (2, 2), (2, 2)), index + 1
            for width in widths:
                name = f"features_{index}"  # the published index, which counts ReLU and pooling too
                h = nn.relu(nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=name)(h))
                index += 2
            features = h.astype(jnp.float32)
            unit = features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-10)
            difference = (unit[: len(x)] - unit[len(x) :]) ** 2
            weighted = nn.Dense(1, use_bias=False, name=f"lin{stage}")(difference)
            distance += jnp.mean(weighted, axis=(1, 2, 3))
        return distance


def from_config(config) -> LPIPS:
    """Builds the module that `config.model` of a perceptual distance describes."""
    return LPIPS(**config)
