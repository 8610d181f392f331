"""Samplers with noise beside the published programs' steps, written out in NumPy's f64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from dit_jax import samplers

STEPS = 8
NOISE = np.random.default_rng(0).standard_normal((STEPS, 4, 1, 1, 1))
X_T = np.array([-1.5, -0.2, 0.4, 2.0]).reshape(4, 1, 1, 1)


def x_0_of(xp, x_t, alpha, sigma):
    """A smooth denoiser."""
    return xp.tanh(2 * x_t / (alpha + sigma) + sigma / (alpha + sigma))


def solve(process, prediction="u", **settings):
    """(x_0 of the sampler of these settings, f64, and how often it calls the network)."""
    config = default.get_config().sample
    config.update(steps=STEPS, **settings)
    with jax.enable_x64(True):
        sampler = samplers.build(config, process, prediction)
        alphas, sigmas = (jnp.asarray(f(sampler.times)) for f in (process.alpha, process.sigma))

        def denoise(x_t, i):
            x_0 = x_0_of(jnp, x_t, alphas[i], sigmas[i])
            return samplers.Denoised(x_0, (x_t - alphas[i] * x_0) / sigmas[i], None)

        parts, noise = [(denoise, len(sampler.grid) - 1)], jnp.asarray(NOISE)
        problem = samplers.Problem(process, sampler.grid, parts, lambda i: noise[i])
        x_0, finite = sampler.solve(problem, jnp.asarray(process.x_T_std * X_T))
        assert x_0.dtype == jnp.float64
        assert finite.all()
        return np.asarray(x_0), int(sampler.evaluations.sum())


def assert_equal(x_0, expected):
    np.testing.assert_allclose(x_0, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def edm_heun(ratios, z, churn, span=(0.0, np.inf), noise_scale=1.0):
    """Karras et al. 2022, algorithm 2, of z = x_t / alpha at these sigma / alpha."""
    for i, (ratio, following) in enumerate(itertools.pairwise(ratios)):
        inside = span[0] <= ratio <= span[1]
        hat = ratio * (1 + (min(churn / STEPS, np.sqrt(2) - 1) if inside else 0))
        z_hat = z + np.sqrt(hat**2 - ratio**2) * noise_scale * NOISE[i]
        rate = (z_hat - x_0_of(np, z_hat, 1, hat)) / hat
        z = z_hat + (following - hat) * rate
        if following:
            next_rate = (z - x_0_of(np, z, 1, following)) / following
            z = z_hat + (following - hat) * (rate + next_rate) / 2
    return z


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(churn_noise=1.007),
        dict(churn_range=(0.05, 50.0)),
        dict(churn_range=(10.0, 1e9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("churn", [0.5, 40.0])
@pytest.mark.parametrize("name", ["edm", "vp"])
def test_heun_with_churn_is_edm_s_algorithm_2(build_process, name, churn, settings):
    """By default from the first step on, which begins with more noise than the grid's first."""
    process = build_process(name)
    first, last = (process.sigma(t) / process.alpha(t) for t in (np.float64(1), process.smallest_t))
    ratios = np.linspace(first ** (1 / 7), last ** (1 / 7), STEPS) ** 7
    z = process.x_T_std * X_T / process.alpha(np.float64(1))
    options = dict(span=settings.get("churn_range", (0.0, np.inf)))
    options |= dict(noise_scale=settings.get("churn_noise", 1.0))
    expected = edm_heun(np.append(ratios, 0.0), z, churn, **options)
    x_0, _ = solve(process, sampler="heun", grid="karras", churn=churn, **settings)
    assert_equal(x_0, expected)
