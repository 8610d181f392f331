"""The hybrid loss against recorded values, and what its gradient may reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import objectives


def test_losses_equal_the_published_ones(golden, process, golden_predict):
    """The golden's indices include 0, where the bound is the discretised likelihood."""
    losses = objectives.ddpm_loss(
        process,
        lambda x_t, t: golden_predict(x_t, t, golden["y"]),
        golden["x_0"],
        t=process.time_of_index(jnp.asarray(golden["t"])),
        eps=golden["eps"],
    )
    assert 0 in golden["t"]
    for name, published in (("mse", "loss_mse"), ("vb", "loss_vb"), ("loss", "loss_loss")):
        np.testing.assert_allclose(losses[name], golden[published], rtol=2e-5)


def test_key_draws_what_is_not_given(golden, process):
    def predict(x_t, t):
        return 0.1 * x_t + 0.001 * t[:, None, None, None]

    key, x_0 = jax.random.key(0), jnp.asarray(golden["x_0"])
    t, eps = objectives.draw(process, key, x_0.shape)
    by_key = objectives.ddpm_loss(process, predict, x_0, key)["loss"]
    given = objectives.ddpm_loss(process, predict, x_0, t=t, eps=eps)["loss"]
    half = objectives.ddpm_loss(process, predict, x_0, key, t=t)["loss"]
    np.testing.assert_array_equal(by_key, given)
    np.testing.assert_array_equal(by_key, half)
    other = objectives.ddpm_loss(process, predict, x_0, jax.random.key(1))["loss"]
    assert np.all(np.asarray(other != by_key))


def test_without_learned_variance_the_loss_is_the_mse(golden, process):
    losses = objectives.ddpm_loss(process, lambda x_t, t: x_t, golden["x_0"], jax.random.key(0))
    assert losses.keys() == {"loss", "mse"}
    np.testing.assert_array_equal(losses["loss"], losses["mse"])


def test_bound_teaches_only_the_variance(golden, process):
    x_0 = jnp.asarray(golden["x_0"])
    t, eps = process.time_of_index(jnp.array([0, 10, 900])), jnp.asarray(golden["eps"])

    def grads(name):
        def total(output):
            losses = objectives.ddpm_loss(process, lambda *_: output, x_0, t=t, eps=eps)
            return jnp.sum(losses[name])

        return jnp.split(jax.grad(total)(0.3 * jnp.ones((*x_0.shape[:-1], 8))), 2, axis=-1)

    eps_grad, variance_grad = grads("vb")
    assert not np.any(np.asarray(eps_grad))
    assert np.all(np.any(np.asarray(variance_grad), axis=(1, 2, 3)))
    eps_grad, variance_grad = grads("mse")
    assert not np.any(np.asarray(variance_grad))
    assert np.any(np.asarray(eps_grad))


def test_learned_variance_moves_between_its_bounds():
    bounds = jnp.float32(-2.0), jnp.float32(-5.0)
    values = objectives.learned_log_variance(jnp.array([1.0, -1.0, 0.0]), *bounds)
    np.testing.assert_allclose(values, [-2.0, -5.0, -3.5])


def test_bound_vanishes_where_the_prediction_is_exact(golden, process):
    """eps exact and the variance the posterior's: the two normals are the same."""
    x_0, eps = jnp.asarray(golden["x_0"]), jnp.asarray(golden["eps"])
    exact = jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)
    t = process.time_of_index(jnp.array([5, 300, 900]))
    vb = objectives.ddpm_loss(process, lambda *_: exact, x_0, t=t, eps=eps)["vb"]
    np.testing.assert_allclose(vb, 0, atol=1e-5)


def test_other_channel_counts_are_refused(golden, process):
    def predict(x_t, t):
        return x_t[..., :3]

    with pytest.raises(ValueError, match="returned 3 channels for 4"):
        objectives.ddpm_loss(process, predict, golden["x_0"], jax.random.key(0))


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_autoencoder_loss_of_known_errors(distance):
    """A reconstruction off by 0.1 everywhere, posterior N(1, 4) in 6 values."""
    pixels = jnp.full((2, 4, 4, 3), 0.5)
    mean, log_variance = jnp.ones((2, 1, 2, 3)), jnp.full((2, 1, 2, 3), np.log(4.0))
    losses = objectives.autoencoder_loss(
        pixels, pixels + 0.1, mean, log_variance, distance=distance, kl_weight=0.01
    )
    error = {"l1": 0.1, "l2": 0.01}[distance]
    kl = 6 * 0.5 * (1 + 4 - 1 - np.log(4.0))  # nats per image
    np.testing.assert_allclose(losses["reconstruction"], 2 * [error], rtol=1e-5)
    np.testing.assert_allclose(losses["kl"], 2 * [kl], rtol=1e-6)
    np.testing.assert_allclose(losses["psnr"], 2 * [20 * np.log10(2 / 0.1)], rtol=1e-5)
    np.testing.assert_allclose(losses["loss"], 2 * [error + 0.01 * kl / 48], rtol=1e-5)


def test_psnr_is_of_the_clipped_image():
    pixels, moments = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 1, 1, 1))
    losses = objectives.autoencoder_loss(
        pixels, pixels + 5, moments, moments, distance="l1", kl_weight=0.0
    )
    assert float(losses["psnr"][0]) == pytest.approx(10 * np.log10(4 / 1e-10))
    np.testing.assert_allclose(losses["loss"], [5.0])
    np.testing.assert_allclose(losses["kl"], [0.0])
