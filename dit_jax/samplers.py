"""Samplers as lax.scan over a time grid, and guidance as wrappers of the network.

A sampler sees only `denoise(x_t, i)`, which says x_0 and eps at the i-th of its times; never labels or
text. Its coefficients are tables in f64, computed on the host. `noise(i)` returns step i's N(0, I) like
x_T, so that the caller owns the keys.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import diffusion, objectives


class Denoised(NamedTuple):
    """What a network says at x_t: x_0 and eps like x_t, and the variance if it predicts one."""

    x_0: jax.Array
    eps: jax.Array
    variance: jax.Array | None


Denoise = Callable[[jax.Array, jax.Array], Denoised]
Noise = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What every sampler takes: a process, a grid, the network bound to its times, and noise."""

    process: diffusion.Process
    grid: np.ndarray  # [n + 1] f64, decreasing to 0
    parts: Sequence[tuple[Denoise, int]]  # in turn, each for so many steps; n in all
    noise: Noise

    def last_step_apart(self) -> tuple[list, Denoise]:
        """The parts without the last step, and its denoiser."""
        *parts, (denoise, count) = self.parts
        return [*parts, (denoise, count - 1)], denoise


def make_denoise(
    process: diffusion.Process, prediction: str, predict: objectives.Predict, times: np.ndarray
) -> Denoise:
    """`denoise(x_t, i)` at times[i] of a network that predicts `prediction`; see `objectives`.

    Only the times at which it is called need to be ones where the network is defined.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # at t = 0, where no sampler calls it
        solution = diffusion.solve(process, prediction, times)
        network_time, scale = process.network_time(times), process.network_scale(times)

    def denoise(x_t, i):
        at = functools.partial(_at, i=i)
        time = jnp.broadcast_to(at(network_time), x_t.shape[:1])
        output = predict(at(scale) * x_t, time)
        output, variance = objectives.split_prediction(output, x_t.shape[-1])
        here = diffusion.Solution(*map(at, solution))
        return Denoised(*here.x_0_and_eps(x_t, output), variance)

    return denoise


def ddpm(problem: Problem, x_T: jax.Array, variance: str = "large"):  # noqa: N803
    """Ancestral sampling on a respaced chain; no noise in the last step.

    Args:
      x_T: [B, h, w, C] N(0, x_T_std^2).
      variance: where the network predicts none, 'large', beta, or 'small', the posterior's.
    Returns: x_0 like x_T, and finite [n] bool, whether x was after each step.
    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, section 4.
    """
    grid, posterior = problem.grid, problem.process.posterior(problem.grid[:-1], problem.grid[1:])
    fixed = {"large": posterior.log_beta, "small": posterior.log_variance}[variance]

    def step(denoise, x_t, i, history):
        at = functools.partial(_at, i=i)
        x_0, _, learned = denoise(x_t, i)
        mean = at(posterior.x_0_coef) * x_0 + at(posterior.x_t_coef) * x_t
        log_variance = at(fixed)
        if learned is not None:
            bounds = at(posterior.log_beta), at(posterior.log_variance)
            log_variance = objectives.learned_log_variance(learned, *bounds)
        noise = at(grid[1:] > 0) * jnp.exp(0.5 * log_variance) * problem.noise(i)
        return mean + noise, history

    return _scan(problem.parts, x_T, step)


def ddim(problem: Problem, x_T: jax.Array, eta: float = 0.0):  # noqa: N803
    """DDIM; eta 0 is deterministic and never calls noise, eta 1 has DDPM's variance.

    Args and returns: as `ddpm`.   Source: Song et al. 2021, eq. 12 and 16.
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    std = eta * np.sqrt(np.exp(process.posterior(t, s).log_beta)) * process.sigma(s)
    std = std / process.sigma(t)
    x_0_coef, eps_coef = process.alpha(s), np.sqrt(process.sigma(s) ** 2 - std**2)

    def step(denoise, x_t, i, history):
        at = functools.partial(_at, i=i)
        x_0, eps, _ = denoise(x_t, i)
        x_s = at(x_0_coef) * x_0 + at(eps_coef) * eps
        return x_s + at(std) * problem.noise(i) if eta else x_s, history

    return _scan(problem.parts, x_T, step)


