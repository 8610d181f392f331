"""Data whose denoiser, distribution and probability flow are known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dit_jax import diffusion
from dit_jax.diffusion import solvers


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of normal distributions of one variable."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def cdf(self, x, alpha=1.0, sigma=0.0):
        """Returns the cdf of alpha x_0 + sigma eps at x, in f64."""
        means = alpha * np.array(self.means)
        stds = np.sqrt((alpha * np.array(self.stds)) ** 2 + sigma**2)
        z = (np.asarray(x, np.float64)[..., None] - means) / stds
        return scipy.stats.norm.cdf(z) @ np.array(self.weights)

    def denoise(self, process: diffusion.Process, times: np.ndarray) -> solvers.Denoise:
        """Returns a function like `solvers.make_denoise`'s, with the exact E[x_0] and E[eps]."""
        alphas, sigmas = process.alpha(times), process.sigma(times)

        def denoise(x_t, i):
            alpha, sigma = jnp.asarray(alphas)[i], jnp.asarray(sigmas)[i]
            x = x_t[..., None]
            mean = alpha * jnp.asarray(np.array(self.means)).reshape((1,) * x_t.ndim + (-1,))
            variances = jnp.asarray(np.array(self.stds) ** 2).reshape(mean.shape)
            total = alpha**2 * variances + sigma**2
            weights = jnp.asarray(np.array(self.weights)).reshape(mean.shape)
            log_p = jnp.log(weights) - 0.5 * ((x - mean) ** 2 / total + jnp.log(total))
            posterior = jax.nn.softmax(log_p, axis=-1)
            # eps = -sigma score stays exact where alpha or sigma are small.
            eps = jnp.sum(posterior * sigma * (x - mean) / total, axis=-1)
            means = jnp.asarray(np.array(self.means)).reshape(mean.shape)
            x_0 = jnp.sum(posterior * (alpha * variances * x + sigma**2 * means) / total, axis=-1)
            return solvers.Denoised(x_0, eps, None)

        return denoise


@dataclasses.dataclass(frozen=True)
class Channels:
    """Data whose channels are independent, each with its own mixture."""

    channels: tuple[Mixture, ...]

    def denoise(self, process: diffusion.Process, times: np.ndarray) -> solvers.Denoise:
        denoisers = [mixture.denoise(process, times) for mixture in self.channels]

        def denoise(x_t, i):
            parts = [f(x_t[..., c : c + 1], i) for c, f in enumerate(denoisers)]
            x_0, eps = (jnp.concatenate([part[j] for part in parts], axis=-1) for j in (0, 1))
            return solvers.Denoised(x_0, eps, None)

        return denoise


NORMAL = Mixture((1.0,), (0.7,), (0.5,))
TWO_MODES = Mixture((0.3, 0.7), (-1.0, 0.6), (0.2, 0.4))
