"""Guidance: wrappers of a network for classifier-free guidance and autoguidance.

A guided output is worse + scale (better - worse). The worse output has the null condition, or is
from a worse model. `predict(x_t, network_time)` is a network with its condition bound, as in
`objectives`.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives
from dit_jax.errors import UserError


def classifier_free_guidance(
    predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    cond: jax.Array,
    null: jax.Array,
    scale: float,
    channels: int = 0,
    rescale: float = 0.0,
) -> objectives.Predict:
    """Wraps predict(x_t, network_time, cond) into a guided predict(x_t, network_time).

    Args:
      cond: [B, ...], labels or captions.
      null: like cond, the null class, the empty caption, or a condition that is to be avoided.
      channels: how many channels are guided, the first ones; 0 is all C of x_t. The others
        and the variance stay conditional. The published DiT samples guide 3 of 4 latent channels.
      rescale: 0..1, how far the standard deviation of an image's guided channels is moved to that
        of the conditional channels.
    Source: Ho & Salimans 2022, eq. 6, with scale = 1 + w; Lin et al. 2023, eq. 15 and 16.
    """
    # Each example is next to its copy with the null condition. So on a mesh both stay on the same
    # device.
    conds = jnp.stack([cond, null], axis=1).reshape(-1, *cond.shape[1:])

    def guided(x_t, network_time):
        both = predict(jnp.repeat(x_t, 2, axis=0), jnp.repeat(network_time, 2, axis=0), conds)
        c = channels or x_t.shape[-1]
        return _extrapolate(both[0::2], both[1::2], scale, c, rescale)

    return guided


def autoguidance(
    predict: objectives.Predict,
    predict_worse: objectives.Predict,
    scale: float,
    channels: int = 0,
    rescale: float = 0.0,
) -> objectives.Predict:
    """Guides a network by a worse one with the same prediction; as `classifier_free_guidance`.

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    """

    def guided(x_t, network_time):
        better, worse = predict(x_t, network_time), predict_worse(x_t, network_time)
        return _extrapolate(better, worse, scale, channels or x_t.shape[-1], rescale)

    return guided


def split_steps(
    t: np.ndarray, scale: float, interval: tuple[float, float]
) -> list[tuple[bool, int]]:
    """Splits steps from the times t [n] into spans (guided, count), in their order.

    A step is guided if its time lies in the interval, both ends included, and the scale is not 1.
    Raises: ValueError if a scale other than 1 guides no step.
    Source: Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval".
    """
    low, high = interval
    guided = (low <= t) & (t <= high) & (scale != 1)
    if scale != 1 and not guided.any():
        raise UserError(
            f"cfg_scale={scale} guides no step: none of their times lies in cfg_interval={low},"
            f"{high}; they are {', '.join(f'{time:.3g}' for time in t)}."
        )
    return [(bool(value), len(list(steps))) for value, steps in itertools.groupby(guided)]


def _extrapolate(better, worse, scale, channels, rescale):
    """Returns worse + scale (better - worse) for the first channels, and better for the others."""
    better_part, worse_part = better[..., :channels], worse[..., :channels]
    guided = worse_part + scale * (better_part - worse_part)
    # Guidance raises the standard deviation of an image. The maximum prevents a division by 0.
    if rescale:
        std = functools.partial(jnp.std, axis=tuple(range(1, guided.ndim)), keepdims=True)
        guided *= 1 - rescale + rescale * std(better_part) / jnp.maximum(std(guided), 1e-12)
    return jnp.concatenate([guided, better[..., channels:]], axis=-1)
