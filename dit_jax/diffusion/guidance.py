"""Guidance: wrappers of a network for classifier-free guidance and autoguidance.

A guided output is worse + scale (better - worse). The worse output is from the null condition, or
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
      null: like cond: the null class, the empty caption, or a condition to avoid.
      channels: number of guided channels, counted from the first; 0 is all C of x_t. Other channels
        and the variance stay conditional. DiT's published samples guide 3 of 4 latent channels.
      rescale: 0 keeps the standard deviation of an image's guided channels; 1 replaces it by the
        standard deviation before guidance; between 0 and 1 both are mixed.
    Source: Ho & Salimans 2022, eq. 6, with scale = 1 + w; Lin et al. 2023, eq. 15 and 16.
    """
    # Each example is next to its copy with the null condition, so that a mesh keeps both on the
    # same device.
    conds = jnp.stack([cond, null], axis=1).reshape(-1, *cond.shape[1:])

    def predict_guided(x_t, network_time):
        outputs = predict(jnp.repeat(x_t, 2, axis=0), jnp.repeat(network_time, 2, axis=0), conds)
        better, worse = outputs[0::2], outputs[1::2]
        return _extrapolate(better, worse, scale, channels or x_t.shape[-1], rescale)

    return predict_guided


def autoguidance(
    predict: objectives.Predict,
    predict_worse: objectives.Predict,
    scale: float,
    channels: int = 0,
    rescale: float = 0.0,
) -> objectives.Predict:
    """Guides a network by a worse one with the same prediction; see `classifier_free_guidance`.

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    """

    def predict_guided(x_t, network_time):
        better, worse = predict(x_t, network_time), predict_worse(x_t, network_time)
        return _extrapolate(better, worse, scale, channels or x_t.shape[-1], rescale)

    return predict_guided


def split_steps(
    t: np.ndarray, scale: float, interval: tuple[float, float]
) -> list[tuple[bool, int]]:
    """Splits the steps that begin at times t [n] into spans (guided, number of steps), in order.

    A step is guided if its time is in the interval, including both ends, and the scale is not 1.
    Raises: ValueError if a scale other than 1 guides no step.
    Source: Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval".
    """
    low, high = interval
    guided = (low <= t) & (t <= high) & (scale != 1)
    if scale != 1 and not guided.any():
        raise UserError(
            f"cfg_scale={scale} guides no step: none begins in cfg_interval={low},{high}. Include "
            f"at least one of the times {', '.join(f'{time:.3g}' for time in t)}."
        )
    return [(bool(is_guided), len(list(span))) for is_guided, span in itertools.groupby(guided)]


def _extrapolate(better, worse, scale, channels, rescale):
    """Returns worse + scale (better - worse) in the first channels, and better in the others."""
    better_part, worse_part = better[..., :channels], worse[..., :channels]
    guided = worse_part + scale * (better_part - worse_part)
    # Guidance raises the standard deviation of an image.
    if rescale:
        std = functools.partial(jnp.std, axis=tuple(range(1, guided.ndim)), keepdims=True)
        guided_std = jnp.maximum(std(guided), 1e-12)  # never a division by 0
        guided *= 1 - rescale + rescale * std(better_part) / guided_std
    return jnp.concatenate([guided, better[..., channels:]], axis=-1)
