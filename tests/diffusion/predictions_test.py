"""Conversions between the predictions of a network, and their definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close

from dit_jax.diffusion import predictions, processes


@pytest.fixture(scope="module")
def x_0():
    return jax.random.normal(jax.random.key(0), (5, 2, 2, 3))


@pytest.fixture(scope="module")
def eps():
    return jax.random.normal(jax.random.key(1), (5, 2, 2, 3))


def _target(process, prediction, x_0, eps, t):
    a, b = predictions.coefficients(process, prediction, t)
    return processes.expand(a, x_0) * x_0 + processes.expand(b, x_0) * eps


def _convert(process, output, x_t, t, source, target):
    """Converts a network's output from the prediction `source` to the prediction `target`."""
    x_0, eps = predictions.solve(process, source, t).x_0_and_eps(x_t, output)
    return _target(process, target, x_0, eps, t)


@pytest.mark.parametrize("name", ["ddpm", "vp", "flow", "gvp", "edm"])
@pytest.mark.parametrize(
    ("source", "target"), itertools.permutations(predictions.PREDICTIONS, 2), ids="-".join
)
def test_converting_a_prediction_and_back_changes_nothing(
    build_process, name, source, target, x_0, eps
):
    process = build_process(name, sigma_data=0.7, sigma_max=8.0)
    t = jnp.array([0.05, 0.2, 0.5, 0.8, 0.95])
    x_t = processes.q_sample(process, x_0, t, eps)
    output = _target(process, source, x_0, eps, t)
    converted = _convert(process, output, x_t, t, source, target)
    assert_close(converted, _target(process, target, x_0, eps, t), 2e-4)
    restored = _convert(process, converted, x_t, t, target, source)
    assert_close(restored, output, 5e-4)


def test_targets_equal_their_definitions(build_process, x_0, eps):
    process, t = build_process("flow", sigma_data=0.5), jnp.full(5, 0.25)
    # alpha = 0.75, sigma = 0.25
    targets = {p: _target(process, p, x_0, eps, t) for p in predictions.PREDICTIONS}
    expected = {"eps": eps, "x_0": x_0, "v": 0.75 * eps - 0.25 * x_0, "u": eps - x_0}
    for name, value in (expected | {"score": -eps / 0.25}).items():
        assert_close(targets[name], value, 3e-7)


def test_edm_prediction_equals_the_published_preconditioning(build_process, x_0, eps):
    """D = c_skip x + c_out F; the target of F has unit variance for data with sigma_data."""
    process, t = build_process("edm", sigma_data=0.5), jnp.array([0.001, 0.01, 0.1, 0.5, 1.0])
    sigma = 80 * t[:, None, None, None]
    x_t = x_0 + sigma * eps
    output = jax.random.normal(jax.random.key(2), x_0.shape)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / jnp.sqrt(sigma**2 + 0.25)
    solution = predictions.solve(process, "edm", t)
    actual, _ = solution.x_0_and_eps(x_t, output)
    assert_close(actual, c_skip * x_t + c_out * output, 2e-5)
    for name in ("edm", "vp", "flow"):
        process = build_process(name, sigma_data=0.5)
        a, b = predictions.coefficients(process, "edm", np.linspace(0.01, 1, 9))
        assert_close((0.5 * a) ** 2 + b**2, np.ones(9), 1e-7)


@pytest.mark.parametrize("name", ["flow", "gvp", "edm"])
def test_u_determines_x_0_even_from_pure_noise(build_process, name):
    process = build_process(name)
    solution = predictions.solve(process, "u", np.ones(1))
    assert np.isfinite(solution).all()


def test_error_for_an_unknown_prediction_lists_the_known_ones(process):
    with pytest.raises(ValueError, match="prediction='noise'; choose one of eps, x_0, v, u, score"):
        predictions.coefficients(process, "noise", np.ones(1))
