"""Training losses of each example.

`predict(x, network_time) -> [B, h, w, C or 2C]` is a network with its parameters and condition
bound. Channels 0..C-1 are the prediction, as `config.objective.prediction` names it. Channels
C..2C-1, if there are any, are the learned variance.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import predictions, processes
from dit_jax.errors import UserError, check_choice

Predict = Callable[[jax.Array, jax.Array], jax.Array]
MIN_T = 1e-5  # the default of config.objective.min_t
# The distances between pixels in `autoencoder_loss`, by name: (difference) -> distance.
DISTANCES = {"l1": jnp.abs, "l2": jnp.square}


def denoising_loss(
    process: processes.Process,
    config,
    predict: Predict,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the loss of each example: a weighted mse, and the bound of a learned variance.

    Args:
      config: `config.objective`.   x_0: [B, h, w, C] f32.   t: [B] in [0, 1].   eps: like x_0.
    Returns: 'loss' = weight 'mse' (+ 'vb'), each [B] f32. 'vb', the bound, is in bits. It exists if
      predict returns 2C channels.
    Raises: ValueError if predict returns neither C nor 2C channels.
    Source: Nichol & Dhariwal 2021, eq. 16 (L_hybrid). The weight of vb is 1, because the bound on
      one uniformly drawn step is not multiplied by T here.
    """
    x_t = processes.q_sample(process, x_0, t, eps)
    output = predict(*network_inputs(process, x_t, t))
    return output_loss(process, config, output, x_0, x_t, t, eps)


