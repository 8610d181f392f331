"""Solvers: the steps of samplers, as lax.scan over a time grid.

Every solver takes a `Problem` and x_T [B, h, w, C], N(0, x_T_std^2). It returns x_0 like x_T, and
[n] bool: whether x was finite after each step.

Step i leads from t = grid[i] to s = grid[i + 1]. It calls `denoise(x_t, i)`, which returns x_0 and
eps at the i-th of the sampler's times, and `noise(i)`, which returns N(0, I) noise like x_T. So the
caller owns conditions and random keys. Coefficients are f64 tables, computed on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import objectives, predictions, processes


class Denoised(NamedTuple):
    """A network's output at x_t: x_0 and eps like x_t, and the variance if it predicts one."""

    x_0: jax.Array
    eps: jax.Array
    variance: jax.Array | None


Denoise = Callable[[jax.Array, jax.Array], Denoised]
Noise = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The input of every solver: a process, a grid, the denoisers of the steps, and noise."""

    process: processes.Process
    grid: np.ndarray  # [n + 1] f64, decreasing to 0, or near 0 without a last step
    parts: Sequence[tuple[Denoise, int]]  # denoisers, each with a number of steps; n in all
    noise: Noise


def make_denoise(
    process: processes.Process,
    prediction: str,
    predict: objectives.Predict,
    times: np.ndarray,
    clip_x_0: bool = False,
) -> Denoise:
    """Returns `denoise(x_t, i)` at times[i], for a network with this prediction.

    Args:
      predict: as in `objectives`.
      times: may include times at which coefficients are infinite, if no step calls denoise there.
      clip_x_0: whether to clip x_0 to [-1, 1], the range of pixels. Then eps is computed from x_t
        and the clipped x_0.
    Source of clip_x_0: the samples of Ho et al. 2020 and Dhariwal & Nichol 2021.
    """
    # At t = 0 some coefficients divide by 0. No sampler calls denoise there.
    with np.errstate(divide="ignore", invalid="ignore"):
        solution = predictions.solve(process, prediction, times)
        network_time, scale = process.network_time(times), process.network_scale(times)
    compute_eps = make_eps_fn(process, times)

    def denoise(x_t, i):
        at = functools.partial(_at, i=i)
        time = jnp.broadcast_to(at(network_time), x_t.shape[:1])
        output = predict(at(scale) * x_t, time)
        output, variance = objectives.split_prediction(output, x_t.shape[-1])
        x_0, eps = predictions.Solution(*map(at, solution)).x_0_and_eps(x_t, output)
        if clip_x_0:
            x_0 = jnp.clip(x_0, -1, 1)
            eps = compute_eps(x_t, x_0, i)
        return Denoised(x_0, eps, variance)

    return denoise


def make_eps_fn(process: processes.Process, times: np.ndarray) -> Callable:
    """Returns `compute_eps(x_t, x_0, i)`: the noise with which x_0 becomes x_t at times[i] > 0."""
    with np.errstate(divide="ignore"):  # at t = 0, for which no sampler calls compute_eps
        alpha, reciprocal = process.alpha(times), 1 / process.sigma(times)
    return lambda x_t, x_0, i: (x_t - _at(alpha, i) * x_0) * _at(reciprocal, i)


def ddpm(problem: Problem, x_T: jax.Array, variance: str = "large"):
    """Draws samples by ancestral sampling on a respaced chain; the last step adds no noise.

    Args:
      variance: of a step if the network predicts none: 'large' (beta) or 'small' (the
        posterior's). If the process preserves variance, 'large' is exact for data N(0, I), and
        'small' for a single data point. For other processes 'large' is too large in few steps.
    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, section 4.
    """
    t, s = problem.grid[:-1], problem.grid[1:]
    posterior = problem.process.posterior(t, s)
    fixed_log_variance = {"large": posterior.log_beta, "small": posterior.log_variance}[variance]

    def step(denoise, x_t, i, history):
        at = functools.partial(_at, i=i)
        x_0, _, learned = denoise(x_t, i)
        mean = at(posterior.x_0_coef) * x_0 + at(posterior.x_t_coef) * x_t
        log_variance = at(fixed_log_variance)
        if learned is not None:
            bounds = at(posterior.log_beta), at(posterior.log_variance)
            log_variance = objectives.learned_log_variance(learned, *bounds)
        noise = at(s > 0) * jnp.exp(0.5 * log_variance) * problem.noise(i)
        return mean + noise, history

    return _scan(problem.parts, x_T, step)


def ddim(problem: Problem, x_T: jax.Array, eta: float = 0.0):
    """Draws samples by DDIM: eta = 0 is deterministic and draws no noise, 1 has DDPM's variance.

    Source: Song et al. 2021, eq. 12 and 16.
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    # eta times the posterior's standard deviation.
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
    """Returns the x_T from which `ddim` with eta = 0 leads to x_0, to first order in the steps.

    A step from s to t calls the network with x_s at time t. So it is never called at time 0.
    Returns: x_T like x_0, and [n] bool as for other solvers, in the order of the grid.
    Source: Song et al. 2021, section 4.3.
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    ratio = process.alpha(t) / process.alpha(s)
    eps_coef = process.sigma(t) - ratio * process.sigma(s)

    def step(denoise, x_s, i, history):
        i = len(t) - 1 - i  # the scan counts from data, the tables from noise
        eps = denoise(x_s, i).eps
        return _at(ratio, i) * x_s + _at(eps_coef, i) * eps, history

    x_T, finite = _scan(problem.parts[::-1], x_0, step)
    return x_T, finite[::-1]


def dpmpp(problem: Problem, x_T: jax.Array, order: int, sde: bool = False):
    """Draws samples by DPM-Solver++ of order 1 (which is DDIM) or 2 (2M); with `sde`, adds noise.

    The first step and a step to t = 0 are of order 1.
    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2 and section 5 (SDE).
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    sigma_t, sigma_s = process.sigma(t), process.sigma(s)
    shrink = sigma_s * alpha_t / (alpha_s * sigma_t)  # exp(-h), h = the step in log(alpha / sigma)
    x_t_coef = sigma_s / sigma_t * (shrink if sde else 1)
    x_0_coef = alpha_s * (1 - shrink ** (2 if sde else 1))
    std = sigma_s * np.sqrt(1 - shrink**2)  # of the noise, with `sde`
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.log(shrink)
        slope = np.append(0.0, 0.5 * h[1:] / h[:-1])  # 1 / (2 r)
    slope[~np.isfinite(slope)] = 0  # h is infinite in a step to t = 0
    if order == 1:
        slope[:] = 0  # no use of the previous x_0

    def step(denoise, x_t, i, previous):
        at = functools.partial(_at, i=i)
        x_0 = denoise(x_t, i).x_0
        x_s = at(x_t_coef) * x_t + at(x_0_coef) * (x_0 + at(slope) * (x_0 - previous))
        return x_s + at(std) * problem.noise(i) if sde else x_s, x_0

    return _scan(problem.parts, x_T, step, jnp.zeros_like(x_T))


def adams_bashforth(problem: Problem, x_T: jax.Array, order: int):
    """Integrates the probability flow by Adams-Bashforth of order 1 (Euler) to 4, on any grid.

    The first steps use as many rates as have been computed. With order 3 and 4, the second step
    corrects the first, an Euler step, by the trapezoidal rule. Otherwise the order would be 2.
    Source: Hairer et al. 1993, section III.1.
    """
    ode = problem.process.ode(problem.grid)
    weights = _compute_adams_bashforth_weights(ode.clock, order)

    def step(denoise, x_t, i, rates):
        rate = _compute_rate(ode, denoise(x_t, i), i)
        rates = jnp.concatenate([rate[None], rates[:-1]])  # newest first
        change = jnp.tensordot(_at(weights, i), rates, axes=1)
        return _at(ode.scale, i + 1) * (x_t / _at(ode.scale, i) + change), rates

    # Rates that are not computed yet are 0, and so are their weights.
    return _scan(problem.parts, x_T, step, jnp.zeros((order, *x_T.shape)))


def _compute_adams_bashforth_weights(clock, order):
    """Returns the weights [n, order] f64 of the rates in each step's change, newest rate first."""
    points, point_weights = np.polynomial.legendre.leggauss(order)  # exact for these polynomials
    weights = np.zeros((len(clock) - 1, order))
    for i in range(len(clock) - 1):
        nodes = clock[max(i - order + 1, 0) : i + 1][::-1]  # where the rates are known
        half_step = (clock[i + 1] - clock[i]) / 2
        step_points = clock[i] + half_step * (1 + points)
        # The weight of a rate is the integral of its Lagrange polynomial over the step.
        for j, node in enumerate(nodes):
            other_nodes = np.delete(nodes, j)
            lagrange = (step_points[:, None] - other_nodes) / (node - other_nodes)
            weights[i, j] = half_step * point_weights @ np.prod(lagrange, axis=1)
    # The correction of the first step. The second step is too short for it if it is the last.
    if order > 2 and len(weights) > 2:
        weights[1, :2] += (clock[1] - clock[0]) / 2 * np.array([1, -1])
    return weights


def add_churn(process: processes.Process, grid: np.ndarray, churn: float, span) -> np.ndarray:
    """Returns the noisier times [n] f64 at which the steps of `heun` begin with churn.

    If sigma / alpha is in `span`, (low, high), it is multiplied by 1 + min(churn / n, sqrt(2) - 1).
    Otherwise the step has no churn. The noisier time of the first step is greater than 1.
    Source: Karras et al. 2022, algorithm 2: S_churn, S_tmin, S_tmax.
    """
    ratio = process.sigma(grid[:-1]) / process.alpha(grid[:-1])
    in_span = (span[0] <= ratio) & (ratio <= span[1])
    gamma = min(churn / len(ratio), 2**0.5 - 1)
    return np.where(in_span, process.time_of_ratio(ratio * (1 + gamma)), grid[:-1])


def heun(
    problem: Problem, x_T: jax.Array, noisier_t: np.ndarray | None = None, noise_scale: float = 1.0
):
    """Integrates the probability flow by Heun's method, of order 2; the last step is Euler's.

    A step evaluates the network twice, the last step once.
    Args:
      noisier_t: [n] f64 from `add_churn`: before step i, noise brings x to the time noisier_t[i],
        at which the step calls denoise(x, n + 1 + i).
      noise_scale: standard deviation of the noise that is added.
    Source: Karras et al. 2022, algorithms 1 and 2.
    """
    # A step begins at begin_t, which is noisier_t with churn, and ends at the grid's next time.
    process, grid, t = problem.process, problem.grid, problem.grid[:-1]
    begin_t = t if noisier_t is None else noisier_t
    begin_ode, ode = process.ode(begin_t), process.ode(grid)
    clock_step = ode.clock[1:] - begin_ode.clock
    if noisier_t is not None:
        # x at noisier_t is factor * x_t + std * noise.
        factor = process.alpha(noisier_t) / process.alpha(t)
        variance = process.sigma(noisier_t) ** 2 - (factor * process.sigma(t)) ** 2
        std = np.sqrt(np.maximum(variance, 0))

    def begin(denoise, x_t, i):
        if noisier_t is None:
            return x_t, _compute_rate(ode, denoise(x_t, i), i)
        x_t = _at(factor, i) * x_t + noise_scale * _at(std, i) * problem.noise(i)
        return x_t, _compute_rate(begin_ode, denoise(x_t, len(grid) + i), i)

    def move(x_t, rate, i):
        change = _at(clock_step, i) * rate
        return _at(ode.scale, i + 1) * (x_t / _at(begin_ode.scale, i) + change)

    def step(denoise, x_t, i, history):
        x_t, rate = begin(denoise, x_t, i)
        end_rate = _compute_rate(ode, denoise(move(x_t, rate, i), i + 1), i + 1)
        return move(x_t, (rate + end_rate) / 2, i), history

    def last(denoise, x_t, i, history):
        x_t, rate = begin(denoise, x_t, i)
        return move(x_t, rate, i), history

    return _scan(problem.parts, x_T, step, last=last)


def euler_maruyama(
    problem: Problem, x_T: jax.Array, sde_diffusion: str = "sigma", last_step: str = "mean"
):
    """Draws samples by Euler-Maruyama of the reverse SDE, with the probability flow's marginals.

    x_s = x_t - (u - w score / 2) (t - s) + sqrt(w (t - s)) noise, where u = d x_t / dt.
    Args:
      sde_diffusion: w(t): 'sigma' for 2 sigma(t), or 'sbdm' for the w of the process as an SDE.
      last_step: the step to t = 0, without noise: 'mean' for x_s without its noise; 'euler' for a
        step of the probability flow; 'tweedie' for the network's x_0. With 'none', the last step
        has noise like all others.
    Source: Ma et al. 2024, "SiT", section 2. The names of w and of the last steps, and the factor 2
      of 'sigma', are from SiT's code.
    """
    process, t, s = problem.process, problem.grid[:-1], problem.grid[1:]
    alpha, sigma, (d_alpha, d_sigma) = process.alpha(t), process.sigma(t), process.velocity(t)
    w = 2 * sigma
    if sde_diffusion == "sbdm":
        w = w * (d_sigma - d_alpha / alpha * sigma)
    std = np.sqrt(w * (t - s))

    def compute_mean(denoised, x_t, i, w):
        at = functools.partial(_at, i=i)
        # The score is -eps / sigma.
        u = at(d_alpha) * denoised.x_0 + at(d_sigma) * denoised.eps
        return x_t - at(t - s) * (u + at(w / (2 * sigma)) * denoised.eps)

    def step(denoise, x_t, i, history):
        return compute_mean(denoise(x_t, i), x_t, i, w) + _at(std, i) * problem.noise(i), history

    def last(denoise, x_t, i, history):
        denoised = denoise(x_t, i)
        if last_step == "tweedie":
            return denoised.x_0, history
        # With w = 0 this is Euler's step of the probability flow.
        return compute_mean(denoised, x_t, i, w if last_step == "mean" else 0 * w), history

    return _scan(problem.parts, x_T, step, last=None if last_step == "none" else last)


def _compute_rate(ode, denoised, i):
    """Returns d(x / scale) / d clock at the i-th time of the ODE."""
    return _at(ode.x_0_coef, i) * denoised.x_0 + _at(ode.eps_coef, i) * denoised.eps


def _scan(parts, x, step, history=(), last=None):
    """Runs step(denoise, x, i, history) -> (x, history) for all steps of the parts, in order.

    Args: last, a function that replaces `step` in the last step.
    Returns: the last x, and [n] bool: whether x was finite after each step.
    """
    spans = [(denoise, num_steps, step) for denoise, num_steps in parts]
    if last:
        denoise, num_steps, _ = spans.pop()
        if num_steps > 1:
            spans.append((denoise, num_steps - 1, step))
        spans.append((denoise, 1, last))
    carry, finite, start = (x, history), [], 0
    for denoise, num_steps, span_step in spans:

        def body(carry, i, denoise=denoise, span_step=span_step):
            x, history = carry
            x, history = span_step(denoise, x, i, history)
            return (x, history), jnp.isfinite(x).all()

        # One scan per span: each has its own denoiser, such as a guided one.
        carry, span_finite = jax.lax.scan(body, carry, start + jnp.arange(num_steps))
        finite.append(span_finite)
        start += num_steps
    return carry[0], jnp.concatenate(finite)


def _at(table, i):
    """Returns table[i] as f32, or as f64 if JAX has x64 enabled."""
    # Inside a scan i is traced, and a traced index needs a JAX array.
    return jnp.asarray(table)[i]
