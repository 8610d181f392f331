"""Samplers that add noise against the published algorithms, written here in f64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close

from configs import default
from dit_jax.diffusion import grids, samplers, solvers

STEPS = 8
NOISE = np.random.default_rng(0).standard_normal((STEPS, 4, 1, 1, 1))
X_T = np.array([-1.5, -0.2, 0.4, 2.0]).reshape(4, 1, 1, 1)


def predict_x_0(xp, x_t, alpha, sigma):
    """Predicts x_0 by an arbitrary smooth function; xp is numpy or jax.numpy."""
    return xp.tanh(2 * x_t / (alpha + sigma) + sigma / (alpha + sigma))


def solve(process, prediction="u", **settings):
    """Returns (x_0 in f64, number of network calls) of the sampler with these settings."""
    config = default.get_config().sample
    config.update(steps=STEPS, **settings)
    with jax.enable_x64(True):
        sampler = samplers.build(config, process, prediction)
        alphas, sigmas = (jnp.asarray(f(sampler.times)) for f in (process.alpha, process.sigma))

        def denoise(x_t, i):
            x_0 = predict_x_0(jnp, x_t, alphas[i], sigmas[i])
            return solvers.Denoised(x_0, (x_t - alphas[i] * x_0) / sigmas[i], None)

        parts, noise = [(denoise, len(sampler.grid) - 1)], jnp.asarray(NOISE)
        problem = solvers.Problem(process, sampler.grid, parts, lambda i: noise[i])
        x_0, finite = sampler.solve(problem, jnp.asarray(process.x_T_std * X_T))
        assert x_0.dtype == jnp.float64
        assert finite.all()
        return np.asarray(x_0), int(sampler.evaluations.sum())


def assert_equal(x_0, expected):
    assert_close(x_0, expected, 1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_ddim_with_noise_equals_the_paper_s_formulas(build_process, name, eta):
    """Song et al. 2021, eq. 12 and 16, for the variance-preserving x_t / hypot(alpha, sigma)."""
    process = build_process(name)
    x_0, _ = solve(process, sampler="ddim", eta=eta)
    x = X_T
    for i, (t, s) in enumerate(itertools.pairwise(grids.build(process, STEPS, prediction="u"))):
        scale_t, scale_s = (np.hypot(process.alpha(time), process.sigma(time)) for time in (t, s))
        bar_t, bar_s = (process.alpha(t) / scale_t) ** 2, (process.alpha(s) / scale_s) ** 2
        x_0_hat = predict_x_0(np, x, process.alpha(t), process.sigma(t))
        eps = (x / scale_t - np.sqrt(bar_t) * x_0_hat) / np.sqrt(1 - bar_t)
        std = eta * np.sqrt((1 - bar_s) / (1 - bar_t)) * np.sqrt(1 - bar_t / bar_s)
        x = np.sqrt(bar_s) * x_0_hat + np.sqrt(max(1 - bar_s - std**2, 0)) * eps + std * NOISE[i]
        x = x * scale_s
    assert_equal(x_0, x)


def solve_edm_heun(ratios, z, churn, churn_range=(0.0, np.inf), noise_scale=1.0):
    """Runs Karras et al. 2022, algorithm 2, on z = x_t / alpha; the ratios are sigma / alpha."""
    for i, (ratio, next_ratio) in enumerate(itertools.pairwise(ratios)):
        gamma = 0.0
        if churn_range[0] <= ratio <= churn_range[1]:
            gamma = min(churn / STEPS, np.sqrt(2) - 1)
        ratio_hat = ratio * (1 + gamma)
        z_hat = z + np.sqrt(ratio_hat**2 - ratio**2) * noise_scale * NOISE[i]
        rate = (z_hat - predict_x_0(np, z_hat, 1, ratio_hat)) / ratio_hat
        z = z_hat + (next_ratio - ratio_hat) * rate
        if next_ratio:
            next_rate = (z - predict_x_0(np, z, 1, next_ratio)) / next_ratio
            z = z_hat + (next_ratio - ratio_hat) * (rate + next_rate) / 2
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
def test_heun_with_churn_equals_edm_s_algorithm_2(build_process, name, churn, settings):
    """The default range includes the first step, which churn makes noisier than the grid."""
    process = build_process(name)
    first, last = (process.sigma(t) / process.alpha(t) for t in (np.float64(1), process.smallest_t))
    ratios = np.linspace(first ** (1 / 7), last ** (1 / 7), STEPS) ** 7
    z = process.x_T_std * X_T / process.alpha(np.float64(1))
    churn_range = settings.get("churn_range", (0.0, np.inf))
    noise_scale = settings.get("churn_noise", 1.0)
    expected = solve_edm_heun(np.append(ratios, 0.0), z, churn, churn_range, noise_scale)
    x_0, _ = solve(process, sampler="heun", grid="karras", churn=churn, **settings)
    assert_equal(x_0, expected)


def vp(t):
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 / 2 * t**2
    alpha = np.exp(-integral / 2)
    sigma = np.sqrt(1 - alpha**2)
    return alpha, sigma, -beta / 2 * alpha, beta / 2 * alpha**2 / sigma


PATHS = {  # t -> alpha, sigma and their derivatives
    "flow": lambda t: (1 - t, t, -1.0, 1.0),
    "gvp": lambda t: (
        np.cos(np.pi / 2 * t),
        np.sin(np.pi / 2 * t),
        -np.pi / 2 * np.sin(np.pi / 2 * t),
        np.pi / 2 * np.cos(np.pi / 2 * t),
    ),
    "vp": vp,
    "edm": lambda t: (1.0, 80 * t, 0.0, 80.0),
}


def solve_sit_sde(path, first_t, last_t, x, form, last_step):
    """Integrates dx = (u - w score / 2) dt + sqrt(w) dW from noise to data, as SiT does.

    The times are evenly spaced from first_t to last_t. Then `last_step` leads to t = 0.
    """

    def compute_rate(x, t, w_scale=1.0):
        alpha, sigma, d_alpha, d_sigma = path(t)
        x_0 = predict_x_0(np, x, alpha, sigma)
        eps = (x - alpha * x_0) / sigma
        w = 2 * sigma
        if form == "sbdm":
            w = 2 * sigma * (d_sigma - d_alpha / alpha * sigma)
        return d_alpha * x_0 + d_sigma * eps + w_scale * w / 2 * eps / sigma, w

    for i, (t, s) in enumerate(itertools.pairwise(np.linspace(first_t, last_t, STEPS))):
        rate, w = compute_rate(x, t)
        x = x - rate * (t - s) + np.sqrt(w * (t - s)) * NOISE[i]
    if last_step == "mean":
        return x - compute_rate(x, last_t)[0] * last_t
    if last_step == "euler":
        return x - compute_rate(x, last_t, w_scale=0.0)[0] * last_t
    if last_step == "tweedie":
        alpha, sigma, *_ = path(last_t)
        score = -(x - alpha * predict_x_0(np, x, alpha, sigma)) / sigma**2
        return (x + sigma**2 * score) / alpha
    return x


LAST_STEPS = ("mean", "euler", "tweedie", "none")


@pytest.mark.parametrize("form", ["sigma", "sbdm"])
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("name", ["flow", "gvp", "vp", "edm"])
def test_euler_maruyama_equals_sit_s_integrator(build_process, name, last_step, form):
    """SiT's times for the process; it has no edm, for which 0.002 / 80 is dit_jax's choice."""
    process = build_process(name)
    last_t = 0.002 / 80 if name == "edm" else 0.04
    if last_step == "none":
        last_t = {"flow": 0.0, "gvp": 0.0, "vp": 1e-3}.get(name, last_t)
    first_t = 1 - 1e-3 if form == "sbdm" and name in ("flow", "gvp") else 1.0
    x_T = process.x_T_std * X_T
    expected = solve_sit_sde(PATHS[name], first_t, last_t, x_T, form, last_step)
    settings = dict(sampler="euler_maruyama", sde_diffusion=form, last_step=last_step)
    x_0, evaluations = solve(process, **settings)
    assert_equal(x_0, expected)
    assert evaluations == STEPS - (last_step == "none")


@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize("name", ["flow", "gvp"])
def test_eps_and_score_are_integrated_over_sit_s_shorter_interval(build_process, name, prediction):
    expected = solve_sit_sde(PATHS[name], 1 - 1e-3, 1e-3, X_T, "sigma", "none")
    settings = dict(sampler="euler_maruyama", last_step="none")
    x_0, _ = solve(build_process(name), prediction, **settings)
    assert_equal(x_0, expected)


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_last_step_begins_at_last_step_t_and_is_omitted_at_0(build_process, name, last_step):
    process = build_process(name)
    settings = dict(sampler="euler_maruyama", last_step=last_step)
    for last_t in (0.3, 0.0):
        step = last_step if last_t else "none"
        expected = solve_sit_sde(PATHS[name], 1.0, last_t, process.x_T_std * X_T, "sigma", step)
        x_0, evaluations = solve(process, last_step_t=last_t, **settings)
        assert_equal(x_0, expected)
        assert evaluations == STEPS - (step == "none")
