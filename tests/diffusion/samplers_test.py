"""Samplers against recorded samples, and on data whose exact denoiser is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers.close import assert_close, assert_trees_close
from helpers.mixture import NORMAL, TWO_MODES, Channels, Mixture

from configs import default
from dit_jax import diffusion
from dit_jax.diffusion import grids, guidance, predictions, samplers, solvers


def _settings(**changes):
    config = default.get_config().sample
    config.update(changes)
    return config


def _solve(process, data, x_T, prediction="u", seed=1, **settings):
    """Returns x_0 of the sampler with these settings, with the data's exact denoiser."""
    sampler = samplers.build(_settings(**settings), process, prediction)
    denoise = data.denoise(process, sampler.times)

    steps = len(sampler.grid) - 1

    @jax.jit
    def run(x_T, noise):
        parts = [(denoise, steps)]
        problem = solvers.Problem(process, sampler.grid, parts, lambda i: noise[i])
        return sampler.solve(problem, x_T)

    # Only the tests of stochastic samplers have more than 100 examples; others use no noise.
    noise_shape = (steps, *x_T.shape) if len(x_T) > 100 else (steps, 1, 1, 1, 1)
    x_0, finite = run(x_T, np.random.default_rng(seed).standard_normal(noise_shape, x_T.dtype))
    no_last_step = settings.get("last_step") == "none" or settings.get("last_step_t") == 0
    assert finite.shape == (settings["steps"] - no_last_step,)
    assert np.all(finite)
    return x_0


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_equal_the_published_code(golden, process, golden_predict, name):
    sampler = samplers.build(_settings(sampler=name, steps=10), process, "eps")
    y = jnp.asarray(golden["y"])
    guided = guidance.classifier_free_guidance(golden_predict, y, jnp.full_like(y, 7), 1.5, 3)
    denoise = solvers.make_denoise(process, "eps", guided, sampler.times)
    noise = jnp.asarray(golden["sample_noise"])
    problem = solvers.Problem(process, sampler.grid, [(denoise, 10)], lambda i: noise[i])
    x_0, finite = sampler.solve(problem, jnp.asarray(golden["x_0"]))
    expected = golden[f"{name}_cfg1.5_sample"]
    assert_close(x_0, expected, 2e-5)
    assert finite.tolist() == [True] * 10


def test_clipping_x_0_adapts_eps_to_the_same_x_t(process):
    times = samplers.build(_settings(sampler="ddim", steps=10), process, "eps").times
    exact = NORMAL.denoise(process, times)
    x_t = jnp.linspace(-2, 4, 100).reshape(1, 100, 1, 1)
    for i in (5, 9):  # not 0, where x_t is pure noise and x_0 is the mean

        def predict(x, network_time, i=i):
            return exact(x, i).eps

        before, after = (
            solvers.make_denoise(process, "eps", predict, times, clip_x_0)(x_t, i)
            for clip_x_0 in (False, True)
        )
        inside = np.abs(before.x_0) < 1
        assert 0 < inside.sum() < 100
        np.testing.assert_array_equal(after.x_0, np.clip(before.x_0, -1, 1))
        alpha, sigma = process.alpha(times)[i], process.sigma(times)[i]
        assert_close(alpha * after.x_0 + sigma * after.eps, x_t, 2e-6)
        # eps = (x_t - alpha x_0) / sigma, so sigma divides the rounding of x_t.
        rounding = 3e-6 * np.abs(x_t).max() / sigma
        assert np.abs(after.eps - before.eps)[inside].max() < rounding


