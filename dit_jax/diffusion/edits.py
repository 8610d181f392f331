"""Edits of images by sampling: image-to-image, inpainting, interpolation and given noise.

An edit changes the noise, the prediction, the start of sampling, its steps or its result. All edits
act on x_0, pixels or latents, and work with every process, prediction and sampler.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, solvers

Arrays = dict[str, jax.Array]  # arrays of an edit by name, [B, ...], one row per image
Draw = Callable[[int, jax.Array], jax.Array]  # (i, image numbers) -> their noise i, N(0, I)
Networks = Callable[[jax.Array], list[objectives.Predict]]  # condition -> [unguided, guided]


class Edit:
    """Plain sampling from noise, and the base class: an edit overrides some of its methods."""

    names: ClassVar[tuple[str, ...]] = ()  # keys of its arrays

    def noise(self, draw: Draw, index: jax.Array, arrays: Arrays) -> Callable[[int], jax.Array]:
        """Returns the function that draws noise: 0 is for x_T, i + 1 is for step i."""
        return lambda i: draw(i, index)

    def predict(self, networks: Networks, cond: jax.Array, arrays: Arrays):
        """Returns the networks to sample with: [unguided, guided]."""
        return networks(cond)

    def begin(self, process: processes.Process, t: float, noise, arrays: Arrays) -> jax.Array:
        """Returns x_t at t, the first time of the grid."""
        return process.x_T_std * noise(0)

    def wrap(self, denoise: solvers.Denoise, process, times, arrays: Arrays) -> solvers.Denoise:
        """Returns the denoiser that every step uses."""
        return denoise

    def finish(self, x_0: jax.Array, arrays: Arrays) -> jax.Array:
        """Returns the x_0 of the final image."""
        return x_0


class FromNoise(Edit):
    """Sampling from given noise.   Arrays: x_T, like x_0."""

    names = ("x_T",)

    def begin(self, process, t, noise, arrays):
        return arrays["x_T"]


class ImageToImage(Edit):
    """Sampling from given images, noised to the first time.   Arrays: known, their x_0."""

    names = ("known",)

    def begin(self, process, t, noise, arrays):
        t = jnp.full(len(arrays["known"]), t, jnp.float32)
        return processes.q_sample(process, arrays["known"], t, noise(0))


class Inpaint(ImageToImage):
    """Image-to-image that keeps the given images where a mask is 0.

    Arrays: known, their x_0; mask, like x_0 or with one channel, 1 where new content is drawn.
    """

    names = ("known", "mask")

    def wrap(self, denoise, process, times, arrays):
        return keep_known(denoise, process, times, arrays["known"], arrays["mask"])

    def finish(self, x_0, arrays):
        # Sampler ddim_level1, and euler_maruyama with last_step none, leave some noise in x_0. The
        # kept part must have none.
        return arrays["mask"] * x_0 + (1 - arrays["mask"]) * arrays["known"]


class Interpolate(Edit):
    """Sampling between two images: interpolates their noise and mixes their predictions.

    Arrays: other [B], numbers of the second images; other_cond, conditions of the second images;
      share [B] in 0..1, the weight of the second image.
    """

    names = ("other", "other_cond", "share")

    def noise(self, draw, index, arrays):
        # `interpolate` expects independent noise. If both images are the same one, their noise is
        # the same too, so it must not be mixed.
        share = arrays["share"] * (arrays["other"] != index)
        return lambda i: interpolate(draw(i, index), draw(i, arrays["other"]), share)

    def predict(self, networks, cond, arrays):
        pairs = zip(networks(cond), networks(arrays["other_cond"]), strict=True)
        return [mix(first, second, arrays["share"]) for first, second in pairs]


def keep_known(
    denoise: solvers.Denoise,
    process: processes.Process,
    times: np.ndarray,
    x_0: jax.Array,
    mask: jax.Array,
) -> solvers.Denoise:
    """Wraps denoise: where the mask is 0 it returns the given x_0, and the eps that fits x_t.

    There, any sampler follows a path of the process that ends at the given x_0. Elsewhere it fills
    in content that goes with the given x_0.
    Args:
      x_0: like x_t, clean.   mask: [B, h, w, 1] or like x_0, 1 where new content is drawn.
    Source: Wang et al. 2023, "DDNM", eq. 12, where the operator is a mask.
    """
    eps_of = solvers.make_eps_fn(process, times)

    def known(x_t, i):
        denoised = denoise(x_t, i)
        mixed = mask * denoised.x_0 + (1 - mask) * x_0
        eps = eps_of(x_t, mixed, i)
        return solvers.Denoised(mixed, mask * denoised.eps + (1 - mask) * eps, denoised.variance)

    return known


def interpolate(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Interpolates between first and second [B, ...] on a sphere, by share [B] in 0..1 of second.

    For independent N(0, I) inputs the result is N(0, I) too: the squared coefficients add up to 1.
    """
    angle = share.reshape(-1, *(1,) * (first.ndim - 1)) * (jnp.pi / 2)
    return jnp.cos(angle) * first + jnp.sin(angle) * second


def mix(
    first: objectives.Predict, second: objectives.Predict, share: jax.Array
) -> objectives.Predict:
    """Mixes two predictions: (1 - share) * first + share * second, with share [B]."""

    def predict(x_t, network_time):
        u = share.reshape(-1, *(1,) * (x_t.ndim - 1))
        return (1 - u) * first(x_t, network_time) + u * second(x_t, network_time)

    return predict
