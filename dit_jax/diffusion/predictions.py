"""Conversion between a network's prediction, a * x_0 + b * eps, and x_0 and eps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import processes
from dit_jax.errors import check_choice


def coefficients(process: processes.Process, prediction: str, t):
    """Returns (a, b), arrays like t, for a network whose target is a * x_0 + b * eps.

    Args:
      prediction: 'eps'; 'x_0'; 'v' = alpha * eps - sigma * x_0; 'u' = d x_t / dt; 'score' =
        -eps / sigma; or 'edm'. The target 'edm' has unit variance if x_0 has standard deviation
        sigma_data. At every noise level, it makes the effect of the network's error on x_0 least.
      t: NumPy or JAX array, scalar or [B], in [0, 1].
    Raises: ValueError for an unknown prediction.
    Sources: Salimans & Ho 2022, section 4, for 'v'; Karras et al. 2022, eq. 7 and table 1, for
      'edm', here applied to x_t / alpha, whose noise is sigma / alpha.
    """
    check_choice("objective.prediction", prediction, PREDICTIONS)
    return PREDICTIONS[prediction](process, t, process.alpha(t), process.sigma(t))


def _fill(t, value):
    """Returns an array like t that is filled with the value."""
    return processes.get_array_module(t).full_like(t, value)


def _edm(process, t, alpha, sigma):
    # The paper's (x_0 - c_skip * x) / c_out, for x = x_t / alpha with noise sigma / alpha.
    x_t_std = processes.get_array_module(t).sqrt(sigma**2 + (alpha * process.sigma_data) ** 2)
    return sigma / (process.sigma_data * x_t_std), -process.sigma_data * alpha / x_t_std


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

    x_0 = x_0_from_x_t * x_t + x_0_from_output * output
    eps = eps_from_x_t * x_t + eps_from_output * output
    """

    x_0_from_x_t: np.ndarray | jax.Array
    x_0_from_output: np.ndarray | jax.Array
    eps_from_x_t: np.ndarray | jax.Array
    eps_from_output: np.ndarray | jax.Array

    def x_0_and_eps(self, x_t: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns x_0 and eps, like x_t and the network's output [B, ...]."""
        coef = Solution(*(processes.expand(jnp.asarray(value), x_t) for value in self))
        x_0 = coef.x_0_from_x_t * x_t + coef.x_0_from_output * output
        eps = coef.eps_from_x_t * x_t + coef.eps_from_output * output
        return x_0, eps


def solve(process: processes.Process, prediction: str, t) -> Solution:
    """Returns the coefficients that give x_0 and eps from x_t and a network's output at t."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = coefficients(process, prediction, t)
    # Cramer's rule for x_t = alpha * x_0 + sigma * eps and output = a * x_0 + b * eps.
    determinant = alpha * b - sigma * a
    return Solution(b / determinant, -sigma / determinant, -a / determinant, alpha / determinant)
