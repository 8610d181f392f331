"""The losses against their papers' formulas, written here independently in f64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_trees_close

from configs import default
from dit_jax import diffusion
from dit_jax.diffusion import objectives

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1 - BETAS)
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
ALPHA_BAR_BEFORE = np.append(1.0, ALPHA_BAR[:-1])
INDEX = np.append(np.arange(T), [0] * 10)  # `_data` gives the last example a huge error


def _column(table):
    return np.asarray(table)[:, None, None, None]


def _data():
    """Returns x_0, eps and an error to add to eps, each [1010, 2, 2, 3]."""
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, len(INDEX), 2, 2, 3))
    error = rng.uniform(-2.5, 2.5, x_0.shape)  # at index 0 up to 3 deviations
    error[-1] = 100
    x_0 = np.clip(0.8 * x_0, -1, 1)  # some values fall into the outermost of the 256 bins
    return x_0.astype(np.float32), eps.astype(np.float32), error


def _loss(config, x_0, eps, output):
    """Returns dit_jax's losses at INDEX for the network output [B, h, w, C or 2C]."""
    process = diffusion.build(config.diffusion)

    def predict(x_t, network_time):
        del x_t
        np.testing.assert_array_equal(network_time, INDEX)
        return jnp.asarray(output)

    t = jnp.asarray((INDEX + 1) / T, jnp.float32)
    losses = objectives.denoising_loss(process, config.objective, predict, x_0, t, eps)
    return {name: np.asarray(loss) for name, loss in losses.items()}


def _config(changes):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    return config


def _mean(a):
    return a.mean(axis=(1, 2, 3))


def _compare(name, actual, expected, offset=0.0):
    """Compares each example's loss alone, since the losses differ by orders of magnitude."""
    actual, expected = actual + offset, expected + offset
    difference = np.abs(actual / expected - 1)
    print(f"{name} differs by {difference.max():.1e}, in example {difference.argmax()}")
    assert_trees_close(actual.tolist(), expected.tolist(), 2e-5)


def _network(prediction, x_0, eps, error):
    """Returns (target, output, x_0 by the output), where the output's eps is off by the error."""
    a, s = _column(np.sqrt(ALPHA_BAR)[INDEX]), _column(np.sqrt(1 - ALPHA_BAR)[INDEX])
    x_t = a * x_0 + s * eps
    if prediction == "eps":
        output = (eps + error).astype(np.float32)
        return eps, output, (x_t - s * output) / a
    if prediction == "x_0":
        output = (x_0 - s / a * error).astype(np.float32)
        return x_0, output, output
    target = a * eps - s * x_0
    output = (target + error / a).astype(np.float32)
    return target, output, a * x_t - s * output