def _error(process, data, steps, **settings):
    """Returns the largest difference between the quantiles of x_T and of x_0, in f64.

    In one variable the probability flow keeps the order of points, and so their quantiles.
    """
    with jax.enable_x64(True):
        x_T = np.linspace(-1.5, 1.5, 7).reshape(-1, 1, 1, 1) * process.x_T_std
        grid = samplers.build(_settings(steps=steps, **settings), process, "u").grid
        x_0 = _solve(process, data, jnp.asarray(x_T), steps=steps, **settings)
        assert x_0.dtype == jnp.float64
        first = process.alpha(grid[:1]), process.sigma(grid[:1])
        return np.abs(data.cdf(x_0) - data.cdf(x_T, *first)).max()


ORDERS = {"ddim": 1, "dpmpp1": 1, "euler": 1, "heun": 2, "ab2": 2, "dpmpp2m": 2, "ab4": 4}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("process", ["vp", "flow", "gvp", "edm"])
def test_doubling_the_steps_divides_the_error_by_2_to_the_order(build_process, process, name):
    process = build_process(process, sigma_min=1e-4, sigma_max=20.0)
    # For flow and gvp, sigma is smooth in t at t = 0, so a uniform grid suffices.
    smooth = process.x_T_std == 1 and process.alpha(np.ones(1)) == 0
    # DPM-Solver's variable is log(alpha / sigma), infinite at both ends of a flow.
    grid = "uniform" if smooth and name != "dpmpp2m" else "karras"
    error = functools.partial(_error, process, NORMAL, sampler=name, grid=grid)
    steps = 64 if smooth or process.x_T_std > 1 else 32  # vp's error changes sign at 200 steps
    order = np.log2(error(steps) / error(2 * steps))
    assert ORDERS[name] - (1 if name == "ab4" else 0.25) < order
    assert name == "ab4" or order < ORDERS[name] + 0.25


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("process", ["ddpm", "ddpm without signal", "vp", "flow", "gvp", "edm"])
def test_probability_flow_reaches_a_mixture_of_two_modes(build_process, process, name):
    process, *without_signal = process.split(" ", 1)
    process = build_process(process, zero_terminal_snr=bool(without_signal))
    settings = dict(grid="karras") if process.x_T_std > 1 else {}
    limit = 0.02 if ORDERS[name] == 1 else 0.004
    assert _error(process, TWO_MODES, 200, sampler=name, **settings) < limit


STOCHASTIC = {
    "ddpm": dict(sampler="ddpm"),
    "ddim": dict(sampler="ddim", eta=0.7),
    "dpmpp2m_sde": dict(sampler="dpmpp2m_sde"),
    "heun": dict(sampler="heun", churn=40.0),
    "sigma": dict(sampler="euler_maruyama"),
    "sbdm": dict(sampler="euler_maruyama", sde_diffusion="sbdm", last_step_t=0.001),
    "tweedie": dict(sampler="euler_maruyama", last_step="tweedie", last_step_t=0.001),
    "last euler": dict(sampler="euler_maruyama", last_step="euler", last_step_t=0.001),
    "no last step": dict(sampler="euler_maruyama", last_step="none"),
}
CONTINUOUS_ONLY = ("heun", "sigma", "sbdm", "tweedie", "last euler", "no last step")


@pytest.mark.parametrize(
    ("process", "name"),
    [
        pytest.param(process, name, marks=[pytest.mark.slow] * (process in ("vp", "gvp", "edm")))
        for process in ("ddpm", "vp", "flow", "gvp", "edm")
        for name in STOCHASTIC
        if not (process == "ddpm" and name in CONTINUOUS_ONLY)
        and not (process in ("flow", "gvp") and name == "heun")
    ],
)
def test_stochastic_samplers_reach_the_distribution(build_process, process, name):
    process = build_process(process)
    x_T = process.x_T_std * jax.random.normal(jax.random.key(0), (5_000, 1, 1, 2))
    settings = dict(grid="karras") if process.x_T_std > 1 else {}
    x_0 = _solve(
        process, Channels((NORMAL, TWO_MODES)), x_T, steps=250, **settings, **STOCHASTIC[name]
    )
    for data, x in ((NORMAL, np.asarray(x_0[..., 0])), (TWO_MODES, np.asarray(x_0[..., 1]))):
        mean = np.dot(data.weights, data.means)
        second_moment = np.dot(data.weights, np.square(data.means) + np.square(data.stds))
        assert x.mean() == pytest.approx(mean, abs=0.03)
        assert x.std() == pytest.approx(np.sqrt(second_moment - mean**2), rel=0.05)
        assert scipy.stats.kstest(x.ravel(), data.cdf).statistic < 0.03


