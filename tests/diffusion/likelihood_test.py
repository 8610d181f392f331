"""Likelihoods against closed forms for Gaussian data."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close

from configs import default
from dit_jax import latents
from dit_jax.diffusion import grids, likelihood, objectives, solvers

CONTINUOUS = ("vp", "flow", "gvp", "edm")
MEAN, STD = 0.7, 0.5


def make_gaussian_denoise(process, times, mean, std):
    """Returns the exact `denoise` for data N(mean, std^2)."""

    def denoise(x_t, i):
        alpha, sigma = (
            jnp.asarray(f(times), jnp.float32)[i] for f in (process.alpha, process.sigma)
        )
        error = (x_t - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
        return solvers.Denoised(mean + alpha * std**2 * error, sigma * error, None)

    return denoise


def compute_normal_bits(x, mean, std):
    """Returns -log2 of the density, averaged over the values of each example: [B]."""
    nats = 0.5 * np.log(2 * np.pi * std**2) + (x - mean) ** 2 / (2 * std**2)
    return nats.reshape(len(x), -1).mean(1) / np.log(2)


def compute_normal_bound(process, x_0, variance, discretised=False, learned=None):
    grid = grids.build(process, 20)
    exact = make_gaussian_denoise(process, grid, 0.0, 1.0)

    def denoise(x_t, i):
        return exact(x_t, i)._replace(variance=learned and jnp.full_like(x_t, learned))

    def noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x_0.shape)

    arguments = process, denoise, x_0, grid, noise, variance, discretised
    return jax.jit(lambda: likelihood.variational_bound(*arguments))()


def test_bound_of_the_exact_denoiser_equals_the_density(build_process):
    process = build_process("ddpm", num_steps=20, beta_end=0.2)  # some signal is left at t = 1
    x_0 = jnp.broadcast_to(jnp.array([-1.5, 0.2, 2.0]).reshape(3, 1), (3, 100_000))
    bound = compute_normal_bound(process, x_0, "large")
    expected = compute_normal_bits(np.asarray(x_0), 0.0, 1.0)
    assert np.abs(bound.total - expected).max() < 0.02
    assert_close(bound.total, bound.steps.sum(0) + bound.prior, 1e-6)
    assert bound.steps.shape == (20, 3)
    alpha = process.alpha(np.array(1.0))
    kl = 0.5 * ((alpha * np.array([-1.5, 0.2, 2.0])) ** 2 - alpha**2 - np.log1p(-(alpha**2)))
    # As lists, so that each value is compared alone.
    assert_trees_close(bound.prior.tolist(), (kl / np.log(2)).tolist(), 1e-4)


def test_small_variance_loosens_the_bound_and_a_learned_one_selects_large_or_small(process):
    x_0 = jax.random.normal(jax.random.key(1), (4, 1000))
    large, small = (compute_normal_bound(process, x_0, name) for name in ("large", "small"))
    assert (small.total > large.total + 0.01).all()
    for learned, expected in ((1.0, large), (-1.0, small)):
        for variance in ("large", "small"):  # must have no effect beside a learned variance
            bound = compute_normal_bound(process, x_0, variance, learned=learned)
            assert_trees_close(list(bound.steps[:-1]), list(expected.steps[:-1]), 1e-5)


def test_last_step_of_the_bound_always_uses_the_posterior_variance(process):
    x_0 = jax.random.normal(jax.random.key(1), (4, 1000))
    large, small = (compute_normal_bound(process, x_0, name) for name in ("large", "small"))
    assert_close(large.steps[-1], small.steps[-1], 1e-6)


def test_steps_of_the_bound_equal_the_training_loss(process):
    config = default.get_config().objective
    grid = grids.build(process, process.num_steps)
    x_0 = jnp.round(jax.random.uniform(jax.random.key(0), (2, 4, 4, 1)) * 255) / 127.5 - 1

    def noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x_0.shape)

    def predict(x, time):
        scale = (1 + time / 1000).reshape(-1, 1, 1, 1)
        return jnp.concatenate([0.9 * x / scale, jnp.sin(3 * x)], -1)

    denoise = solvers.make_denoise(process, "eps", predict, grid)
    bound = likelihood.variational_bound(process, denoise, x_0, grid, noise, "large", True)
    for step in (0, 400, 998, 999):
        t = jnp.full(2, grid[step], jnp.float32)
        losses = objectives.denoising_loss(process, config, predict, x_0, t, noise(step))
        assert_trees_close({step: bound.steps[step]}, {step: losses["vb"]}, 1e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (-0.9, 0.02), (1.5, 0.001), (0.5, 4.0)])
def test_probabilities_of_the_256_bins_sum_to_1(mean, std):
    x = jnp.arange(256) / 127.5 - 1
    log_p = objectives.discretised_normal_log_likelihood(x, mean, math.log(std))
    assert_close(jnp.exp(log_p).sum(), 1.0, 1e-5)


def test_last_step_of_the_bound_is_a_probability_for_pixels_and_a_density_for_latents(process):
    x_0 = jnp.round(jax.random.uniform(jax.random.key(0), (2, 500)) * 200 + 20) / 127.5 - 1
    pixel_bits = compute_normal_bound(process, x_0, "large", discretised=True).steps
    latent_bits = compute_normal_bound(process, x_0, "large", discretised=False).steps
    assert_trees_close(list(pixel_bits[:-1]), list(latent_bits[:-1]), 1e-5)
    # A bin of width 2 / 255 is narrower than the last step's deviation, 0.01. Its probability
    # is therefore about density times width.
    difference = np.asarray(pixel_bits[-1] - latent_bits[-1])
    assert np.abs(difference - np.log2(255 / 2)).max() < 0.05


def draw_probe(shape, seed=1):
    return jax.random.rademacher(jax.random.key(seed), shape, jnp.float32)


def solve_normal_flow(process, x_0, mean, std, steps, probe=None):
    """Returns two log p [B]: as `ode_log_likelihood` computes it, and in closed form."""
    times = likelihood.ode_times(process, steps)
    probe = draw_probe(x_0.shape) if probe is None else probe
    denoise = make_gaussian_denoise(process, times, mean, std)
    solve = jax.jit(lambda: likelihood.ode_log_likelihood(process, denoise, x_0, times, probe))
    first, last = (process.sigma(times) / process.alpha(times))[[0, -1]]
    stretch = np.sqrt((std**2 + last**2) / (std**2 + first**2))
    end = mean + (np.asarray(x_0, np.float64) - mean) * stretch
    prior = last**2 + process.sigma_data**2
    log_p = -0.5 * np.log(2 * np.pi * prior) - end**2 / (2 * prior) + np.log(stretch)
    return np.asarray(solve(), np.float64), log_p.reshape(len(x_0), -1).sum(1)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ode_likelihood_of_gaussian_data_equals_the_density(build_process, name):
    process = build_process(name)
    x_0 = MEAN + STD * jax.random.normal(jax.random.key(0), (32, 8, 8, 2))
    actual, exact = solve_normal_flow(process, x_0, MEAN, STD, 50)
    assert_close(actual / 128, exact / 128, 5e-5)
    std = math.hypot(STD, likelihood.FIRST_RATIO)
    density = -compute_normal_bits(np.asarray(x_0), MEAN, std) * np.log(2)
    assert (actual / 128).mean() == pytest.approx(density.mean(), abs=1e-3)


def test_ode_prior_has_the_variance_of_noise_plus_data(build_process):
    process = build_process("edm", sigma_max=3.0, sigma_data=STD)
    x_0 = STD * jax.random.normal(jax.random.key(0), (8, 100))
    # The flow of data with deviation sigma_data is 0, so 4 steps are enough.
    actual, _ = solve_normal_flow(process, x_0, 0.0, STD, 4)
    density = -compute_normal_bits(np.asarray(x_0), 0.0, math.hypot(STD, 0.002)) * np.log(2)
    assert_close(actual / 100, density, 1e-5)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ode_likelihood_converges_with_order_4(build_process, name):
    x_0 = MEAN + STD * jax.random.normal(jax.random.key(0), (8, 100))
    errors = []
    for steps in (10, 40):
        actual, exact = solve_normal_flow(build_process(name), x_0, MEAN, STD, steps)
        errors.append(np.abs(actual - exact).max())
    assert errors[0] > 4**4 * errors[1]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ode_likelihood_of_correlated_values_is_exact_on_average_over_probes(build_process, name):
    process = build_process(name)
    covariance = np.array([[0.3, 0.2], [0.2, 0.2]])
    x_0 = np.array([[0.4, 0.5], [-1.0, 0.3], [0.0, 0.0]])
    times = likelihood.ode_times(process, 50)
    alpha, sigma = process.alpha(times), process.sigma(times)
    x_t_covariance = alpha[:, None, None] ** 2 * covariance + sigma[:, None, None] ** 2 * np.eye(2)
    eps_matrix = jnp.asarray(np.linalg.inv(x_t_covariance) * sigma[:, None, None], jnp.float32)

    def denoise(x_t, i):
        return solvers.Denoised(None, x_t @ eps_matrix[i], None)

    @jax.jit
    def solve(probe):
        x = jnp.asarray(x_0, jnp.float32)
        probe = jnp.broadcast_to(probe, x.shape)
        return likelihood.ode_log_likelihood(process, denoise, x, times, probe)

    actual = np.stack([solve(jnp.array(probe)) for probe in ([1.0, 1.0], [1.0, -1.0])])
    covariance = covariance + likelihood.FIRST_RATIO**2 * np.eye(2)
    density = -0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    density -= 0.5 * np.einsum("bi,ij,bj->b", x_0, np.linalg.inv(covariance), x_0)
    assert np.abs(actual.mean(0) - density).max() / 2 < 1e-3
    assert (np.abs(actual - density) > 0.1).all()  # one probe alone misses the trace


def test_divergence_averages_to_the_trace_without_forward_mode():
    """A custom_vjp has no forward mode."""
    matrix = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)

    @jax.custom_vjp
    def f(x):
        return x @ matrix.T

    f.defvjp(lambda x: (f(x), None), lambda _, g: (g @ matrix,))
    x = jnp.arange(8.0).reshape(2, 4)
    probes = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    actual = [likelihood.estimate_divergence(f, x, jnp.stack([probe, probe])) for probe in probes]
    np.testing.assert_array_equal(actual[0][0], f(x))
    estimates = np.array([estimate for _, estimate in actual])
    assert_close(estimates.mean(0), np.full(2, np.trace(matrix)), 1e-5)
    assert estimates.std(0).min() > 0.1


def test_uniform_pixels_have_8_bits():
    images = np.arange(256, dtype=np.uint8)
    x_0 = latents.pixels_from_image(jnp.asarray(images)).reshape(2, 128)
    low, high = (likelihood.dequantise(x_0, jnp.full_like(x_0, u)) for u in (0.0, 1.0))
    assert_close((low + high) / 2, x_0, 1e-6)
    assert_close(low.ravel()[1:], high.ravel()[:-1], 1e-6)  # bins touch
    density = 1 / (high.max() - low.min())
    log_p = jnp.full(2, 128 * jnp.log(density))
    assert_close(likelihood.bits_per_dim(log_p, x_0, True), np.full(2, 8.0), 1e-6)
    density_bits = jnp.full(2, -jnp.log2(density))
    assert_close(likelihood.bits_per_dim(log_p, x_0, False), density_bits, 1e-6)
