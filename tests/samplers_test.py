"""Sampled results against recorded ones, and against exact denoisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import diffusion, samplers


@pytest.fixture(scope="module")
def guided_denoise(golden, process, golden_predict):
    """The recorded samples' network: cfg 1.5 on three channels."""
    guided = samplers.classifier_free_guidance(golden_predict, jnp.asarray(golden["y"]), 7, 1.5, 3)
    return lambda x_t, t: guided(x_t, process.network_time(jnp.full(x_t.shape[0], t)))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_equal_the_published_ones(golden, process, guided_denoise, name):
    noise = jnp.asarray(golden["sample_noise"])
    sampler = getattr(samplers, name)
    x_0 = sampler(
        process, guided_denoise, jnp.asarray(golden["x_0"]), process.grid(10), lambda i: noise[i]
    )
    expected = golden[f"{name}_cfg1.5_sample"]
    np.testing.assert_allclose(x_0, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_guidance_equals_the_published_one(golden, golden_predict):
    guided = samplers.classifier_free_guidance(golden_predict, jnp.asarray(golden["y"]), 7, 4.0, 3)
    out = guided(jnp.asarray(golden["x_0"]), jnp.asarray(golden["t"], jnp.float32))
    np.testing.assert_allclose(out, golden["cfg_out_scale4"], rtol=2e-5, atol=2e-5)


def test_guidance_acts_on_the_channels_asked_for():
    def predict(x_t, t, y):
        return jnp.broadcast_to(y[:, None, None, None].astype(jnp.float32), (*x_t.shape[:-1], 8))

    x_t, t, y = jnp.zeros((2, 1, 1, 4)), jnp.zeros(2), jnp.array([1, 2])
    all_channels = samplers.classifier_free_guidance(predict, y, 7, 3.0)(x_t, t)
    np.testing.assert_array_equal(all_channels[:, 0, 0, :4], [4 * [-11.0], 4 * [-8.0]])
    np.testing.assert_array_equal(all_channels[:, 0, 0, 4:], [4 * [1.0], 4 * [2.0]])
    three = samplers.classifier_free_guidance(predict, y, 7, 3.0, 3)(x_t, t)
    np.testing.assert_array_equal(three[0, 0, 0], 3 * [-11.0] + 5 * [1.0])


def test_scale_1_runs_no_unconditional_pass():
    batches = []

    def predict(x_t, t, y):
        batches.append((x_t.shape[0], y.tolist()))
        return x_t

    samplers.classifier_free_guidance(predict, jnp.array([1, 2]), 7, 1.0)(
        jnp.zeros((2, 1, 1, 4)), jnp.zeros(2)
    )
    assert batches == [(2, [1, 2])]


def _gaussian_denoiser(process, mean, std):
    """The exact eps for data N(mean, std^2)."""

    def denoise(x_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return sigma * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return denoise


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_point_mass_is_exact_in_any_number_of_steps(process, name):
    x_T = jax.random.normal(jax.random.key(0), (8, 1, 1, 1))  # noqa: N806
    denoise = _gaussian_denoiser(process, 0.7, 0.0)
    for steps in (2, 7):
        x_0 = getattr(samplers, name)(
            process, denoise, x_T, process.grid(steps), lambda i: jnp.ones_like(x_T)
        )
        np.testing.assert_allclose(x_0, 0.7, atol=2e-4)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", None), ("ddim", 0.0), ("ddim", 0.5)])
def test_gaussian_data_keeps_its_mean_and_variance(process, name, eta):
    x_T = jax.random.normal(jax.random.key(0), (20_000, 1, 1, 1))  # noqa: N806
    options = {} if eta is None else {"eta": eta}
    x_0 = getattr(samplers, name)(
        process,
        _gaussian_denoiser(process, 0.7, 0.5),
        x_T,
        process.grid(500),
        lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x_T.shape),
        **options,
    )
    assert float(x_0.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(x_0.std()) == pytest.approx(0.5, rel=0.03)


def test_learned_variance_is_used(process):
    """variance +1 takes beta, which is what no learned variance takes; -1 takes less."""
    x_T = jnp.zeros((1, 1, 1, 1))  # noqa: N806

    def run(variance):
        def denoise(x_t, t):
            eps = _gaussian_denoiser(process, 0.7, 0.5)(x_t, t)
            extra = [] if variance is None else [jnp.full_like(eps, variance)]
            return jnp.concatenate([eps, *extra], axis=-1)

        return samplers.ddpm(process, denoise, x_T, process.grid(10), lambda i: jnp.ones_like(x_T))

    np.testing.assert_allclose(run(None), run(1.0), rtol=1e-6)
    assert abs(float(np.squeeze(run(-1.0) - run(1.0)))) > 0.01


def test_last_step_adds_no_noise(process):
    """With noise that is infinite at the last step only, a finite result proves it unused."""
    steps = 5
    x_0 = samplers.ddpm(
        process,
        _gaussian_denoiser(process, 0.7, 0.5),
        jnp.zeros((1, 1, 1, 1)),
        process.grid(steps),
        lambda i: jnp.where(i == steps - 1, 1e30, 1.0) * jnp.ones((1, 1, 1, 1)),
    )
    assert abs(float(np.squeeze(x_0))) < 10


def test_ddim_is_the_process_run_backwards(process):
    """Noise that the denoiser knows is removed exactly: x_t at t = 1 leads back to x_0."""
    x_0 = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    eps = jax.random.normal(jax.random.key(1), x_0.shape)
    x_T = diffusion.q_sample(process, x_0, jnp.ones(3), eps)  # noqa: N806
    back = samplers.ddim(process, lambda *_: eps, x_T, process.grid(20), lambda i: eps)
    np.testing.assert_allclose(back, x_0, atol=2e-3)
