"""How likely data are to a model: a chain's variational bound, the density of a probability flow.

As in `samplers`, a network is only `denoise(x_t, i)`, x_0 and eps at the i-th of the times, and the
caller draws the noise. Bits per dimension are per value of x_0: of pixels they are the length of a
lossless code; of latents they say what a density is at x_0, depend on its scale, may be negative.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, sampler_settings, solvers
from dit_jax.errors import UserError

FIRST_RATIO = 0.002  # sigma / alpha at which the density is taken: Karras et al. 2022's least
BIN = 2 / 255  # the distance of two grey levels


class Bound(NamedTuple):
    """The parts of a bound on -log p(x_0), in bits per dimension: total = sum(steps) + prior."""

    total: jax.Array  # [B]
    steps: jax.Array  # [n, B], noisiest first as in the grid; the last is that of x_0 itself
    prior: jax.Array  # [B]


def variational_bound(
    process: processes.Process,
    denoise: solvers.Denoise,
    x_0: jax.Array,
    grid: np.ndarray,
    noise: solvers.Noise,
    variance: str,
    discretised: bool,
) -> Bound:
    """The bound on -log p(x_0) of the chain that `samplers.ddpm` draws from, by one x_t a step.

    Args:
      denoise: at grid[:-1]; where it predicts the variance, that one is used.
      x_0: [B, ...] f32.   grid: [n + 1] f64, decreasing to 0.   noise: as samplers', of x_t.
      variance: else 'large', beta, or 'small', the posterior's; of the last step, which gives x_0
        itself, always the posterior's, as published.
      discretised: x_0 are pixels, of which the last step gives a bin's probability; else the
        density of its Gaussian.
    Raises: ValueError for an unknown variance.
    Source: Ho et al. 2020, eq. 5 to 8 and 13; its three parts: Kingma et al. 2021, section 3.
    """
    if variance not in sampler_settings.SETTINGS["variance"].choices:
        raise UserError(f"unknown {variance=}; choose large or small.")
    t, s = grid[:-1], grid[1:]
    posterior = process.posterior(t, s)
    is_small = (s == 0) | (variance == "small")
    fixed = np.where(is_small, posterior.log_variance, posterior.log_beta)
    tables = (process.alpha(t), process.sigma(t), posterior.x_0_coef, posterior.x_t_coef)
    tables += (posterior.log_beta, posterior.log_variance, fixed, s == 0)

    def step(_, row):
        i, alpha, sigma, x_0_coef, x_t_coef, log_beta, log_posterior, log_variance, last = row
        x_t = alpha * x_0 + sigma * noise(i)
        x_0_hat, _, learned = denoise(x_t, i)
        if learned is not None:
            log_variance = objectives.learned_log_variance(learned, log_beta, log_posterior)
        mean, mean_hat = (x_0_coef * x + x_t_coef * x_t for x in (x_0, x_0_hat))
        kl = objectives.normal_kl(mean, log_posterior, mean_hat, log_variance)
        if discretised:
            log_p = objectives.discretised_normal_log_likelihood(x_0, mean_hat, 0.5 * log_variance)
        else:
            log_p = normal_log_density(x_0, mean_hat, log_variance)
        return None, _bits(jnp.where(last, -log_p, kl))

    rows = tuple(jnp.asarray(table, jnp.float32) for table in tables)
    _, steps = jax.lax.scan(step, None, (jnp.arange(len(t)), *rows))
    alpha, sigma = process.alpha(grid[0]), process.sigma(grid[0])
    prior = _bits(objectives.normal_kl(alpha * x_0, 2 * np.log(sigma), 0.0, 0.0))
    return Bound(steps.sum(0) + prior, steps, prior)


def ode_times(process: processes.Process, steps: int) -> np.ndarray:
    """[2 steps + 1] f64: t of the steps' ends and middles, uniform in log(sigma / alpha).

    From FIRST_RATIO to where samplers that predict eps begin.
    """
    end = np.array(process.first_t("eps"))
    ratios = np.geomspace(FIRST_RATIO, process.sigma(end) / process.alpha(end), 2 * steps + 1)
    return process.time_of_ratio(ratios)


def ode_log_likelihood(
    process: processes.Process,
    denoise: solvers.Denoise,
    x_0: jax.Array,
    times: np.ndarray,
    probe: jax.Array,
) -> jax.Array:
    """log p(x_0) [B] in nats of the probability flow, p the density of x_0 + FIRST_RATIO eps.

    In y = x_t / (alpha s), s^2 = (sigma / alpha)^2 + sigma_data^2, the flow is
    dy / d log(sigma / alpha) = g eps - g^2 y, g = sigma / (alpha s): it stands still where the data
    are N(0, sigma_data^2 I), whatever the process. Hence the prior is y ~ N(0, I), that is x_t ~
    N(0, sigma^2 + alpha^2 sigma_data^2). Integrated by the Runge-Kutta method of order 4.

    Args:
      denoise: at times.   x_0: [B, ...] f32.   times: of `ode_times`.
      probe: like x_0, -1 or 1 with equal probability: an unbiased estimate of the divergence.
    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 39 and 40 and
      appendix D.2.
    """
    alpha = process.alpha(times)
    ratio = process.sigma(times) / alpha
    std = np.sqrt(ratio**2 + process.sigma_data**2)
    scale, gain = (jnp.asarray(table, jnp.float32) for table in (alpha * std, ratio / std))
    step_size = 2 * np.log(ratio[1] / ratio[0])
    # Of each stage: its time, its distance from the start, its weight in the mean.
    stages = jnp.array([0, 1, 1, 2]), jnp.array([0, 0.5, 0.5, 1]), jnp.array([1, 2, 2, 1]) / 6

    def rate(y, i):
        def flow(y):
            return gain[i] * denoise(scale[i] * y, i).eps - gain[i] ** 2 * y

        return divergence(flow, y, probe)

    def step(start, i):
        def stage(carry, row):
            total, previous = carry
            at, size, weight = row
            here = rate(start[0] + size * step_size * previous, 2 * i + at)
            total = tuple(a + weight * step_size * r for a, r in zip(total, here, strict=True))
            return (total, here[0]), None

        (total, _), _ = jax.lax.scan(stage, (start, jnp.zeros_like(x_0)), stages)
        return total, None

    start = x_0 / std[0], jnp.zeros(x_0.shape[:1])
    (y, log_volume), _ = jax.lax.scan(step, start, jnp.arange(len(times) // 2))
    log_prior = _sum(normal_log_density(y, 0.0, 0.0))
    return log_prior + log_volume - math.prod(x_0.shape[1:]) * np.log(std[0])


def divergence(f: Callable, x: jax.Array, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f(x), an estimate [B] of the trace of df/dx), x [B, ...] and f mapping rows to rows.

    In reverse mode: layers with a derivative of their own have no forward mode.
    Source: Hutchinson 1990; Song et al. 2021, eq. 40.
    """
    value, pullback = jax.vjp(f, x)
    return value, _sum(pullback(probe)[0] * probe)


def dequantise(x_0: jax.Array, uniform: jax.Array) -> jax.Array:
    """Pixels spread over their bins of width 2/255 by uniform [0, 1) like x_0."""
    return x_0 + BIN * (uniform - 0.5)


def bits_per_dim(log_likelihood: jax.Array, x_0: jax.Array, dequantised: bool) -> jax.Array:
    """-log p(x_0) [B] in bits per dimension; of dequantised pixels, of the probability of a bin.

    Source: Theis et al. 2016, section 3.1: on average a bound, as the logarithm is concave.
    """
    bits = -log_likelihood / (math.log(2) * math.prod(x_0.shape[1:]))
    return bits - math.log2(BIN) if dequantised else bits


def normal_log_density(x, mean, log_variance) -> jax.Array:
    """log N(x; mean, exp(log_variance)) per element, in nats."""
    squared = (x - mean) ** 2 * jnp.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squared)


def _sum(a):
    """[B, ...] -> [B]."""
    return jnp.sum(a, axis=tuple(range(1, a.ndim)))


def _bits(nats):
    """Nats per element [B, ...] to bits per dimension [B]."""
    return _sum(nats) / (math.prod(nats.shape[1:]) * math.log(2))