def test_euler_maruyama_without_last_step_ends_at_last_step_t(build_process):
    process = build_process("flow")
    x_T = jax.random.normal(jax.random.key(0), (10_000, 1, 1, 1))
    settings = dict(sampler="euler_maruyama", last_step="none", last_step_t=0.2)
    x = np.ravel(_solve(process, NORMAL, x_T, steps=100, **settings))
    assert x.mean() == pytest.approx(0.8 * 0.7, abs=0.015)
    assert x.std() == pytest.approx(np.hypot(0.8 * 0.5, 0.2), rel=0.05)


def test_churn_adds_noise_with_the_requested_deviation(build_process):
    """With x_0 = 0 known, every step scales x by the ratio of the sigmas."""
    process, zero = build_process("edm"), jnp.zeros((1, 1, 1, 1))
    grid = np.array([0.5, 0.25, 0.0])
    # The range includes only the second step, which churn raises from sigma 20 to 25.
    noisier_t = solvers.add_churn(process, grid, 0.5, (0.0, 30.0))
    assert_close(process.sigma(noisier_t), [40, 25], 1e-9)
    times = np.append(grid, noisier_t)

    def denoise(x_t, i):
        return solvers.Denoised(zero, x_t / jnp.asarray(process.sigma(times))[i], None)

    received = []

    def record(x_t, i):
        received.append(float(np.squeeze(x_t)))
        return denoise(x_t, i)

    problem = solvers.Problem(process, grid, [(record, 2)], lambda i: zero + 1)
    with jax.disable_jit():
        solvers.heun(problem, zero + 40.0, noisier_t, noise_scale=1.1)
    assert_close(received, [40, 20, 20 + 1.1 * 15], 4e-6)  # 15 = sqrt(25^2 - 20^2)


