"""Samplers with noise beside the published programs' steps, written out in NumPy's f64."""

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
def test_ddim_with_noise_is_the_published_one(build_process, name, eta):
    """Song et al. 2021, eq. 12 and 16, for x_t / hypot(alpha, sigma), whose variance stays."""
    process = build_process(name)
    x_0, _ = solve(process, sampler="ddim", eta=eta)
    x = X_T
    for i, (t, s) in enumerate(itertools.pairwise(grids.build(process, STEPS, prediction="u"))):
        scale = [np.hypot(process.alpha(a), process.sigma(a)) for a in (t, s)]
        bar, bar_s = ((process.alpha(a) / b) ** 2 for a, b in zip((t, s), scale, strict=True))
        x_0_hat = x_0_of(np, x, process.alpha(t), process.sigma(t))
        eps = (x / scale[0] - np.sqrt(bar) * x_0_hat) / np.sqrt(1 - bar)
        std = eta * np.sqrt((1 - bar_s) / (1 - bar)) * np.sqrt(1 - bar / bar_s)
        x = np.sqrt(bar_s) * x_0_hat + np.sqrt(max(1 - bar_s - std**2, 0)) * eps + std * NOISE[i]
        x = x * scale[1]
    assert_equal(x_0, x)


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


# alpha, sigma and their derivatives at t.
PATHS = {
    "flow": lambda t: (1 - t, t, -1.0, 1.0),
    "gvp": lambda t: (
        np.cos(np.pi / 2 * t),
        np.sin(np.pi / 2 * t),
        -np.pi / 2 * np.sin(np.pi / 2 * t),
        np.pi / 2 * np.cos(np.pi / 2 * t),
    ),
    "edm": lambda t: (1.0, 80 * t, 0.0, 80.0),
}


def vp(t):
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 / 2 * t**2
    alpha = np.exp(-integral / 2)
    sigma = np.sqrt(1 - alpha**2)
    return alpha, sigma, -beta / 2 * alpha, beta / 2 * alpha**2 / sigma


PATHS["vp"] = vp


def sit_sde(path, first, last, x, form, last_step):
    """SiT's integrator of dx = (u - w score / 2) dt + sqrt(w) dW from noise to data.

    Its times are evenly spaced from first to last; then comes a step of its own, to 0.
    """

    def rates(x, t, w_scale=1.0):
        alpha, sigma, d_alpha, d_sigma = path(t)
        x_0 = x_0_of(np, x, alpha, sigma)
        eps = (x - alpha * x_0) / sigma
        w = 2 * sigma
        if form == "sbdm":
            w = 2 * sigma * (d_sigma - d_alpha / alpha * sigma)
        return d_alpha * x_0 + d_sigma * eps + w_scale * w / 2 * eps / sigma, w

    for i, (t, s) in enumerate(itertools.pairwise(np.linspace(first, last, STEPS))):
        rate, w = rates(x, t)
        x = x - rate * (t - s) + np.sqrt(w * (t - s)) * NOISE[i]
    if last_step == "mean":
        return x - rates(x, last)[0] * last
    if last_step == "euler":
        return x - rates(x, last, w_scale=0.0)[0] * last
    if last_step == "tweedie":
        alpha, sigma, *_ = path(last)
        score = -(x - alpha * x_0_of(np, x, alpha, sigma)) / sigma**2
        return (x + sigma**2 * score) / alpha
    return x


LAST_STEPS = ("mean", "euler", "tweedie", "none")


@pytest.mark.parametrize("form", ["sigma", "sbdm"])
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("name", ["flow", "gvp", "vp", "edm"])
def test_euler_maruyama_is_sit_s(build_process, name, last_step, form):
    """To 0.04 and then one step of its kind; with none to the end. SiT has no edm."""
    process = build_process(name)
    last = {"flow": 0.0, "gvp": 0.0, "vp": 1e-3} if last_step == "none" else {}
    last = last.get(name, 0.002 / 80 if name == "edm" else 0.04)
    first = 1 - 1e-3 if form == "sbdm" and name in ("flow", "gvp") else 1.0
    x_T = process.x_T_std * X_T
    expected = sit_sde(PATHS[name], first, last, x_T, form, last_step)
    settings = dict(sampler="euler_maruyama", sde_diffusion=form, last_step=last_step)
    x_0, evaluations = solve(process, **settings)
    assert_equal(x_0, expected)
    assert evaluations == STEPS - (last_step == "none")


@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize("name", ["flow", "gvp"])
def test_a_predicted_eps_or_score_is_integrated_to_where_sit_does(build_process, name, prediction):
    expected = sit_sde(PATHS[name], 1 - 1e-3, 1e-3, X_T, "sigma", "none")
    settings = dict(sampler="euler_maruyama", last_step="none")
    x_0, _ = solve(build_process(name), prediction, **settings)
    assert_equal(x_0, expected)


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_last_step_begins_when_it_is_told_and_at_0_there_is_none(build_process, name, last_step):
    process = build_process(name)
    settings = dict(sampler="euler_maruyama", last_step=last_step)
    for last in (0.3, 0.0):
        step = last_step if last else "none"
        expected = sit_sde(PATHS[name], 1.0, last, process.x_T_std * X_T, "sigma", step)
        x_0, evaluations = solve(process, last_step_t=last, **settings)
        assert_equal(x_0, expected)
        assert evaluations == STEPS - (step == "none")
