"""Training losses, per example.

`predict(x_t, network_time) -> [B, h, w, C or 2C]` is the network with parameters and condition
bound: channels 0..C-1 are eps, C..2C-1, if there are any, the learned variance.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import diffusion

Predict = Callable[[jax.Array, jax.Array], jax.Array]
DISTANCES = {"l1": jnp.abs, "l2": jnp.square}  # of pixels, for autoencoders


def ddpm_loss(
    process: diffusion.DiscreteProcess,
    predict: Predict,
    x_0: jax.Array,
    key: jax.Array | None = None,
    *,
    t: jax.Array | None = None,
    eps: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The DDPM loss of each example: mse, plus the variational bound if variance is learned.

    Args:
      x_0: [B, h, w, C] f32.   key: draws t and eps where they are not given.
      t: [B] in [0, 1].   eps: like x_0.
    Returns:
      'loss' = 'mse' (+ 'vb'), each [B] f32; 'vb' in bits, there if predict returns 2C channels.
    Raises: ValueError if predict returns neither C nor 2C channels.
    Source: Nichol & Dhariwal 2021, eq. 16 (L_hybrid); the weight of vb is 1 because a bound on
      one uniformly drawn step is not multiplied by T.
    """
    if t is None or eps is None:
        drawn_t, drawn_eps = draw(process, key, x_0.shape)
        t = drawn_t if t is None else t
        eps = drawn_eps if eps is None else eps
    x_t = diffusion.q_sample(process, x_0, t, eps)
    eps_hat, variance = split_prediction(predict(x_t, process.network_time(t)), x_0.shape[-1])
    losses = {"mse": _mean((eps - eps_hat) ** 2)}
    losses["loss"] = losses["mse"]
    if variance is not None:
        # The bound teaches the variance only; eps learns from the mse.
        eps_hat = jax.lax.stop_gradient(eps_hat)
        losses["vb"] = _variational_bound(process, x_0, x_t, t, eps_hat, variance)
        losses["loss"] = losses["mse"] + losses["vb"]
    return losses


def draw(process: diffusion.DiscreteProcess, key: jax.Array, shape) -> tuple[jax.Array, jax.Array]:
    """The (t [B], eps) of a batch of x_0 with this shape."""
    t_key, eps_key = jax.random.split(key)
    return process.draw_t(t_key, shape[0]), jax.random.normal(eps_key, shape)


def split_prediction(prediction: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """(eps, variance or None) of a network output with C or 2C channels."""
    if prediction.shape[-1] == channels:
        return prediction, None
    if prediction.shape[-1] == 2 * channels:
        return prediction[..., :channels], prediction[..., channels:]
    raise ValueError(
        f"the network returned {prediction.shape[-1]} channels for {channels}: expected "
        f"{channels} (eps), or {2 * channels} (eps and variance)."
    )


def learned_log_variance(variance: jax.Array, log_beta, log_posterior) -> jax.Array:
    """Interpolates between the variance bounds: variance -1 is the posterior's, +1 is beta.

    Source: Nichol & Dhariwal 2021, eq. 15.
    """
    fraction = (variance + 1) / 2
    return fraction * log_beta + (1 - fraction) * log_posterior


def _variational_bound(process, x_0, x_t, t, eps_hat, variance):
    """L_{t-1}, or L_0 at the first level, in bits, mean over elements.

    Source: Ho et al. 2020, eq. 8 and 13.
    """
    levels = np.arange(process.num_steps, -1, -1) / process.num_steps
    table = process.posterior(levels[:-1], levels[1:])  # row 0 is index T - 1
    row = process.num_steps - process.level(t)

    def gather(a):
        return diffusion.expand(jnp.asarray(a, jnp.float32)[row], x_0)

    def mean(x_0):
        return gather(table.x_0_coef) * x_0 + gather(table.x_t_coef) * x_t

    log_posterior = gather(table.log_variance)
    log_variance = learned_log_variance(variance, gather(table.log_beta), log_posterior)
    mean_hat = mean(diffusion.x_0_from_eps(process, x_t, t, eps_hat))
    kl = _normal_kl(mean(x_0), log_posterior, mean_hat, log_variance)
    nll = -_discretised_normal_log_likelihood(x_0, mean_hat, 0.5 * log_variance)
    return jnp.where(process.level(t) == 1, _mean(nll), _mean(kl)) / math.log(2)


def _normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) per element, in nats."""
    ratio = jnp.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + distance - 1)


def _discretised_normal_log_likelihood(x, mean, log_std):
    """log P(the bin of width 2/255 around x), the outermost bins reaching to infinity.

    The bins, the tanh approximation of the normal CDF and the clamps are the published ones,
    kept on latents too, where they mean nothing but are part of the loss.
    """

    def cdf(z):
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = jnp.exp(-log_std)
    upper = cdf((x - mean + 1 / 255) * inverse_std)
    lower = cdf((x - mean - 1 / 255) * inverse_std)
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def autoencoder_loss(
    pixels: jax.Array,
    reconstruction: jax.Array,
    mean: jax.Array,
    log_variance: jax.Array,
    *,
    distance: str,
    kl_weight: float,
) -> dict[str, jax.Array]:
    """A VAE's loss of each example: distance to the reconstruction + kl_weight KL / values.

    Args:
      pixels, reconstruction: [B, H, W, C] f32, in [-1, 1].
      mean, log_variance: of the posterior, [B, h, w, c].
      distance: 'l1' or 'l2', the mean over the H W C values of an image.
    Returns:
      'loss'; 'reconstruction', the distance; 'kl' to N(0, I), nats per image; 'psnr', dB, of the
      reconstruction clipped to [-1, 1]; each [B] f32.
    Source: Rombach et al. 2022, appendix G, where kl_weight is 1e-6 beside sums over pixels.
    """
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3))
    error = _mean(DISTANCES[distance](pixels - reconstruction))
    loss = error + kl_weight * kl / math.prod(pixels.shape[1:])
    squared = _mean((pixels - jnp.clip(reconstruction, -1, 1)) ** 2)
    psnr = 10 * jnp.log10(4 / jnp.maximum(squared, 1e-10))  # 4 is the range squared
    return {"loss": loss, "reconstruction": error, "kl": kl, "psnr": psnr}


def _mean(a):
    """[B, ...] -> [B]."""
    return jnp.mean(a, axis=tuple(range(1, a.ndim)))
