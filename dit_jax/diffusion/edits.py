"""Edits of images by sampling: image-to-image, inpainting, interpolation and given noise.

An edit changes the noise, the prediction, the start of sampling, its steps or its result. All edits
act on x_0, pixels or latents, and work with every process, prediction and sampler.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, solvers

Draw = Callable[[int, jax.Array], jax.Array]  # (i, image numbers) -> their noise i, N(0, I)
Networks = Callable[[jax.Array], list[objectives.Predict]]  # condition -> [unguided, guided]


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """Plain sampling from noise, and the base class: an edit overrides some of its methods.

    The fields of an edit are arrays [B, ...], one row per image.
    """

    def noise(self, draw: Draw, index: jax.Array) -> Callable[[int], jax.Array]:
        """Returns the function that draws noise: 0 is for x_T, i + 1 is for step i."""
        return lambda i: draw(i, index)

    def predict(self, networks: Networks, cond: jax.Array) -> list[objectives.Predict]:
        """Returns the networks to sample with: [unguided, guided]."""
        return networks(cond)

    def begin(self, process: processes.Process, t: float, noise: Callable) -> jax.Array:
        """Returns x_t at t, the first time of the grid."""
        return process.x_T_std * noise(0)

    def wrap(
        self, denoise: solvers.Denoise, process: processes.Process, times: np.ndarray
    ) -> solvers.Denoise:
        """Returns the denoiser that every step uses."""
        return denoise

    def finish(self, x_0: jax.Array) -> jax.Array:
        """Returns the x_0 of the final image."""
        return x_0


@dataclasses.dataclass(frozen=True, eq=False)
class FromNoise(Edit):
    """Sampling from given noise."""

    x_T: jax.Array  # like x_0

    def begin(self, process, t, noise):
        return self.x_T


@dataclasses.dataclass(frozen=True, eq=False)
class ImageToImage(Edit):
    """Sampling from given images, noised to the first time."""

    known: jax.Array  # their x_0

    def begin(self, process, t, noise):
        t = jnp.full(len(self.known), t, jnp.float32)
        return processes.q_sample(process, self.known, t, noise(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Inpaint(ImageToImage):
    """Image-to-image that keeps the given images where a mask is 0."""

    mask: jax.Array  # like known or with one channel, 1 where new content is drawn

    def wrap(self, denoise, process, times):
        """Wraps denoise: where the mask is 0 it returns the known x_0, and the eps that fits x_t.

        There, any sampler follows a path of the process that ends at the known x_0. Elsewhere it
        fills in content that goes with it.
        Source: Wang et al. 2023, "DDNM", eq. 12, where the operator is a mask.
        """
        eps_of, mask = solvers.make_eps_fn(process, times), self.mask

        def keep_known(x_t, i):
            denoised = denoise(x_t, i)
            x_0 = mask * denoised.x_0 + (1 - mask) * self.known
            eps = eps_of(x_t, x_0, i)
            return solvers.Denoised(x_0, mask * denoised.eps + (1 - mask) * eps, denoised.variance)

        return keep_known

    def finish(self, x_0):
        # Sampler ddim_level1, and euler_maruyama with last_step none, leave some noise in x_0. The
        # kept part must have none.
        return self.mask * x_0 + (1 - self.mask) * self.known


@dataclasses.dataclass(frozen=True, eq=False)
class Interpolate(Edit):
    """Sampling between two images: interpolates their noise and mixes their predictions."""

    first: jax.Array  # [B] numbers of the first images
    second: jax.Array  # [B] numbers of the second images
    second_cond: jax.Array  # conditions of the second images
    share: jax.Array  # [B] in 0..1, the weight of the second image

    def noise(self, draw, index):
        # `interpolate` expects independent noise. If both images are the same one, their noise is
        # the same too, so it must not be mixed.
        share = self.share * (self.second != self.first)
        return lambda i: interpolate(draw(i, self.first), draw(i, self.second), share)

    def predict(self, networks, cond):
        pairs = zip(networks(cond), networks(self.second_cond), strict=True)
        return [mix(first, second, self.share) for first, second in pairs]


def interpolate(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Interpolates between first and second [B, ...] on a sphere, by share [B] in 0..1 of second.

    For independent N(0, I) inputs the result is N(0, I) too: the squared coefficients add up to 1.
    """
    angle = processes.expand(share, first) * (jnp.pi / 2)
    return jnp.cos(angle) * first + jnp.sin(angle) * second


def mix(
    first: objectives.Predict, second: objectives.Predict, share: jax.Array
) -> objectives.Predict:
    """Mixes two predictions: (1 - share) * first + share * second, with share [B]."""

    def predict(x_t, network_time):
        u = processes.expand(share, x_t)
        return (1 - u) * first(x_t, network_time) + u * second(x_t, network_time)

    return predict