@pytest.mark.parametrize("process", ["ddpm", "vp", "flow", "gvp", "edm"])
def test_ddim_equals_dpm_solver_of_order_1(build_process, process):
    process = build_process(process)
    x_T = process.x_T_std * jax.random.normal(jax.random.key(0), (8, 1, 1, 1))
    ddim, dpmpp = (
        _solve(process, TWO_MODES, x_T, steps=7, sampler=name) for name in ("ddim", "dpmpp1")
    )
    assert_close(ddim, dpmpp, 1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp2m", "dpmpp2m_sde", "heun", "ab4"])
@pytest.mark.parametrize("process", ["ddpm", "ddpm without signal", "flow"])
def test_point_mass_is_reached_exactly_in_any_number_of_steps(build_process, process, name):
    """The denoiser of a point mass returns the final x_0 from the first step on.

    For a chain without signal at its end, heun and ab4 follow tangents of an arc, inexactly.
    """
    process, *without_signal = process.split(" ", 1)
    process = build_process(process, zero_terminal_snr=bool(without_signal))
    x_T = jax.random.normal(jax.random.key(0), (8, 1, 1, 1))
    for steps in (2, 7):
        x_0 = _solve(process, Mixture((1.0,), (0.7,), (0.0,)), x_T, steps=steps, sampler=name)
        on_arc = without_signal and name in ("heun", "ab4")
        assert np.abs(x_0 - 0.7).max() < (0.01 if on_arc else 2e-4)


@pytest.mark.parametrize(
    ("sampler", "prediction"), [("ddim", "v"), ("heun", "x_0"), ("ab2", "score"), ("dpmpp2m", "u")]
)
@pytest.mark.parametrize("process", ["ddpm", "flow", "edm"])
def test_samples_do_not_depend_on_the_prediction(build_process, process, sampler, prediction):
    process = build_process(process)
    settings = _settings(sampler=sampler, steps=8, grid="karras")
    x_T = process.x_T_std * jax.random.normal(jax.random.key(0), (8, 1, 1, 1))
    built = samplers.build(settings, process, "eps")

    def run(prediction):
        def predict(x, network_time):
            """Returns the exact prediction for the scaled x of one network time."""
            t = times[np.argmin(np.abs(network_times - network_time[0]))]
            alpha, sigma = process.alpha(t), process.sigma(t)
            x_t = x / process.network_scale(t)
            variance = alpha**2 * 0.25 + sigma**2
            x_0 = (alpha * 0.25 * x_t + sigma**2 * 0.7) / variance
            a, b = predictions.coefficients(process, prediction, t)
            return a * x_0 + b * sigma * (x_t - alpha * 0.7) / variance

        times = built.grid[:-1]
        network_times = process.network_time(times)
        denoise = solvers.make_denoise(process, prediction, predict, built.times)
        problem = solvers.Problem(process, built.grid, [(denoise, 8)], noise=None)
        with jax.disable_jit():
            return built.solve(problem, x_T)[0]

    assert_close(run(prediction), run("eps"), 1e-4)


def test_learned_variance_1_equals_large_and_minus_1_equals_small(process):
    x_T = jnp.zeros((1, 1, 1, 1))
    sampler = samplers.build(_settings(steps=10), process, "eps")

    def run(learned, variance="large"):
        def denoise(x_t, i):
            x_0, eps, _ = NORMAL.denoise(process, sampler.times)(x_t, i)
            return solvers.Denoised(x_0, eps, learned and jnp.full_like(eps, learned))

        problem = solvers.Problem(process, sampler.grid, [(denoise, 10)], lambda i: 1 + 0 * x_T)
        return float(np.squeeze(solvers.ddpm(problem, x_T, variance)[0]))

    assert_close(run(None), run(1.0, "small"), 1e-6)
    assert_close(run(None, "small"), run(-1.0), 1e-6)
    assert abs(run(-1.0) - run(1.0)) > 0.01


@pytest.mark.parametrize("name", ["ddpm", "dpmpp2m_sde", "euler_maruyama"])
def test_last_step_adds_no_noise(build_process, name):
    """The noise is huge at the last step alone, so a moderate result proves it unused."""
    process, x_T = build_process("vp"), jnp.zeros((1, 1, 1, 1))
    sampler = samplers.build(_settings(sampler=name, steps=5), process, "eps")
    problem = solvers.Problem(
        process,
        sampler.grid,
        [(NORMAL.denoise(process, sampler.times), 5)],
        lambda i: jnp.where(i == 4, 1e30, 1.0) * jnp.ones_like(x_T),
    )
    assert abs(float(np.squeeze(sampler.solve(problem, x_T)[0]))) < 10


def test_ddim_level1_ends_at_the_first_level(process):
    """The denoiser returns 0.3 x_t and 0.5 x_t, so every step multiplies x_t by a factor."""
    settings = _settings(sampler="ddim_level1", steps=5, grid="leading")
    sampler = samplers.build(settings, process, "eps")
    index = [601, 401, 201, 1, 0]  # where each step ends, as DDPM's index
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]
    expected = np.prod(0.3 * np.sqrt(alpha_bar) + 0.5 * np.sqrt(1 - alpha_bar))

    def denoise(x_t, i):
        return solvers.Denoised(0.3 * x_t, 0.5 * x_t, None)

    problem = solvers.Problem(process, sampler.grid, [(denoise, 5)], noise=None)
    x, _ = sampler.solve(problem, jnp.ones((1, 1, 1, 1)))
    assert float(x.squeeze()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("process", "name"), [("ddpm", "ddim"), ("ddpm", "ddim_level1"), ("flow", "ddim")]
)
def test_sampling_from_an_inverted_x_0_returns_to_x_0_with_enough_steps(
    build_process, process, name
):
    process = build_process(process)
    x_0 = jnp.linspace(-1.0, 1.5, 6).reshape(-1, 1, 1, 1)

    def distance(steps):
        grid = "leading" if name == "ddim_level1" else "uniform"
        sampler = samplers.build(_settings(sampler=name, steps=steps, grid=grid), process, "eps")
        parts = [(NORMAL.denoise(process, sampler.times), steps)]
        problem = solvers.Problem(process, sampler.grid, parts, noise=None)
        x_T, finite = solvers.invert_ddim(problem, x_0)
        assert finite.shape == (steps,)
        return float(jnp.abs(sampler.solve(problem, x_T)[0] - x_0).max())

    errors = distance(50), distance(200)
    assert errors[1] < 0.1
    assert errors[1] < 0.4 * errors[0]


