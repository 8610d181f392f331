"""Predictions of a network, a x_0 + b eps, and the x_0 and eps that follow from one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.diffusion import processes
from dit_jax.errors import check_choice


def coefficients(process: processes.Process, prediction: str, t):
    """Returns (a, b) at t, for a network whose target is a x_0 + b eps.

    Targets: 'eps'; 'x_0'; 'v' = alpha eps - sigma x_0; 'u' = d x_t / dt; 'score' = -eps / sigma;
    'edm', which has unit variance if x_0 has standard deviation sigma_data, and gives the least
    error of x_0 at every level.
    Raises: ValueError for an unknown prediction.
    Source: v: Salimans & Ho 2022, section 4; edm: Karras et al. 2022, eq. 7 and table 1, for
      x_t / alpha and the noise sigma / alpha.
    """
    check_choice("objective.prediction", prediction, PREDICTIONS)
    return PREDICTIONS[prediction](process, t, process.alpha(t), process.sigma(t))


def _fill(t, value):
    """Returns an array like t that is filled with the value."""
    return processes.get_array_module(t).full_like(t, value)


def _edm(process, t, alpha, sigma):
    # (x_0 - c_skip x) / c_out of the paper, for x = x_t / alpha with noise sigma / alpha.
    deviation = processes.get_array_module(t).sqrt(sigma**2 + (alpha * process.sigma_data) ** 2)
    return sigma / (process.sigma_data * deviation), -process.sigma_data * alpha / deviation


# Each maps (process, t, alpha, sigma) to (a, b).
PREDICTIONS = {
    "eps": lambda process, t, alpha, sigma: (_fill(t, 0.0), _fill(t, 1.0)),
    "x_0": lambda process, t, alpha, sigma: (_fill(t, 1.0), _fill(t, 0.0)),
    "v": lambda process, t, alpha, sigma: (-sigma, alpha),
    "u": lambda process, t, alpha, sigma: process.velocity(t),
    "score": lambda process, t, alpha, sigma: (_fill(t, 0.0), -1 / sigma),
    "edm": _edm,
}


class Solution(NamedTuple):
    """Coefficients that give x_0 and eps from x_t and a network's output.

    x_0 = x_0_of_x_t x_t + x_0_of_output output, and likewise for eps.
    """

    x_0_of_x_t: jax.Array
    x_0_of_output: jax.Array
    eps_of_x_t: jax.Array
    eps_of_output: jax.Array

    def x_0_and_eps(self, x_t: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the x_0 and eps that agree with x_t [B, ...] and with the output, like x_t."""
        a, b, c, d = (processes.expand(jnp.asarray(f), x_t) for f in self)
        return a * x_t + b * output, c * x_t + d * output


def solve(process: processes.Process, prediction: str, t) -> Solution:
    """Solves for x_0 and eps at t: x_t and the output are two linear equations in them."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = coefficients(process, prediction, t)
    # Cramer's rule for x_t = alpha x_0 + sigma eps and output = a x_0 + b eps.
    determinant = alpha * b - sigma * a
    return Solution(b / determinant, -sigma / determinant, -a / determinant, alpha / determinant)