def invert_ddim(problem: Problem, x_0: jax.Array):
    """The x_T from which `ddim` with eta 0 leads to x_0, to first order in the steps.

    The eps of a step is that of its noisier end, at the x of its other end: the network is not
    asked at t = 0.
    Returns: x_T like x_0, and finite [n], noisiest first as in the grid.
    Source: Song et al. 2021, section 4.3.
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    ratio = process.alpha(t) / process.alpha(s)
    eps_coef = process.sigma(t) - ratio * process.sigma(s)

    def step(denoise, x_s, i, history):
        i = len(t) - 1 - i
        eps = denoise(x_s, i).eps
        return _at(ratio, i) * x_s + _at(eps_coef, i) * eps, history

    x_T, finite = _scan(problem.parts[::-1], x_0, step)  # noqa: N806
    return x_T, finite[::-1]


def dpmpp(problem: Problem, x_T: jax.Array, order: int, sde: bool = False):  # noqa: N803
    """DPM-Solver++ of order 1 (which is DDIM) or 2 (2M), and their stochastic forms.

    The first step and one to t = 0 are of order 1.
    Args and returns: as `ddpm`.
    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2 and section 5 (SDE).
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    alpha_t, alpha_s, sigma_t, sigma_s = (
        f(a) for f in (process.alpha, process.sigma) for a in (t, s)
    )
    shrink = sigma_s * alpha_t / (alpha_s * sigma_t)  # exp(-h), h = the step in log(alpha / sigma)
    x_t_coef = sigma_s / sigma_t * (shrink if sde else 1)
    x_0_coef = alpha_s * (1 - shrink ** (2 if sde else 1))
    std = sigma_s * np.sqrt(1 - shrink**2) * sde
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.log(shrink)
        slope = np.append(0.0, 0.5 * h[1:] / h[:-1])  # 1 / (2 r)
    slope[~np.isfinite(slope) | (sigma_s == 0)] = 0
    if order == 1:
        slope[:] = 0

    def step(denoise, x_t, i, previous):
        at = functools.partial(_at, i=i)
        x_0 = denoise(x_t, i).x_0
        x_s = at(x_t_coef) * x_t + at(x_0_coef) * (x_0 + at(slope) * (x_0 - previous))
        return x_s + at(std) * problem.noise(i) if sde else x_s, x_0

    return _scan(problem.parts, x_T, step, jnp.zeros_like(x_T))


def adams_bashforth(problem: Problem, x_T: jax.Array, order: int):  # noqa: N803
    """The probability flow by Adams-Bashforth of order 1 (Euler) to 4, for any grid.

    The first steps take as many values as there are. With order 3 and 4 the second corrects the
    first, an Euler step, by the trapezoidal rule, without which the whole is of order 2.
    Args and returns: as `ddpm`.   Source: Hairer et al. 1993, section III.1.
    """
    ode = problem.process.ode(problem.grid)
    weights = _adams_bashforth_weights(ode.clock, order)

    def step(denoise, x_t, i, history):
        rate = _rate(ode, denoise(x_t, i), i)
        history = jnp.concatenate([rate[None], history[:-1]])  # newest first
        change = jnp.tensordot(_at(weights, i), history, axes=1)
        return _at(ode.scale, i + 1) * (x_t / _at(ode.scale, i) + change), history

    return _scan(problem.parts, x_T, step, jnp.zeros((order, *x_T.shape)))


def _adams_bashforth_weights(clock, order):
    """[n, order] f64 weights of the newest and the older rates in the change of each step."""
    nodes, quadrature = np.polynomial.legendre.leggauss(order)  # exact for these polynomials
    weights = np.zeros((len(clock) - 1, order))
    for i in range(len(clock) - 1):
        known = clock[max(i - order + 1, 0) : i + 1][::-1]
        half = (clock[i + 1] - clock[i]) / 2
        points = clock[i] + half * (1 + nodes)
        for j, node in enumerate(known):
            others = np.delete(known, j)
            basis = np.prod((points[:, None] - others) / (node - others), axis=1)
            weights[i, j] = half * quadrature @ basis
    if order > 2 and len(weights) > 1:
        weights[1, :2] += (clock[1] - clock[0]) / 2 * np.array([1, -1])
    return weights


