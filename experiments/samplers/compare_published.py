"""Comparison of samplers with published programs of the same names, on data with a known solution.

  python -m experiments.samplers.compare_published  # writes originals.jsonl here, in a minute
  python -m experiments.samplers.page               # writes docs/samplers.md from the results

The questions are how far the results differ, and which result is closer to the exact solution. Only
samplers whose steps differ on purpose are compared. The steps of the published programs are written
here in NumPy, with the times of the sampler. x_0 is a scalar from a mixture of two Gaussians, so
the denoiser and the end of the probability flow are known exactly. All values are f64.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from absl import flags

from configs import default
from dit_jax import cli, diffusion
from dit_jax.diffusion import samplers, solvers
from experiments.samplers import compare

FLAGS = flags.FLAGS
WEIGHTS, MEANS, STDS = np.array([[[0.3, 0.7]], [[-1.0, 0.6]], [[0.2, 0.4]]])  # of the mixture
X_T = scipy.special.ndtri((np.arange(1_000) + 0.5) / 1_000)  # quantiles of N(0, 1)
# (process, sampler, published program, grid, steps)
ROWS = (
    *[("ddpm", "ab4", "LMS", "uniform", steps) for steps in (10, 20, 50)],
    *[
        (process, "dpmpp2m", "DPM-Solver++ 2M", "karras", steps)
        for process in ("vp", "edm")
        for steps in (6, 8, 10, 11)
    ],
    *[("vp", "euler", "Euler in t", "uniform", steps) for steps in (10, 50, 250)],
    ("vp", "euler", "Euler in t", "karras", 50),
)


def denoise(xp, x_t, alpha, sigma):
    """Returns E[x_0 | x_t] [n] of x_t [n].   Args: xp, numpy or jax.numpy."""
    # x_t is a mixture of Gaussians too; p is the posterior probability of each component.
    variances = alpha**2 * STDS**2 + sigma**2
    log_p = -0.5 * ((x_t[:, None] - alpha * MEANS) ** 2 / variances + xp.log(variances))
    p = WEIGHTS * xp.exp(log_p - log_p.max(axis=1, keepdims=True))
    means = (alpha * STDS**2 * x_t[:, None] + sigma**2 * MEANS) / variances
    return (p * means).sum(axis=1) / p.sum(axis=1)


def solve_exactly(alpha: float, sigma: float, x_t: np.ndarray) -> np.ndarray:
    """Returns the x_0 [n] at the end of the probability flow from x_t [n].

    In one dimension trajectories cannot cross, so the flow preserves quantiles.
    """

    def cdf(x, alpha, sigma):
        std = np.sqrt((alpha * STDS) ** 2 + sigma**2)
        return scipy.special.ndtr((x[:, None] - alpha * MEANS) / std) @ WEIGHTS[0]

    x_0 = np.linspace(-4, 4, 1_000_001)  # the inverse CDF is interpolated from this table
    return np.interp(cdf(x_t, alpha, sigma), cdf(x_0, 1.0, 0.0), x_0)


def sample_lms(process: diffusion.Process, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples with the order-4 LMS of k-diffusion and diffusers; returns x_0 [n] from x [n].

    The first steps have order 1, 2 and 3, and are not corrected later.
    """
    # The ODE is solved for z = x_t / alpha in the variable sigma / alpha, where dz = rate d ratio.
    alpha, ratio = process.alpha(t), process.sigma(t) / process.alpha(t)
    z, rates = x / alpha[0], []
    for i, (start, end) in enumerate(itertools.pairwise(ratio)):
        rates.insert(0, (z - denoise(np, alpha[i] * z, alpha[i], alpha[i] * start)) / start)
        # The Lagrange polynomial through the last rates, four at most, is integrated exactly.
        nodes = ratio[max(i - 3, 0) : i + 1][::-1]
        for j, node in enumerate(nodes):
            basis = np.poly1d(np.poly(np.delete(nodes, j)))
            integral = (basis / basis(node)).integ()
            z = z + (integral(end) - integral(start)) * rates[j]
    return z