def test_each_part_denoises_its_own_steps(process):
    """Also with heun, which treats the last step differently."""
    for name in ("ddim", "heun"):
        sampler = samplers.build(_settings(sampler=name, steps=6), process, "eps")
        requested = []

        def make_recorder(part, requested=requested):
            def denoise(x_t, i):
                requested.append((part, int(i)))
                return solvers.Denoised(x_t, x_t, None)

            return denoise

        parts = [(make_recorder("a"), 2), (make_recorder("b"), 3), (make_recorder("c"), 1)]
        problem = solvers.Problem(process, sampler.grid, parts, noise=None)
        with jax.disable_jit():
            sampler.solve(problem, jnp.zeros((1, 1, 1, 1)))
        expected_parts = {"ddim": "aabbbc", "heun": "aaaabbbbbbc"}[name]
        times = {"ddim": [0, 1, 2, 3, 4, 5], "heun": [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]}[name]
        assert requested == list(zip(expected_parts, times, strict=True))
        assert sampler.evaluations.sum() == len(requested)


def test_finite_is_false_from_the_first_step_with_a_nan_on(process):
    sampler = samplers.build(_settings(sampler="ddim", steps=6), process, "eps")

    def denoise(x_t, i):
        is_first_example = jnp.arange(2).reshape(x_t.shape) == 0  # the second stays finite
        value = jnp.where((i == 3) & is_first_example, jnp.nan, x_t)
        return solvers.Denoised(value, value, None)

    problem = solvers.Problem(process, sampler.grid, [(denoise, 6)], noise=None)
    _, finite = sampler.solve(problem, jnp.zeros((2, 1, 1, 1)))
    assert finite.tolist() == [True] * 3 + [False] * 3


def test_churn_raises_sigma_within_its_range_alone(build_process):
    process = build_process("edm")
    grid = grids.build(process, 10, "karras")
    sigma = process.sigma(grid[:-1])
    noisier_t = process.sigma(solvers.add_churn(process, grid, 40.0, (0.05, 50.0)))
    inside = (sigma >= 0.05) & (sigma <= 50)
    assert 0 < inside.sum() < 9
    expected = np.where(inside, 2**0.5, 1) * sigma
    assert_trees_close(noisier_t.tolist(), expected.tolist(), 1e-9)
    weak_churn = process.sigma(solvers.add_churn(process, grid, 1.0, (0.0, 1e9)))
    assert_trees_close(weak_churn.tolist(), (1.1 * sigma).tolist(), 1e-9)


def test_sampling_refuses_eps_for_a_chain_with_zero_terminal_snr(build_process):
    process = build_process("ddpm", zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"a predicted eps does not determine x_0.*prediction=v"):
        samplers.build(_settings(), process, "eps")
    assert samplers.build(_settings(), process, "v").grid[0] == 1
    assert isinstance(process, diffusion.DiscreteProcess)