def heun(problem: Problem, x_T: jax.Array):  # noqa: N803
    """The probability flow by Heun's method: two evaluations a step, of order 2; the last is Euler's.

    Args and returns: as `ddpm`.   Source: Karras et al. 2022, algorithm 1.
    """
    ode = problem.process.ode(problem.grid)
    step_of_clock = np.diff(ode.clock)

    def move(x_t, rate, i):
        change = _at(step_of_clock, i) * rate
        return _at(ode.scale, i + 1) * (x_t / _at(ode.scale, i) + change)

    def step(denoise, x_t, i, history):
        rate = _rate(ode, denoise(x_t, i), i)
        next_rate = _rate(ode, denoise(move(x_t, rate, i), i + 1), i + 1)
        return move(x_t, (rate + next_rate) / 2, i), history

    def last(denoise, x_t, i, history):
        return move(x_t, _rate(ode, denoise(x_t, i), i), i), history

    return _scan_but_last(problem, x_T, step, last)


def _rate(ode, denoised, i):
    return _at(ode.x_0_coef, i) * denoised.x_0 + _at(ode.eps_coef, i) * denoised.eps


def _scan(parts, x, step, history=(), first=0):
    """Runs step(denoise, x, i, history) -> (x, history) for every step of the parts in turn.

    Returns: x, and finite [n] bool.
    """
    carry, finite = (x, history), []
    for denoise, count in parts:

        def body(carry, i, denoise=denoise):
            x, history = step(denoise, carry[0], i, carry[1])
            return (x, history), jnp.isfinite(x).all()

        carry, ok = jax.lax.scan(body, carry, first + jnp.arange(count))
        finite.append(ok)
        first += count
    return carry[0], jnp.concatenate(finite)


def _scan_but_last(problem, x, step, last):
    parts, denoise = problem.last_step_apart()
    n = len(problem.grid) - 1
    x, finite = _scan(parts, x, step)
    x, ok = _scan([(denoise, 1)], x, last, first=n - 1)
    return x, jnp.concatenate([finite, ok])


def _at(table, i):
    """table[i] as f32."""
    return jnp.asarray(table, jnp.float32)[i]


def classifier_free_guidance(
    predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    y: jax.Array,
    null_class: int,
    cfg_scale: float,
    cfg_channels: int | None = None,
    rescale: float = 0.0,
) -> objectives.Predict:
    """Wraps predict(x_t, network_time, y) into a guided predict(x_t, network_time).

    out = out_null + cfg_scale (out_y - out_null) on the first cfg_channels channels, by default
    on all C of x_t; other channels and the variance stay conditional. The published DiT samples
    guide 3 of the 4 latent channels. cfg_scale 1 runs no unconditional pass.

    Args:
      y: [B] int32.   rescale: 0..1, how far the guided channels of an image get the conditional
        ones' deviation.
    Source: Ho & Salimans 2022, eq. 6, with cfg_scale = 1 + w; Lin et al. 2023, eq. 15 and 16.
    """
    if cfg_scale == 1:
        return lambda x_t, network_time: predict(x_t, network_time, y)
    # Each example beside its twin, so that on a mesh both stay on the example's device.
    labels = jnp.stack([y, jnp.full_like(y, null_class)], axis=1).reshape(-1)

    def guided(x_t, network_time):
        both = predict(jnp.repeat(x_t, 2, axis=0), jnp.repeat(network_time, 2, axis=0), labels)
        c = x_t.shape[-1] if cfg_channels is None else cfg_channels
        return _extrapolate(both[0::2], both[1::2], cfg_scale, c, rescale)

    return guided


def autoguidance(
    predict: objectives.Predict, predict_worse: objectives.Predict, scale: float, channels: int
) -> objectives.Predict:
    """out = out_worse + scale (out - out_worse) on the first channels: away from a worse model.

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    """

    def guided(x_t, network_time):
        out, worse = predict(x_t, network_time), predict_worse(x_t, network_time)
        return _extrapolate(out, worse, scale, channels, 0.0)

    return guided


def _extrapolate(out, worse, scale, channels, rescale):
    better = out[..., :channels]
    guided = worse[..., :channels] + scale * (better - worse[..., :channels])
    if rescale:
        axes = tuple(range(1, out.ndim))
        std = functools.partial(jnp.std, axis=axes, keepdims=True)
        guided *= 1 - rescale + rescale * std(better) / std(guided)
    return jnp.concatenate([guided, out[..., channels:]], axis=-1)
