"""The losses against recorded values and theory, and which outputs their gradients reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers.close import assert_close, assert_trees_close

from configs import default
from dit_jax.diffusion import objectives, predictions, processes

ALL = ("ddpm", "vp", "flow", "gvp", "edm")


def _objective(**changes):
    config = default.get_config().objective
    config.update(changes)
    return config


def test_losses_equal_the_published_code(golden, process, golden_predict):
    losses = objectives.denoising_loss(
        process,
        _objective(),
        lambda x_t, t: golden_predict(x_t, t, golden["y"]),
        golden["x_0"],
        process.time_of_index(jnp.asarray(golden["t"])),
        golden["eps"],
    )
    assert 0 in golden["t"]  # there the bound is the discretised likelihood
    for name, published in (("mse", "loss_mse"), ("vb", "loss_vb"), ("loss", "loss_loss")):
        assert_trees_close(losses[name].tolist(), golden[published].tolist(), 2e-5)


def _loss(golden, process, predict, t, **changes):
    x_0, eps = jnp.asarray(golden["x_0"]), jnp.asarray(golden["eps"])
    return objectives.denoising_loss(process, _objective(**changes), predict, x_0, t, eps)


def test_loss_without_learned_variance_is_the_mse(golden, process):
    losses = _loss(golden, process, lambda x_t, t: x_t, jnp.array([0.001, 0.5, 1.0]))
    assert losses.keys() == {"loss", "mse"}
    np.testing.assert_array_equal(losses["loss"], losses["mse"])


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_bound_has_a_gradient_for_the_variance_alone(golden, process, prediction):
    t = process.time_of_index(jnp.array([0, 10, 900]))

    def grads(name):
        def total(output):
            losses = _loss(golden, process, lambda *_: output, t, prediction=prediction)
            return jnp.sum(losses[name])

        return jnp.split(jax.grad(total)(0.3 * jnp.ones((3, 8, 8, 8))), 2, axis=-1)

    prediction_grad, variance_grad = grads("vb")
    assert not np.any(np.asarray(prediction_grad))
    assert np.all(np.any(np.asarray(variance_grad), axis=(1, 2, 3)))
    prediction_grad, variance_grad = grads("mse")
    assert not np.any(np.asarray(variance_grad))
    assert np.any(np.asarray(prediction_grad))


def test_learned_variance_interpolates_between_its_bounds():
    bounds = jnp.float32(-2.0), jnp.float32(-5.0)
    values = objectives.learned_log_variance(jnp.array([1.0, -1.0, 0.0]), *bounds)
    assert_close(values, [-2.0, -5.0, -3.5], 1e-7)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_bound_is_0_for_an_exact_prediction_with_the_posterior_variance(
    golden, process, prediction
):
    t = process.time_of_index(jnp.array([5, 300, 900]))
    a, b = predictions.coefficients(process, prediction, t)
    exact = a[:, None, None, None] * golden["x_0"] + b[:, None, None, None] * golden["eps"]
    output = jnp.concatenate([exact, -jnp.ones_like(exact)], axis=-1)
    losses = _loss(golden, process, lambda *_: output, t, prediction=prediction)
    assert np.abs(losses["vb"]).max() < 1e-5
    assert np.abs(losses["mse"]).max() < 1e-10


def test_predictions_with_wrong_channel_counts_are_refused(golden, process):
    with pytest.raises(ValueError, match="returned 3 channels for 4"):
        _loss(golden, process, lambda x_t, t: x_t[..., :3], jnp.full(3, 0.5))


@pytest.mark.parametrize("weight", objectives.WEIGHTS)
@pytest.mark.parametrize("name", ["ddpm", "flow", "edm"])
def test_weighted_error_is_the_same_for_every_prediction(build_process, name, weight):
    """Every weight except uniform is defined for the error of x_0 or eps."""
    process = build_process(name, sigma_data=0.5, sigma_max=10.0)
    t = jnp.array([0.01, 0.2, 0.5, 0.9])
    error = 0.37  # x_0's error at every t; eps is then off by -alpha / sigma * error
    weighted = {}
    for prediction in predictions.PREDICTIONS:
        a, b = predictions.coefficients(process, prediction, t)
        squared = (error * (a - b * process.alpha(t) / process.sigma(t))) ** 2
        config = _objective(prediction=prediction, weight=weight, p2_gamma=0.5)
        weighted[prediction] = objectives.weight(process, config, t) * squared
    if weight == "uniform":
        assert_close(weighted["x_0"], np.full(4, error**2), 1e-5)
        assert np.abs(weighted["eps"] / weighted["x_0"] - 1).max() > 0.1
        return
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    expected = {
        "min_snr": jnp.minimum(snr, 5.0),
        "p2": snr / (1 + snr) ** 0.5,
        "edm": snr + 4,
        "likelihood": 0.5 * process.snr_rate(t),
    }[weight]
    for actual in weighted.values():
        # As lists, so that each t is compared alone.
        assert_trees_close(actual.tolist(), (error**2 * expected).tolist(), 2e-3)


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [(prediction, "uniform") for prediction in predictions.PREDICTIONS]
    + [("x_0", weight) for weight in list(objectives.WEIGHTS)[1:]],
)
@pytest.mark.parametrize("name", ["ddpm", "flow", "edm"])
def test_every_objective_has_the_same_minimiser(build_process, name, prediction, weight):
    """Fits x_0_hat = offset + slope * x_t at three t; the minimum must be the posterior's mean.

    The loss is quadratic in offset and slope, so Newton's method finds its minimum in one step.
    """
    process = build_process(name, sigma_data=0.5, sigma_max=5.0)
    config = _objective(prediction=prediction, weight=weight)
    keys, size = jax.random.split(jax.random.key(0)), 6_000
    x_0 = 0.7 + 0.5 * jax.random.normal(keys[0], (3 * size, 1, 1, 1))
    eps = jax.random.normal(keys[1], x_0.shape)
    t = jnp.repeat(jnp.array([0.2, 0.4, 0.7]), size)
    alpha, sigma, scale, a, b = (
        processes.expand(c, x_0)
        for c in (
            process.alpha(t),
            process.sigma(t),
            process.network_scale(t),
            *predictions.coefficients(process, prediction, t),
        )
    )

    @jax.grad
    def gradient(affine):
        def predict(x, network_time):
            offset, slope = (processes.expand(jnp.repeat(c, size), x) for c in affine)
            x_0_hat = offset + slope * x / scale
            return a * x_0_hat + b * (x / scale - alpha * x_0_hat) / sigma

        losses = objectives.denoising_loss(process, config, predict, x_0, t, eps)
        return losses["loss"].mean()

    points = np.eye(7, 6, -1).reshape(7, 2, 3)  # the origin and the six unit vectors
    at_zero, *at_units = np.asarray(jax.jit(jax.vmap(gradient))(points), np.float64).reshape(7, 6)
    offset, slope = -np.linalg.solve(at_units - at_zero, at_zero).reshape(2, 3)
    alpha, sigma = (np.ravel(c)[::size] for c in (alpha, sigma))
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    assert np.abs(slope - gain).max() < 0.03
    assert np.abs(offset - 0.7 * (1 - gain * alpha)).max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
def test_losses_and_gradients_of_a_bf16_network_are_finite_near_both_ends(
    build_process, name, prediction
):
    process = build_process(name)
    ends = jnp.array([0.0, 1e-4, 1 - 1e-4, 1 - 2**-24])  # the smallest and largest possible draws
    t = process.clip_time(ends, _objective().min_t)
    x_0, eps = (jax.random.normal(jax.random.key(i), (4, 2, 2, 1)) for i in (0, 1))

    def loss(w, config):
        def predict(x, network_time):
            x = x.astype(jnp.bfloat16) * w
            return (x + 0.01 * jnp.tanh(network_time)[:, None, None, None]).astype(jnp.float32)

        return objectives.denoising_loss(process, config, predict, x_0, t, eps)["loss"].sum()

    for weight in objectives.WEIGHTS:
        config = _objective(prediction=prediction, weight=weight)
        value, grad = jax.value_and_grad(loss)(jnp.bfloat16(0.9), config)
        assert np.isfinite(value), weight
        assert np.isfinite(grad), weight


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_drawn_t_follows_the_configured_distribution(build_process, name, low_discrepancy):
    process = build_process(name)

    def draw(**changes):
        config = _objective(low_discrepancy=low_discrepancy, **changes)
        t, eps = objectives.draw(process, config, jax.random.key(0), (4_000, 1, 1, 1))
        assert eps.shape == (4_000, 1, 1, 1)
        return np.asarray(t)

    limit = 0.001 if low_discrepancy else 0.03
    assert scipy.stats.kstest(draw(), "uniform").statistic < limit
    logits = scipy.special.logit(draw(t_distribution="logit_normal", t_mean=-0.5, t_std=0.7))
    assert scipy.stats.kstest(logits, scipy.stats.norm(-0.5, 0.7).cdf).statistic < limit
    t = draw(t_distribution="log_normal", t_mean=-1.2, t_std=1.2)
    log_ratio = -0.5 * np.log(process.snr(t))
    assert scipy.stats.kstest(log_ratio, scipy.stats.norm(-1.2, 1.2).cdf).statistic < limit


def test_low_discrepancy_puts_one_t_in_each_part_with_a_random_shift(build_process):
    """The shift makes the steps cover all of 0..1, also with small batches."""
    config, process = _objective(low_discrepancy=True), build_process("flow")
    draws = [objectives.draw(process, config, jax.random.key(i), (4, 1))[0] for i in range(500)]
    t = np.sort(draws, axis=1)
    np.testing.assert_array_equal(np.floor(t * 4), np.broadcast_to(np.arange(4.0), t.shape))
    np.testing.assert_array_less(np.abs(np.diff(t) - 0.25), 1e-6)
    assert scipy.stats.kstest(t[:, 0] * 4, "uniform").pvalue > 0.01


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "log_normal"])
def test_drawn_t_for_a_chain_is_a_level(process, distribution):
    config = _objective(t_distribution=distribution, t_std=3.0)
    t, _ = objectives.draw(process, config, jax.random.key(0), (1_000, 1, 1, 1))
    levels = np.asarray(t, np.float64) * 1000
    assert_close(levels, np.rint(levels), 1e-6)
    assert levels.min() >= 1
    assert 990 < levels.max() <= 1000


def test_likelihood_weight_integrates_to_the_bound(build_process):
    """The weighted error of the exact denoiser for x_0 ~ N(0, s^2) has a closed form.

    Its mean squared error is s^2 / (1 + s^2 snr). Half the integral of this over snr is
    log(1 + s^2 snr) / 2.
    """
    process, std = build_process("vp"), 0.5
    t = jnp.linspace(0.01, 1, 20_001)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    weight = objectives.weight(process, _objective(prediction="x_0", weight="likelihood"), t)
    integral = jnp.trapezoid(weight * std**2 / (1 + std**2 * snr), t)
    expected = 0.5 * (jnp.log1p(std**2 * snr[0]) - jnp.log1p(std**2 * snr[-1]))
    assert_close(integral, expected, 1e-3)


def test_noise_and_times_depend_on_the_key_alone(process):
    first, repeated = (
        objectives.draw(process, _objective(), jax.random.key(0), (8, 2, 2, 1)) for _ in range(2)
    )
    other = objectives.draw(process, _objective(), jax.random.key(1), (8, 2, 2, 1))
    for a, b, c in zip(first, repeated, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(np.asarray(a != c))


@pytest.mark.parametrize(
    ("name", "changes", "learn_sigma", "message"),
    [
        ("ddpm", dict(prediction="noise"), True, "unknown objective.prediction='noise'"),
        ("ddpm", dict(weight="snr"), True, "unknown objective.weight='snr'; choose one of uniform"),
        ("flow", dict(t_distribution="cosine"), False, "unknown objective.t_distribution='cosine'"),
        ("ddpm", dict(min_t=1e-3), True, "min_t=0.001 has no effect with diffusion.process=ddpm"),
        ("flow", {}, True, "a learned variance needs diffusion.process=ddpm. Set"),
    ],
)
def test_invalid_objectives_are_refused(build_process, name, changes, learn_sigma, message):
    with pytest.raises(ValueError, match=message):
        objectives.check(build_process(name), _objective(**changes), learn_sigma)


def test_eps_is_refused_with_zero_terminal_snr(build_process):
    process = build_process("ddpm", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="does not determine x_0"):
        objectives.check(process, _objective(), learn_sigma=True)
    objectives.check(process, _objective(prediction="v"), learn_sigma=True)
    with pytest.raises(ValueError, match="weight=min_snr with prediction=v is 0 at the last level"):
        objectives.check(process, _objective(prediction="v", weight="min_snr"), learn_sigma=True)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_autoencoder_loss_equals_its_closed_form(distance):
    """The reconstruction is off by 0.1 everywhere."""
    pixels = jnp.full((2, 4, 4, 3), 0.5)
    # The posterior N(1, 4), with 6 latent values per image.
    mean, log_variance = jnp.ones((2, 1, 2, 3)), jnp.full((2, 1, 2, 3), np.log(4.0))
    losses = objectives.autoencoder_loss(
        pixels, pixels + 0.1, mean, log_variance, distance=distance, kl_weight=0.01
    )
    error = {"l1": 0.1, "l2": 0.01}[distance]
    kl = 6 * 0.5 * (1 + 4 - 1 - np.log(4.0))  # nats per image
    assert_close(losses["reconstruction"], 2 * [error], 1e-5)
    assert_close(losses["kl"], 2 * [kl], 1e-6)
    assert_close(losses["psnr"], 2 * [20 * np.log10(2 / 0.1)], 1e-5)
    assert_close(losses["loss"], 2 * [error + 0.01 * kl / 48], 1e-5)


def test_psnr_is_computed_from_the_clipped_image():
    pixels, moments = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 1, 1, 1))
    losses = objectives.autoencoder_loss(
        pixels, pixels + 5, moments, moments, distance="l1", kl_weight=0.0
    )
    assert_close(losses["psnr"], [10 * np.log10(4 / 1e-10)], 1e-6)
    assert_close(losses["loss"], [5.0], 1e-7)
    assert losses["kl"].tolist() == [0.0]
