"""The likelihood of data: a chain's variational bound, or the density of a probability flow.

As in `solvers`, `denoise(x_t, i)` returns x_0 and eps at the i-th of the times, and the caller
draws the noise. Bits per dimension are bits per value of x_0. Those of pixels are the length of a
lossless code. Those of latents come from a density, so they depend on the scale of the latents and
may be negative.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, processes, solvers

FIRST_RATIO = 0.002  # sigma / alpha of the data's small noise: sigma_min of Karras et al. 2022
BIN = 2 / 255  # distance between neighbouring grey levels, for pixels in [-1, 1]


class Bound(NamedTuple):
    """A bound on -log p(x_0) in bits per dimension: total = sum(steps) + prior."""

    total: jax.Array  # [B]
    steps: jax.Array  # [n, B], noisiest first as in the grid; the last step draws x_0
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
    """Returns the bound on -log p(x_0) of the chain from which `solvers.ddpm` draws samples.

    Each step's part is estimated from one x_t, drawn with noise(i).
    Args:
      denoise: at grid[:-1].   x_0: [B, ...] f32.   grid: [n + 1] f64, decreasing to 0.
      variance: as in `solvers.ddpm`, but the last step always uses the posterior's, as published.
      discretised: whether x_0 is pixels, so that the last step gives the probability of a bin.
        Otherwise the last step gives the density of a Gaussian.
    Source: Ho et al. 2020, eq. 5 to 8 and 13; for its parts Kingma et al. 2021, section 3.
    """
    # Computed in f64, for all steps at once: differences of neighbouring levels lose digits in f32.
    t, s = grid[:-1], grid[1:]
    posterior = process.posterior(t, s)
    log_variances = {"large": posterior.log_beta, "small": posterior.log_variance}
    fixed_log_variance = np.where(s == 0, posterior.log_variance, log_variances[variance])
    tables = (process.alpha(t), process.sigma(t), *posterior, fixed_log_variance, s == 0)

    def step(_, row):
        i, alpha, sigma, x_0_coef, x_t_coef, log_beta, log_posterior, log_variance, is_last = row
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
        return None, _to_bits_per_dim(jnp.where(is_last, -log_p, kl))

    # A scan keeps the activations of one step in memory, whatever the number of steps.
    rows = tuple(jnp.asarray(table, jnp.float32) for table in tables)
    _, steps = jax.lax.scan(step, None, (jnp.arange(len(t)), *rows))
    # The prior is N(0, I), from which samplers draw x_T. Its part is KL(q(x_T | x_0) || N(0, I)).
    alpha, sigma = process.alpha(grid[0]), process.sigma(grid[0])
    prior = _to_bits_per_dim(objectives.normal_kl(alpha * x_0, 2 * np.log(sigma), 0.0, 0.0))
    return Bound(steps.sum(0) + prior, steps, prior)


def ode_times(process: processes.Process, steps: int) -> np.ndarray:
    """Returns the times [2 steps + 1] f64 of the ends and the middles of all steps, data first.

    The times are uniform in log(sigma / alpha), from FIRST_RATIO to the ratio at which samplers of
    a predicted eps begin.
    """
    last_t = np.array(process.first_t("eps"))
    last_ratio = process.sigma(last_t) / process.alpha(last_t)
    return process.time_of_ratio(np.geomspace(FIRST_RATIO, last_ratio, 2 * steps + 1))


def ode_log_likelihood(
    process: processes.Process,
    denoise: solvers.Denoise,
    x_0: jax.Array,
    times: np.ndarray,
    probe: jax.Array,
) -> jax.Array:
    """Returns log p(x_0) [B] in nats, by the probability flow of x_0 + FIRST_RATIO eps.

    The variable is y = x_t / (alpha s), where s^2 = (sigma / alpha)^2 + sigma_data^2. Its flow is
    dy / d log(sigma / alpha) = g eps - g^2 y, where g = sigma / (alpha s). For data N(0,
    sigma_data^2 I) the flow is 0, whatever the process. Hence the prior is y ~ N(0, I), that is
    x_t ~ N(0, sigma^2 + alpha^2 sigma_data^2). The method is Runge-Kutta of order 4.

    Args:
      denoise: at times.   x_0: [B, ...] f32.   times: from `ode_times`.
      probe: like x_0, values -1 or 1 at random, for an unbiased estimate of the divergence.
    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 39 and 40 and
      appendix D.2.
    """
    alpha = process.alpha(times)
    ratio = process.sigma(times) / alpha
    s = np.sqrt(ratio**2 + process.sigma_data**2)
    scale, g = (jnp.asarray(table, jnp.float32) for table in (alpha * s, ratio / s))
    step_size = 2 * np.log(ratio[1] / ratio[0])  # two intervals of `times`, by way of the middle
    # For each stage: the offset of its time, its fraction of the step, and its weight.
    stages = jnp.array([0, 1, 1, 2]), jnp.array([0, 0.5, 0.5, 1]), jnp.array([1, 2, 2, 1]) / 6

    def compute_rates(y, i):
        def flow(y):
            return g[i] * denoise(scale[i] * y, i).eps - g[i] ** 2 * y

        return estimate_divergence(flow, y, probe)

    def step(start, i):
        def stage(carry, row):
            end, y_rate = carry
            offset, fraction, weight = row
            y, _ = start
            rates = compute_rates(y + fraction * step_size * y_rate, 2 * i + offset)
            end = tuple(a + weight * step_size * rate for a, rate in zip(end, rates, strict=True))
            return (end, rates[0]), None

        (end, _), _ = jax.lax.scan(stage, (start, jnp.zeros_like(x_0)), stages)
        return end, None

    # The log-volume is integrated together with y: its rate is the divergence of the flow.
    start = x_0 / s[0], jnp.zeros(x_0.shape[:1])
    (y, log_volume), _ = jax.lax.scan(step, start, jnp.arange(len(times) // 2))
    # The last term is the change of variables from x_0 to y.
    log_prior = _sum(normal_log_density(y, 0.0, 0.0))
    return log_prior + log_volume - math.prod(x_0.shape[1:]) * np.log(s[0])


def estimate_divergence(f: Callable, x: jax.Array, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns f(x) and an estimate [B] of the trace of df/dx, for x [B, ...].

    f must map every example separately.
    Source: Hutchinson 1990; Song et al. 2021, eq. 40.
    """
    # In reverse mode, because layers with a custom VJP have no forward mode.
    value, pullback = jax.vjp(f, x)
    return value, _sum(pullback(probe)[0] * probe)


def dequantise(x_0: jax.Array, uniform: jax.Array) -> jax.Array:
    """Spreads pixels over their bins of width 2/255 by uniform noise in [0, 1), like x_0."""
    return x_0 + BIN * (uniform - 0.5)


def bits_per_dim(log_likelihood: jax.Array, x_0: jax.Array, dequantised: bool) -> jax.Array:
    """Returns -log p(x_0) [B] in bits per dimension.

    For dequantised pixels, the mean is an upper bound of -log of the probability of their bins.
    Source: Theis et al. 2016, section 3.1.
    """
    bits = -log_likelihood / (math.log(2) * math.prod(x_0.shape[1:]))
    return bits - math.log2(BIN) if dequantised else bits


def normal_log_density(x, mean, log_variance) -> jax.Array:
    """Returns log N(x; mean, exp(log_variance)) per element, in nats."""
    squared = (x - mean) ** 2 * jnp.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squared)


def _sum(a):
    """Sums [B, ...] to [B]."""
    return jnp.sum(a, axis=tuple(range(1, a.ndim)))


def _to_bits_per_dim(nats):
    """Converts nats per element [B, ...] to bits per dimension [B]."""
    return _sum(nats) / (math.prod(nats.shape[1:]) * math.log(2))
