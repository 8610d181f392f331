"""Samplers as one lax.scan over a time grid, and guidance as a wrapper of the network.

A sampler sees only `denoise(x_t, t) -> prediction`, t a scalar; never labels or text.
`noise(i)` returns step i's N(0, I) like x_T, so that the caller owns the keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import diffusion, objectives

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


def ddpm(
    process: diffusion.DiscreteProcess,
    denoise: Denoise,
    x_T: jax.Array,  # noqa: N803
    grid: np.ndarray,
    noise: Noise,
) -> jax.Array:
    """Ancestral sampling on a respaced chain; variance learned if predicted, else beta.

    Args:
      x_T: [B, h, w, C] N(0, I).   grid: `process.grid(steps)`.
    Returns: x_0 like x_T.
    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, section 4.
    """
    posterior = process.posterior(grid[:-1], grid[1:])

    def step(x_t, eps, variance, x_0, i, at):
        mean = at(posterior.x_0_coef) * x_0 + at(posterior.x_t_coef) * x_t
        log_variance = at(posterior.log_beta)
        if variance is not None:
            bounds = at(posterior.log_beta), at(posterior.log_variance)
            log_variance = objectives.learned_log_variance(variance, *bounds)
        return mean + at(_not_last(grid)) * jnp.exp(0.5 * log_variance) * noise(i)

    return _scan(process, denoise, x_T, grid, step)


def ddim(
    process: diffusion.DiscreteProcess,
    denoise: Denoise,
    x_T: jax.Array,  # noqa: N803
    grid: np.ndarray,
    noise: Noise,
    eta: float = 0.0,
) -> jax.Array:
    """DDIM; eta 0 is deterministic and never calls noise, eta 1 has DDPM's variance.

    Args and returns: as `ddpm`.   Source: Song et al. 2021, eq. 12 and 16.
    """
    ab = process.alpha_bar[process.level(grid)]
    ab_t, ab_s = ab[:-1], ab[1:]
    std = eta * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))

    def step(x_t, eps, variance, x_0, i, at):
        x_s = at(np.sqrt(ab_s)) * x_0 + at(np.sqrt(1 - ab_s - std**2)) * eps
        return x_s + at(std) * noise(i) if eta else x_s

    return _scan(process, denoise, x_T, grid, step)


def _scan(process, denoise, x_T, grid, step):  # noqa: N803
    """Runs step(x_t, eps, variance, x_0, i, at) along the grid; at(a) is a[i] as f32."""

    def body(x_t, i):
        def at(a):
            return jnp.asarray(a, jnp.float32)[i]

        t = at(grid)
        eps, variance = objectives.split_prediction(denoise(x_t, t), x_t.shape[-1])
        x_0 = diffusion.x_0_from_eps(process, x_t, t, eps)
        return step(x_t, eps, variance, x_0, i, at), None

    x_0, _ = jax.lax.scan(body, x_T, jnp.arange(len(grid) - 1))
    return x_0


def _not_last(grid):
    """1 at every step but the last, which ends on data and adds no noise."""
    return (grid[1:] > 0).astype(np.float32)


def classifier_free_guidance(
    predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    y: jax.Array,
    null_class: int,
    cfg_scale: float,
    cfg_channels: int | None = None,
) -> objectives.Predict:
    """Wraps predict(x_t, network_time, y) into a guided predict(x_t, network_time).

    eps = eps_null + cfg_scale (eps_y - eps_null) on the first cfg_channels channels, by default
    on all C of x_t; other channels and the variance stay conditional. The published DiT samples
    guide 3 of the 4 latent channels. cfg_scale 1 runs no unconditional pass.

    Args: y [B] int32.   Source: Ho & Salimans 2022, eq. 6, with cfg_scale = 1 + w.
    """
    if cfg_scale == 1:
        return lambda x_t, network_time: predict(x_t, network_time, y)
    # Each example beside its twin, so that on a mesh both stay on the example's device.
    labels = jnp.stack([y, jnp.full_like(y, null_class)], axis=1).reshape(-1)

    def guided(x_t, network_time):
        both = predict(jnp.repeat(x_t, 2, axis=0), jnp.repeat(network_time, 2, axis=0), labels)
        conditional, unconditional = both[0::2], both[1::2]
        c = x_t.shape[-1] if cfg_channels is None else cfg_channels
        eps_y, eps_null = conditional[..., :c], unconditional[..., :c]
        eps = eps_null + cfg_scale * (eps_y - eps_null)
        return jnp.concatenate([eps, conditional[..., c:]], axis=-1)

    return guided
