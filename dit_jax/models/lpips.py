"""LPIPS, a distance between images in the features of VGG-16, for training autoencoders.

Sources: Zhang et al. 2018, eq. 1; Simonyan & Zisserman 2015, configuration D, for VGG-16.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Output channels of the convolutions in each stage. The last output of each stage is compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# (x - SHIFT) / SCALE maps pixels in [-1, 1] to the normalised pixels on which VGG was trained.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """A trained linear function of the squared differences of VGG's normalised features."""

    dtype: str  # of the activations; parameters and the distance are f32

    def example_inputs(self) -> tuple[jax.Array, jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        return jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3))

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes the distances [B] f32 between the images of two batches.

        Args: x, y, [B, H, W, 3] or grey [B, H, W, 1] in [-1, 1], at least 16 pixels high and wide.
        """
        # Concatenated into one batch, so that VGG is compiled and run once.
        h = jnp.concatenate([x, y])
        h = (h - jnp.array(SHIFT).reshape(1, 1, 1, 3)) / jnp.array(SCALE).reshape(1, 1, 1, 3)
        distance, index = jnp.zeros(len(x)), 0
        for stage, all_channels in enumerate(STAGES):
            if stage > 0:
                h = nn.max_pool(h, (2, 2), (2, 2))
                index += 1
            for channels in all_channels:
                name = f"features_{index}"  # the published index, which counts ReLU and pooling too
                h = nn.relu(nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, name=name)(h))
                index += 2
            features = h.astype(jnp.float32)
            features /= jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-10
            squared_difference = (features[: len(x)] - features[len(x) :]) ** 2
            weighted = nn.Dense(1, use_bias=False, name=f"lin{stage}")(squared_difference)
            distance += jnp.mean(weighted, axis=(1, 2, 3))
        return distance


def from_config(config) -> LPIPS:
    """Builds the module from `config.model` of a perceptual distance."""
    return LPIPS(**config)