def _hybrid_terms(x_0, x_t, x_0_hat, variance):
    """Returns L_{t-1}, or L_0 at index 0, in bits: Ho et al. 2020, eq. 6-8 and 13."""
    x_0_coef = _column(np.sqrt(ALPHA_BAR_BEFORE) * BETAS / (1 - ALPHA_BAR))
    x_t_coef = _column(np.sqrt(1 - BETAS) * (1 - ALPHA_BAR_BEFORE) / (1 - ALPHA_BAR))
    posterior_variance = BETAS * (1 - ALPHA_BAR_BEFORE) / (1 - ALPHA_BAR)
    posterior_variance[0] = posterior_variance[1]  # at index 0 it is 0, with log -inf
    low, high = _column(np.log(posterior_variance)), _column(np.log(BETAS))
    x_0_coef, x_t_coef, low, high = (table[INDEX] for table in (x_0_coef, x_t_coef, low, high))

    fraction = (variance + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
    log_variance = fraction * high + (1 - fraction) * low
    mean, mean_hat = (x_0_coef * x + x_t_coef * x_t for x in (x_0, x_0_hat))
    kl = (mean - mean_hat) ** 2 / np.exp(log_variance) + np.exp(low - log_variance)
    kl = 0.5 * (kl - 1 + log_variance - low)

    def cdf(z):  # the tanh approximation of the normal cdf
        return (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2

    std = np.exp(log_variance / 2)
    above = np.where(x_0 > 0.999, 1, cdf((x_0 + 1 / 255 - mean_hat) / std))
    below = np.where(x_0 < -0.999, 0, cdf((x_0 - 1 / 255 - mean_hat) / std))
    nll = -np.log(np.maximum(above - below, 1e-12))
    return np.where(INDEX == 0, _mean(nll), _mean(kl)) / np.log(2)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_hybrid_loss_equals_the_papers_formulas(prediction, learned_variance):
    x_0, eps, error = _data()
    target, output, x_0_hat = _network(prediction, x_0, eps, error)
    mse = _mean((target - output) ** 2)
    expected = {"mse": mse, "loss": mse}
    if learned_variance:
        variance = np.random.default_rng(1).uniform(-1, 1, x_0.shape).astype(np.float32)
        output = np.concatenate([output, variance], axis=-1)
        x_t = _column(np.sqrt(ALPHA_BAR)[INDEX]) * x_0
        x_t += _column(np.sqrt(1 - ALPHA_BAR)[INDEX]) * eps
        vb = _hybrid_terms(x_0, x_t, x_0_hat, variance)
        expected |= {"vb": vb, "loss": mse + vb}
    losses = _loss(_config({"objective.prediction": prediction}), x_0, eps, output)
    assert losses.keys() == expected.keys()
    for name in losses:
        # f32 terms of about 1 cancel in vb, which leaves absolute errors: hence the offset.
        _compare(name, losses[name], expected[name], offset=0.01)


def _min_snr(prediction, gamma):
    """Hang et al. 2023, section 3.4."""
    clipped = np.minimum(SNR, gamma)
    return {"x_0": clipped, "eps": clipped / SNR, "v": clipped / (SNR + 1)}[prediction]


def _p2(prediction, gamma):
    """Choi et al. 2022, eq. 8 with k = 1, which weights the error of eps."""
    eps_weight = 1 / (1 + SNR) ** gamma
    return eps_weight * {"eps": 1, "x_0": SNR, "v": ALPHA_BAR}[prediction]


def _likelihood(prediction):
    """Kingma et al. 2021, eq. 13, which weights the error of x_0."""
    # The weight of index 0 is unbounded; it takes that of index 1.
    x_0_weight = T / 2 * np.append(SNR[0] - SNR[1], SNR[:-1] - SNR[1:])
    return x_0_weight * {"eps": 1 / SNR, "x_0": 1, "v": 1 - ALPHA_BAR}[prediction]


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({"weight": "min_snr"}, lambda prediction: _min_snr(prediction, 5)),
        ({"weight": "min_snr", "snr_gamma": 1.0}, lambda prediction: _min_snr(prediction, 1)),
        ({"weight": "p2"}, lambda prediction: _p2(prediction, 1)),
        ({"weight": "p2", "p2_gamma": 0.5}, lambda prediction: _p2(prediction, 0.5)),
        ({"weight": "likelihood"}, _likelihood),
    ],
    ids=["min_snr_5", "min_snr_1", "p2_1", "p2_half", "likelihood"],
)
def test_weights_equal_the_papers_formulas(changes, weight, prediction):
    x_0, eps, error = _data()
    target, output, _ = _network(prediction, x_0, eps, error)
    changes = {f"objective.{key}": value for key, value in changes.items()}
    config = _config(changes | {"objective.prediction": prediction})
    loss = _loss(config, x_0, eps, output)["loss"]
    _compare("loss", loss, weight(prediction)[INDEX] * _mean((target - output) ** 2))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_loss_equals_the_papers_formula(sigma_data):
    """Karras et al. 2022, eq. 7 and 8 and table 1, from sigma 0.002 to 80."""
    config = default.get_config(process="edm")
    config.diffusion.sigma_data = sigma_data
    process = diffusion.build(config.diffusion)
    x_0, eps, _ = _data()
    sigma = np.geomspace(0.002, 80, len(x_0))
    t = (sigma / 80).astype(np.float32)
    s = _column(80 * t.astype(np.float64))
    x = x_0 + s * eps

    def network(xp, x, c_noise):
        return xp.tanh(2 * x) + xp.sin(3 * c_noise)[:, None, None, None]

    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / np.sqrt(s**2 + sigma_data**2)
    c_in = 1 / np.sqrt(s**2 + sigma_data**2)
    c_noise = np.log(s) / 4
    denoised = c_skip * x + c_out * network(np, c_in * x, c_noise[:, 0, 0, 0])
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    loss = objectives.denoising_loss(
        process, config.objective, lambda *a: network(jnp, *a), x_0, jnp.asarray(t), eps
    )["loss"]
    _compare("loss", loss, _mean(weight * (denoised - x_0) ** 2))
