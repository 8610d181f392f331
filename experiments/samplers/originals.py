"""How far are samplers from the published programs whose names they bear, and which is nearer?

  python -m experiments.samplers.originals    # writes originals.jsonl beside this file, in a minute
  python -m experiments.samplers.page         # with results.jsonl as docs/samplers.md

Only those samplers whose steps differ on purpose are here. The programs' steps are written out in
NumPy, at the same times as ours. x_0 is one value of two modes, so that its denoiser and where the
probability flow leads are known. Everything is f64.
"""

import itertools
import json
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
from dit_jax.system import files

FLAGS = flags.FLAGS
WEIGHTS, MEANS, STDS = np.array([[[0.3, 0.7]], [[-1.0, 0.6]], [[0.2, 0.4]]])  # of x_0's modes
X_T = scipy.special.ndtri((np.arange(1_000) + 0.5) / 1_000)  # quantiles of N(0, 1)
# Process, sampler, the program, grid, steps.
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
    """E[x_0 | x_t] of x_t [n], with NumPy or JAX as `xp`."""
    variances = alpha**2 * STDS**2 + sigma**2
    log_p = -0.5 * ((x_t[:, None] - alpha * MEANS) ** 2 / variances + xp.log(variances))
    p = WEIGHTS * xp.exp(log_p - log_p.max(axis=1, keepdims=True))
    means = (alpha * STDS**2 * x_t[:, None] + sigma**2 * MEANS) / variances
    return (p * means).sum(axis=1) / p.sum(axis=1)


def exact(alpha: float, sigma: float, x_t: np.ndarray) -> np.ndarray:
    """The x_0 [n] to which the probability flow leads: in one variable it keeps quantiles."""

    def cdf(x, alpha, sigma):
        std = np.sqrt((alpha * STDS) ** 2 + sigma**2)
        return scipy.special.ndtr((x[:, None] - alpha * MEANS) / std) @ WEIGHTS[0]

    x_0 = np.linspace(-4, 4, 1_000_001)
    return np.interp(cdf(x_t, alpha, sigma), cdf(x_0, 1.0, 0.0), x_0)


def lms(process: diffusion.Process, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """k-diffusion's and diffusers' LMS of order 4: its second step is of order 2, uncorrected."""
    alpha, ratio = process.alpha(t), process.sigma(t) / process.alpha(t)
    z, rates = x / alpha[0], []
    for i, (start, end) in enumerate(itertools.pairwise(ratio)):
        rates.insert(0, (z - denoise(np, alpha[i] * z, alpha[i], alpha[i] * start)) / start)
        known = ratio[max(i - 3, 0) : i + 1][::-1]
        for j, node in enumerate(known):
            basis = np.poly1d(np.poly(np.delete(known, j)))
            integral = (basis / basis(node)).integ()
            z = z + (integral(end) - integral(start)) * rates[j]
    return z


def dpm_solver(process: diffusion.Process, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Its authors' DPM-Solver++ 2M and a denoising step; below 10 steps the last is of order 1."""
    alpha, sigma = process.alpha(t[:-1]), process.sigma(t[:-1])
    log_ratio, before, steps = np.log(alpha / sigma), None, len(t) - 2
    for i in range(steps):
        x_0 = denoise(np, x, alpha[i], sigma[i])
        size, mean = log_ratio[i + 1] - log_ratio[i], x_0
        if i and not (steps < 10 and i == steps - 1):
            mean = x_0 + size / (log_ratio[i] - log_ratio[i - 1]) / 2 * (x_0 - before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-size) * mean
        before = x_0
    return denoise(np, x, alpha[-1], sigma[-1])


def euler(process: diffusion.Process, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Euler's method on dx_t / dt, as the code of score SDEs and of SiT takes it for VP."""
    for start, end in itertools.pairwise(t):
        (d_alpha, d_sigma), sigma = process.velocity(start), process.sigma(start)
        x_0 = denoise(np, x, process.alpha(start), sigma)
        eps = (x - process.alpha(start) * x_0) / sigma
        x = x + (end - start) * (d_alpha * x_0 + d_sigma * eps)
    return x


ORIGINALS: dict[str, Callable] = {"LMS": lms, "DPM-Solver++ 2M": dpm_solver, "Euler in t": euler}


def measure(rows: tuple = ROWS) -> Iterator[dict]:
    """The distance of sampler and original, and the error of each, in units of the largest x_0."""
    for process_name, name, original, grid, steps in rows:
        config = default.get_config("dit", process_name)
        config.sample.update(sampler=name, grid=grid, steps=steps)
        process = diffusion.build(config.diffusion)
        with jax.enable_x64(True):
            ours, times, x_T = _run(process, config.sample)
        theirs = ORIGINALS[original](process, times, x_T)
        first = times[:1]
        right = exact(process.alpha(first)[0], process.sigma(first)[0], x_T)

        def largest(difference, right=right):
            return float(f"{np.abs(difference).max() / np.abs(right).max():.3g}")

        yield {
            "process": process_name,
            "sampler": name,
            "original": original,
            "grid": grid,
            "steps": steps,
            "difference": largest(ours - theirs),
            "error": largest(ours - right),
            "original_error": largest(theirs - right),
        }


def _run(process, config):
    """(x_0 [n] of the sampler, its times, x_T [n])."""
    sampler = samplers.build(config, process, "eps")
    alphas, sigmas = (jnp.asarray(f(sampler.times)) for f in (process.alpha, process.sigma))

    def network(x_t, i):
        x_0 = denoise(jnp, x_t, alphas[i], sigmas[i])
        return solvers.Denoised(x_0, (x_t - alphas[i] * x_0) / sigmas[i], None)

    x_T = process.x_T_std * X_T
    parts = [(network, len(sampler.grid) - 1)]
    problem = solvers.Problem(process, sampler.grid, parts, noise=None)
    x_0, _ = jax.jit(lambda x_T: sampler.solve(problem, x_T))(jnp.asarray(x_T))
    return np.asarray(x_0), sampler.grid, x_T


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".jsonl",))
    texts = []
    for line in measure():
        texts.append(json.dumps(line))
        print(texts[-1], flush=True)
    files.replace_text(out, "\n".join(texts) + "\n")


if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    cli.define_path("out", str(here / "originals.jsonl"), "The results.")
    cli.run(main)