def network_inputs(
    process: processes.Process, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the inputs of a network for x_t at t: the scaled x_t, and the network's time [B]."""
    return processes.expand(process.network_scale(t), x_t) * x_t, process.network_time(t)


def output_loss(
    process: processes.Process,
    config,
    output: jax.Array,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> dict[str, jax.Array]:
    """Returns `denoising_loss`, given the network's output [B, h, w, C or 2C] at x_t."""
    output, variance = split_prediction(output, x_0.shape[-1])
    a, b = (
        processes.expand(f, x_0) for f in predictions.coefficients(process, config.prediction, t)
    )
    mse = _mean((a * x_0 + b * eps - output) ** 2)
    losses = {"loss": weight(process, config, t) * mse, "mse": mse}
    if variance is not None:
        # stop_gradient, because the bound trains only the variance; the mse trains the prediction.
        solution = predictions.solve(process, config.prediction, t)
        x_0_hat, _ = solution.x_0_and_eps(x_t, jax.lax.stop_gradient(output))
        losses["vb"] = _variational_bound(process, x_0, x_t, t, x_0_hat, variance)
        losses["loss"] += losses["vb"]
    return losses


def check(process: processes.Process, config, learn_sigma: bool) -> None:
    """Raises ValueError unless the names in `config.objective` are known and fit the process."""
    # The next two calls raise for an unknown prediction, and for a prediction that does not
    # determine x_0 at the last level of a chain. The time 0.5 is arbitrary.
    predictions.coefficients(process, config.prediction, np.full(1, 0.5))
    process.first_t(config.prediction)
    check_choice("objective.weight", config.weight, WEIGHTS)
    check_choice("objective.t_distribution", config.t_distribution, T_DISTRIBUTIONS)
    is_chain = isinstance(process, processes.DiscreteProcess)
    # The levels of a chain are fixed, so min_t would have no effect.
    if is_chain and config.min_t != MIN_T:
        raise UserError(
            f"objective.min_t={config.min_t} has no effect with diffusion.process=ddpm. The "
            "first level is the smallest t there. Leave min_t out."
        )
    # A weight of 0 would not train the level at which samplers begin.
    if is_chain and weight(process, config, jnp.ones(1)) == 0:
        raise UserError(
            f"objective.weight={config.weight} with prediction={config.prediction} is 0 at the "
            "last level, where samplers begin. With diffusion.zero_terminal_snr set 'uniform'."
        )
    # `_variational_bound` needs the posterior between two neighbouring levels.
    if learn_sigma and not is_chain:
        raise UserError(
            "model.learn_sigma=True: a learned variance needs diffusion.process=ddpm. Set "
            "model.learn_sigma=False."
        )


def weight(process: processes.Process, config, t: jax.Array) -> jax.Array:
    """Returns the weight [B] of the prediction's squared error at t, by `config.objective.weight`.

    The papers define most weights for the error of x_0 or of eps. Here they are converted to the
    error of this prediction. With 'likelihood' and uniform t, the loss is the bound on -log p(x_0)
    in nats per value.
    """
    target, target_weight = WEIGHTS[config.weight]
    value = target_weight(process, config, t)
    if target == "output":
        return value
    # The factor converts a squared error of the network's output to a squared error of the target.
    solution = predictions.solve(process, config.prediction, t)
    return value * getattr(solution, f"{target}_from_output") ** 2


# The target of the squared error, and the function (process, config, t) -> weights [B].
WEIGHTS = {
    "uniform": ("output", lambda process, config, t: jnp.ones_like(t)),
    # Hang et al. 2023, eq. 8
    "min_snr": ("x_0", lambda process, config, t: jnp.minimum(process.snr(t), config.snr_gamma)),
    # Choi et al. 2022, eq. 8
    "p2": ("eps", lambda process, config, t: (1 + process.snr(t)) ** -config.p2_gamma),
    # (r^2 + d^2) / (r d)^2 for r = sigma / alpha and d = sigma_data: Karras et al. 2022, table 1
    "edm": ("x_0", lambda process, config, t: 1 / process.sigma_data**2 + process.snr(t)),
    # Kingma et al. 2021, eq. 13 and 17
    "likelihood": ("x_0", lambda process, config, t: 0.5 * process.snr_rate(t)),
}


def draw(process: processes.Process, config, key: jax.Array, shape) -> tuple[jax.Array, jax.Array]:
    """Draws t [B] and eps for a global batch of x_0 with this shape, by `config.objective`.

    t is 'uniform'; 'logit_normal', the sigmoid of N(t_mean, t_std^2); or 'log_normal', where
    log(sigma / alpha) is N(t_mean, t_std^2). With low_discrepancy, the distribution of t is divided
    into B parts of equal probability, and one t is drawn from each.
    Source: Esser et al. 2024, section 3.1; Karras et al. 2022, table 1; Kingma et al. 2021,
      appendix I.1.
    """
    t_key, eps_key = jax.random.split(key)
    batch_size = shape[0]
    if config.low_discrepancy:
        # With one offset for the whole batch, every part gets one value.
        u = jax.random.uniform(t_key) + jnp.arange(batch_size) / batch_size
        u = u % 1
    else:
        u = jax.random.uniform(t_key, (batch_size,))
    t = T_DISTRIBUTIONS[config.t_distribution](process, config, u)
    return t, jax.random.normal(eps_key, shape)


def _logit_normal(process, config, u):
    return process.clip_time(jax.nn.sigmoid(_normal(config, u)), config.min_t)


def _log_normal(process, config, u):
    ratio = jnp.exp(_normal(config, u))
    return process.clip_time(process.time_of_ratio(ratio), config.min_t)


def _normal(config, u):
    # Without the minimum, u = 0 would become minus infinity.
    return config.t_mean + config.t_std * jax.scipy.special.ndtri(jnp.maximum(u, 2**-24))


# The functions (process, config, u) -> t [B] of u [B], which is uniform in [0, 1).
T_DISTRIBUTIONS = {
    "uniform": lambda process, config, u: process.map_uniform(u, config.min_t),
    "logit_normal": _logit_normal,
    "log_normal": _log_normal,
}


def split_prediction(output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """Splits a network's output into the prediction, and the variance or None.

    Raises: ValueError unless the output has C or 2C channels, for C `channels` of x_0.
    """
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] == 2 * channels:
        return output[..., :channels], output[..., channels:]
    raise UserError(
        f"the network returned {output.shape[-1]} channels for {channels} of x_0. It must return "
        f"{channels}, or {2 * channels} with a variance."
    )


def learned_log_variance(variance: jax.Array, log_beta, log_posterior) -> jax.Array:
    """Interpolates the log-variance from its lower bound log_posterior at -1 to log_beta at +1.

    Source: Nichol & Dhariwal 2021, eq. 15.
    """
    fraction = (variance + 1) / 2
    return fraction * log_beta + (1 - fraction) * log_posterior


def _variational_bound(process, x_0, x_t, t, x_0_hat, variance):
    """Returns [B] L_{t-1}, or L_0 at the first level, in bits, averaged over elements.

    Source: Ho et al. 2020, eq. 8 and 13.
    """
    # The posteriors of all steps are a table in f64; each example takes one row.
    times = np.arange(process.num_steps, -1, -1) / process.num_steps
    table = process.posterior(times[:-1], times[1:])  # row 0 is DDPM's index T - 1
    row = process.num_steps - process.level(t)

    def gather(a):
        return processes.expand(jnp.asarray(a, jnp.float32)[row], x_0)

    def mean(x_0):
        return gather(table.x_0_coef) * x_0 + gather(table.x_t_coef) * x_t

    log_posterior = gather(table.log_variance)
    log_variance = learned_log_variance(variance, gather(table.log_beta), log_posterior)
    mean_hat = mean(x_0_hat)
    kl = normal_kl(mean(x_0), log_posterior, mean_hat, log_variance)
    nll = -discretised_normal_log_likelihood(x_0, mean_hat, 0.5 * log_variance)
    return jnp.where(process.level(t) == 1, _mean(nll), _mean(kl)) / math.log(2)


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """Returns KL(N_1 || N_2) per element, in nats."""
    ratio = jnp.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + distance - 1)


def discretised_normal_log_likelihood(x, mean, log_std):
    """Returns log P(bin of width 2/255 around x); the outermost bins reach to infinity.

    The bins, the tanh approximation of the normal CDF and the clamps are those of the published
    loss. For latents, bins have no meaning, but the published loss has them too.
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
    """Returns a VAE's loss of each example: distance + kl_weight KL / number of values.

    Args:
      pixels, reconstruction: [B, H, W, C] f32, in [-1, 1].
      mean, log_variance: [B, h, w, c], of the posterior.
      distance: 'l1' or 'l2', to the reconstruction, averaged over the H W C values of an image.
    Returns: 'loss'; 'reconstruction', the distance; 'kl', the KL to N(0, I) in nats per image;
      'psnr', dB, of the reconstruction clipped to [-1, 1]; each [B] f32.
    Source: Rombach et al. 2022, appendix G, with kl_weight 1e-6 and a distance summed over pixels.
    """
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3))
    error = _mean(DISTANCES[distance](pixels - reconstruction))
    loss = error + kl_weight * kl / math.prod(pixels.shape[1:])
    squared = _mean((pixels - jnp.clip(reconstruction, -1, 1)) ** 2)
    psnr = 10 * jnp.log10(4 / jnp.maximum(squared, 1e-10))  # 4 is the squared range
    return {"loss": loss, "reconstruction": error, "kl": kl, "psnr": psnr}


def _mean(a):
    """Averages [B, ...] to [B]."""
    return jnp.mean(a, axis=tuple(range(1, a.ndim)))
