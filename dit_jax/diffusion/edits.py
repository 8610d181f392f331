"""Edits of images by sampling: image-to-image, inpainting, interpolation and given noise.

An edit changes the noise, the networks, the first x_t, the denoiser or the final x_0 of sampling.
Here x_0 is pixels or latents. All edits work with every process, prediction and sampler.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, solvers

Draw = Callable[[int, jax.Array], jax.Array]  # (i, image indices [B]) -> noise i of each, N(0, I)
Networks = Callable[[jax.Array], list[objectives.Predict]]  # condition -> [unguided, guided]


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """The base class, which changes nothing: plain sampling from noise.

    The fields of its subclasses are arrays [B, ...], with one row per image.
    """

    def noise(self, draw: Draw, index: jax.Array) -> Callable[[int], jax.Array]:
        """Returns the function noise(i): noise(0) is for x_T, noise(i + 1) for step i."""
        return lambda i: draw(i, index)

    def predict(self, networks: Networks, cond: jax.Array) -> list[objectives.Predict]:
        """Returns the networks with their condition bound: [unguided, guided]."""
        return networks(cond)

    def begin(self, process: processes.Process, t: float, noise: Callable) -> jax.Array:
        """Returns the first x_t, for t = grid[0]."""
        return process.x_T_std * noise(0)

    def wrap(
        self, denoise: solvers.Denoise, process: processes.Process, times: np.ndarray
    ) -> solvers.Denoise:
        """Returns the denoiser that every step uses."""
        return denoise

    def finish(self, x_0: jax.Array) -> jax.Array:
        """Returns the final x_0 from the sampled x_0."""
        return x_0


@dataclasses.dataclass(frozen=True, eq=False)
class FromNoise(Edit):
    """Sampling from given noise."""

    x_T: jax.Array  # like x_0

    def begin(self, process, t, noise):
        return self.x_T


@dataclasses.dataclass(frozen=True, eq=False)
class ImageToImage(Edit):
    """Sampling from given images, with the noise of the grid's first time."""

    known: jax.Array  # x_0 of the given images

    def begin(self, process, t, noise):
        t = jnp.full(len(self.known), t, jnp.float32)
        return processes.q_sample(process, self.known, t, noise(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Inpaint(ImageToImage):
    """Image-to-image that keeps the given images where a mask is 0."""

    mask: jax.Array  # like known or with one channel: 0 keeps the image, 1 draws new content

    def wrap(self, denoise, process, times):
        """Returns denoise with the known x_0, and eps computed from it, where the mask is 0.

        So where the mask is 0, every sampler follows a path of the process to the known x_0.
        Elsewhere it draws content that fits the known part.
        Source: Wang et al. 2023, "DDNM", eq. 12, with a mask as the operator.
        """
        compute_eps, mask = solvers.make_eps_fn(process, times), self.mask

        def keep_known(x_t, i):
            denoised = denoise(x_t, i)
            x_0 = mask * denoised.x_0 + (1 - mask) * self.known
            eps = mask * denoised.eps + (1 - mask) * compute_eps(x_t, x_0, i)
            return solvers.Denoised(x_0, eps, denoised.variance)

        return keep_known

    def finish(self, x_0):
        # Sampler ddim_level1, and euler_maruyama with last_step none, leave some noise in x_0. The
        # known part must have no noise.
        return self.mask * x_0 + (1 - self.mask) * self.known


@dataclasses.dataclass(frozen=True, eq=False)
class Interpolate(Edit):
    """Sampling between two images: interpolates their noise and mixes their predictions."""

    first: jax.Array  # [B] indices of the first images
    second: jax.Array  # [B] indices of the second images
    second_cond: jax.Array  # [B, ...] conditions of the second images
    share: jax.Array  # [B] in 0..1, the weight of the second image

    def noise(self, draw, index):
        # `interpolate` needs independent noise. If first and second are the same image, so is their
        # noise, and the share must be 0.
        share = self.share * (self.second != self.first)
        return lambda i: interpolate(draw(i, self.first), draw(i, self.second), share)

    def predict(self, networks, cond):
        pairs = zip(networks(cond), networks(self.second_cond), strict=True)
        return [mix(first, second, self.share) for first, second in pairs]


def interpolate(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Interpolates on a sphere from first to second [B, ...], as share [B] goes from 0 to 1.

    If the inputs are independent N(0, I), so is the result: its squared coefficients sum to 1.
    """
    angle = processes.expand(share, first) * (jnp.pi / 2)
    return jnp.cos(angle) * first + jnp.sin(angle) * second


def mix(
    first: objectives.Predict, second: objectives.Predict, share: jax.Array
) -> objectives.Predict:
    """Mixes two predictions: (1 - share) * first + share * second, with share [B]."""

    def predict(x_t, network_time):
        w = processes.expand(share, x_t)
        return (1 - w) * first(x_t, network_time) + w * second(x_t, network_time)

    return predict
