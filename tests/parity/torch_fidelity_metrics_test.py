"""The metrics against torch-fidelity's functions on the same features."""

import fidelity
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.close import assert_close, assert_trees_close

from dit_jax.evaluation import metrics, precision_recall

metric_fid, metric_isc, metric_kid, metric_prc = (
    fidelity.import_module(f"metric_{name}") for name in ("fid", "isc", "kid", "prc")
)


def _features(n, dim, seed):
    """Draws features [n, dim] f32 like Inception's: correlated, not negative, of falling scales."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(16, dim)) / 4
    values = rng.normal(size=(n, 16)) @ mix + rng.normal(size=(n, dim)) + 0.1 * seed
    return (np.maximum(values, 0) * np.geomspace(2, 0.05, dim)).astype(np.float32)


@pytest.fixture(scope="module")
def samples():
    return _features(1500, 300, seed=1)


@pytest.fixture(scope="module")
def reference():
    return _features(1100, 300, seed=0)


def _gaussian(features):
    return metrics.fit_gaussian(features)


def _in_f64(features):
    return torch.from_numpy(features.astype(np.float64))


def test_frechet_distance_agrees_with_torch_fidelity(samples, reference):
    expected = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(_in_f64(x)) for x in (samples, reference)),
        verbose=False,
    )
    distance = metrics.frechet_distance(_gaussian(samples), _gaussian(reference))
    assert distance > 0.1
    assert_close(distance, expected["frechet_inception_distance"], 1e-6)


def _frechet_distance(x, y):
    """Computes the distance with the Schur method for the root of the unsymmetric product."""
    cov_x, cov_y = np.cov(x.T, dtype=np.float64), np.cov(y.T, dtype=np.float64)
    difference = x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return difference @ difference + np.trace(cov_x + cov_y - 2 * root)


@pytest.mark.parametrize(
    ("n", "dim"), [(900, 289), pytest.param(4000, 2023, marks=pytest.mark.slow)]
)
def test_frechet_distance_of_features_in_batches_agrees_with_the_schur_method(n, dim):
    x, y = _features(n, dim, seed=2), _features(n - 100, dim, seed=0)
    moments = metrics.Moments()
    for i in range(0, n, 50):
        moments.add(x[i : i + 50])
        if i == 300:
            moments.gaussian()  # merges the batches so far
    distance = metrics.frechet_distance(moments.gaussian(), _gaussian(y))
    assert_close(distance, _frechet_distance(x, y), 1e-6)


@pytest.mark.parametrize("spread", [1, 8])
def test_inception_score_agrees_with_torch_fidelity(spread):
    """torch-fidelity takes logits and the number of splits."""
    logits = spread * np.random.default_rng(0).normal(size=(1200, 1008)).astype(np.float32)
    scores = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = scores["inception_score_mean"], scores["inception_score_std"]
    assert_trees_close(metrics.inception_score(probabilities, split_size=300), expected, 1e-6)
    score_of_f32 = metrics.inception_score(probabilities.astype(np.float32), split_size=300)
    assert_trees_close(score_of_f32, expected, 1e-6)


def test_kernel_distance_agrees_with_torch_fidelity(samples, reference):
    """On the same random subsets; in f64, because torch-fidelity sums f32 features in f32."""
    reference_metrics = metric_kid.kid_features_to_metric(
        _in_f64(samples), _in_f64(reference), kid_subsets=7, kid_subset_size=500, verbose=False
    )
    expected = (
        reference_metrics["kernel_inception_distance_mean"],
        reference_metrics["kernel_inception_distance_std"],
    )
    distance = metrics.kernel_distance(samples, reference, subsets=7, subset_size=500)
    assert_trees_close(distance, expected, 1e-6)
    with_defaults = metric_kid.kid_features_to_metric(
        _in_f64(samples[:, :8]), _in_f64(reference[:, :8]), verbose=False
    )
    mean, std = metrics.kernel_distance(samples[:, :8], reference[:, :8])
    assert_close(mean, with_defaults["kernel_inception_distance_mean"], 1e-6)
    assert_close(std, with_defaults["kernel_inception_distance_std"], 1e-6)


@pytest.mark.parametrize("neighbours", [3, 5])
@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_and_recall_agree_with_torch_fidelity(
    neighbours, save_cpu_ram, samples, reference
):
    x, y = samples[:, :24] - 0.2, reference[:, :24]
    expected = metric_prc.prc_features_to_metric(
        _in_f64(x),
        _in_f64(y),
        prc_neighborhood=neighbours,
        prc_batch_size=400,
        save_cpu_ram=save_cpu_ram,
        verbose=False,
    )
    actual = precision_recall.compute(x, y, neighbours)
    assert all(0.1 < share < 0.95 for share in actual)
    assert_trees_close(actual, (expected["precision"], expected["recall"]), 1e-6)
