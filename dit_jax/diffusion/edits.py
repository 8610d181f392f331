"""Edits: where sampling begins, what its network predicts and what it keeps of given images.

All act on x_0, pixels or latents, whatever the process, the prediction and the sampler.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, solvers

Arrays = dict[str, jax.Array]  # of an edit, [B, ...], a row for each image
Draw = Callable[[int, jax.Array], jax.Array]  # noise i of the images of these numbers, N(0, I)
Networks = Callable[[jax.Array], list[objectives.Predict]]  # of a condition: unguided, guided


class Edit:
    """Plain sampling, from noise. An edit replaces some of its steps."""

    names: ClassVar[tuple[str, ...]] = ()  # of its arrays

    def noise(self, draw: Draw, index: jax.Array, arrays: Arrays) -> Callable[[int], jax.Array]:
        """The noise that is drawn: 0 is x_T's, i + 1 that of step i."""
        return lambda i: draw(i, index)

    def predict(self, networks: Networks, cond: jax.Array, arrays: Arrays):
        """The networks to sample by: unguided, guided."""
        return networks(cond)

    def begin(self, process: processes.Process, t: float, noise, arrays: Arrays) -> jax.Array:
        """x_t at the first time t."""
        return process.x_T_std * noise(0)

    def wrap(self, denoise: solvers.Denoise, process, times, arrays: Arrays) -> solvers.Denoise:
        """The denoiser of each step."""
        return denoise

    def finish(self, x_0: jax.Array, arrays: Arrays) -> jax.Array:
        """The image that is returned."""
        return x_0


class FromNoise(Edit):
    """Draws from given noise.   Arrays: x_T, like x_0."""

    names = ("x_T",)

    def begin(self, process, t, noise, arrays):
        return arrays["x_T"]


class ImageToImage(Edit):
    """Noises given images to the first time.   Arrays: known, their x_0."""

    names = ("known",)

    def begin(self, process, t, noise, arrays):
        t = jnp.full(len(arrays["known"]), t, jnp.float32)
        return processes.q_sample(process, arrays["known"], t, noise(0))


class Inpaint(ImageToImage):
    """Keeps given images where a mask is 0.

    Arrays: known, their x_0; mask, like it or of one channel, 1 where something new is wanted.
    """

    names = ("known", "mask")

    def wrap(self, denoise, process, times, arrays):
        return keep_known(denoise, process, times, arrays["known"], arrays["mask"])

    def finish(self, x_0, arrays):
        # Where ddim_level1 and last_step none end there is noise, also where all is kept.
        return arrays["mask"] * x_0 + (1 - arrays["mask"]) * arrays["known"]


class Interpolate(Edit):
    """Draws between two images: their noises on a sphere, their predictions' weighted mean.

    Arrays: other [B], numbers of the second images, and cond_of_other, their conditions; share [B]
      in 0..1 of the second.
    """

    names = ("other", "cond_of_other", "share")

    def noise(self, draw, index, arrays):
        # If both ends are one image its noise must not be mixed: the sphere is of independent ones.
        share = arrays["share"] * (arrays["other"] != index)
        return lambda i: interpolate(draw(i, index), draw(i, arrays["other"]), share)

    def predict(self, networks, cond, arrays):
        pairs = zip(networks(cond), networks(arrays["cond_of_other"]), strict=True)
        return [mix(first, second, arrays["share"]) for first, second in pairs]


def keep_known(
    denoise: solvers.Denoise,
    process: processes.Process,
    times: np.ndarray,
    x_0: jax.Array,
    mask: jax.Array,
) -> solvers.Denoise:
    """Wraps denoise so that where the mask is 0 its x_0 is the given one, and its eps fits x_t.

    Any sampler then follows there a path of that process to x_0 itself, and elsewhere fills in what
    goes with it.
    Args:
      x_0: like x_t, clean.   mask: [B, h, w, 1] or like x_0, 1 where something new is wanted.
    Source: Wang et al. 2023, "DDNM", eq. 12, where the operator is a mask.
    """
    eps_of = solvers.make_eps_fn(process, times)

    def known(x_t, i):
        here = denoise(x_t, i)
        mixed = mask * here.x_0 + (1 - mask) * x_0
        eps = eps_of(x_t, mixed, i)
        return solvers.Denoised(mixed, mask * here.eps + (1 - mask) * eps, here.variance)

    return known


def interpolate(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Noise between first and second [B, ...] on the sphere; share [B] in 0..1 of the second.

    Of independent N(0, I) it is N(0, I) again: their coefficients' squares add up to 1.
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
