"""Closed forms, and statistics that do not depend on how the data came in."""

import numpy as np
import pytest

from dit_jax import fid


def _statistics(mean, covariance, n=1000):
    covariance = np.asarray(covariance, np.float64)
    return fid.Statistics(n, np.asarray(mean, np.float64), covariance * (n - 1))


def test_distance_of_known_gaussians():
    a = _statistics([0, 1], np.diag([4.0, 9.0]))
    b = _statistics([3, 5], np.diag([1.0, 16.0]))
    expected = 9 + 16 + (2 - 1) ** 2 + (3 - 4) ** 2
    assert fid.frechet_distance(a, b) == pytest.approx(expected, abs=1e-8)


def test_distance_of_covariances_that_do_not_commute():
    """tr (S_a S_b)^(1/2) in two dimensions is sqrt(tr + 2 sqrt(det)) of the product."""
    s_a, s_b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    product = s_a @ s_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(s_a + s_b) - 2 * root
    actual = fid.frechet_distance(_statistics([0, 0], s_a), _statistics([0, 0], s_b))
    assert actual == pytest.approx(expected, abs=1e-8)


def test_distance_is_zero_for_equal_and_symmetric_for_others():
    rng = np.random.default_rng(0)
    a = fid.Statistics.of(rng.normal(size=(50, 4)))
    b = fid.Statistics.of(rng.normal(size=(70, 4)) + 0.3)
    assert fid.frechet_distance(a, a) == 0.0
    assert fid.frechet_distance(a, b) == pytest.approx(fid.frechet_distance(b, a), abs=1e-10)
    assert fid.frechet_distance(a, b) > 0.1


def test_merged_statistics_are_those_of_the_whole():
    features = np.random.default_rng(0).normal(size=(100, 5)) * 3 + 100
    parts = np.split(features, [7, 30])
    merged = fid.Statistics.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(fid.Statistics.of(part))
    assert merged.n == 100
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features.T), rtol=1e-11)
