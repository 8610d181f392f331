"""Wrappers and starting points that make of sampling an edit of given images.

All act on x_0, pixels or latents, whatever the process, the prediction and the sampler.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, samplers


def keep_known(
    denoise: samplers.Denoise,
    process: processes.Process,
    times: np.ndarray,
    x_0: jax.Array,
    mask: jax.Array,
) -> samplers.Denoise:
    """Wraps denoise so that where the mask is 0 its x_0 is the given one, and its eps fits x_t.

    Any sampler then follows there a path of that process to x_0 itself, and elsewhere fills in what
    goes with it.
    Args:
      x_0: like x_t, clean.   mask: [B, h, w, 1] or like x_0, 1 where something new is wanted.
    Source: Wang et al. 2023, "DDNM", eq. 12, where the operator is a mask.
    """
    eps_of = samplers.make_eps_of(process, times)

    def known(x_t, i):
        here = denoise(x_t, i)
        mixed = mask * here.x_0 + (1 - mask) * x_0
        eps = eps_of(x_t, mixed, i)
        return samplers.Denoised(mixed, mask * here.eps + (1 - mask) * eps, here.variance)

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
    """What two networks, or one told two things, say in shares 1 - share and share [B]."""

    def predict(x_t, network_time):
        u = share.reshape(-1, *(1,) * (x_t.ndim - 1))
        return (1 - u) * first(x_t, network_time) + u * second(x_t, network_time)

    return predict