def sample_dpm_solver(process: diffusion.Process, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples with DPM-Solver++ 2M as its authors' code does, then takes a denoising step.

    With fewer than 10 steps, the last step before the denoising step has order 1.
    """
    alpha, sigma = process.alpha(t[:-1]), process.sigma(t[:-1])
    log_ratio, previous, steps = np.log(alpha / sigma), None, len(t) - 2
    for i in range(steps):
        x_0 = denoise(np, x, alpha[i], sigma[i])
        size, mean = log_ratio[i + 1] - log_ratio[i], x_0
        if i and not (steps < 10 and i == steps - 1):
            mean = x_0 + size / (log_ratio[i] - log_ratio[i - 1]) / 2 * (x_0 - previous)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-size) * mean
        previous = x_0
    return denoise(np, x, alpha[-1], sigma[-1])


def sample_euler(process: diffusion.Process, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples with Euler's method on dx_t / dt, as the code of score SDEs and SiT does for VP."""
    for start, end in itertools.pairwise(t):
        (d_alpha, d_sigma), sigma = process.velocity(start), process.sigma(start)
        x_0 = denoise(np, x, process.alpha(start), sigma)
        eps = (x - process.alpha(start) * x_0) / sigma
        x = x + (end - start) * (d_alpha * x_0 + d_sigma * eps)
    return x


ORIGINALS: dict[str, Callable] = {
    "LMS": sample_lms,
    "DPM-Solver++ 2M": sample_dpm_solver,
    "Euler in t": sample_euler,
}


def measure(rows: tuple = ROWS) -> Iterator[dict]:
    """Yields a result per row: the sampler's difference from the original, and both errors.

    They are the largest absolute values over samples, divided by the largest exact |x_0|.
    """
    for process_name, name, original, grid, steps in rows:
        config = default.get_config("dit", process_name)
        config.sample.update(sampler=name, grid=grid, steps=steps)
        process = diffusion.build(config.diffusion)
        with jax.enable_x64(True):
            x_0, times, x_T = _run(process, config.sample)
        original_x_0 = ORIGINALS[original](process, times, x_T)
        first = times[:1]
        exact_x_0 = solve_exactly(process.alpha(first)[0], process.sigma(first)[0], x_T)

        def get_largest(difference, exact_x_0=exact_x_0):
            return float(f"{np.abs(difference).max() / np.abs(exact_x_0).max():.3g}")

        yield {
            "process": process_name,
            "sampler": name,
            "original": original,
            "grid": grid,
            "steps": steps,
            "difference": get_largest(x_0 - original_x_0),
            "error": get_largest(x_0 - exact_x_0),
            "original_error": get_largest(original_x_0 - exact_x_0),
        }


def _run(process, config):
    """Runs a sampler of this project; returns x_0 [n], the times of its grid, x_T [n]."""
    sampler = samplers.build(config, process, "eps")
    alphas, sigmas = (jnp.asarray(f(sampler.times)) for f in (process.alpha, process.sigma))

    # The network is the exact denoiser, so that all errors come from the solver.
    def network(x_t, i):
        x_0 = denoise(jnp, x_t, alphas[i], sigmas[i])
        return solvers.Denoised(x_0, (x_t - alphas[i] * x_0) / sigmas[i], None)

    x_T = process.x_T_std * X_T
    parts = [(network, len(sampler.grid) - 1)]  # one network for all steps
    problem = solvers.Problem(process, sampler.grid, parts, noise=None)
    x_0, _ = jax.jit(lambda x_T: sampler.solve(problem, x_T))(jnp.asarray(x_T))
    return np.asarray(x_0), sampler.grid, x_T


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".jsonl",))
    compare.write_results(out, measure())


if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    cli.define_path("out", str(here / "originals.jsonl"), "The results.")
    cli.run(main)
