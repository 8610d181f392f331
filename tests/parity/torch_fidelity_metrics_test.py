"""Our measures beside torch-fidelity's functions on the same features."""

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
    """[n, dim] f32: correlated, not negative, of decaying scales, as Inception's are."""
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


def test_frechet_distances_agree(samples, reference):
    reference_output = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(_in_f64(x)) for x in (samples, reference)),
        verbose=False,
    )
    output = metrics.frechet_distance(_gaussian(samples), _gaussian(reference))
    assert output > 0.1
    assert_close(output, reference_output["frechet_inception_distance"], 1e-6)


def _frechet_distance(x, y):
    """By Schur's root of the product, which is not symmetric, of NumPy's moments."""
    s_x, s_y = np.cov(x.T, dtype=np.float64), np.cov(y.T, dtype=np.float64)
    difference = x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)
    root = scipy.linalg.sqrtm(s_x @ s_y).real
    return difference @ difference + np.trace(s_x + s_y - 2 * root)


@pytest.mark.parametrize(
    ("n", "dim"), [(900, 289), pytest.param(4000, 2023, marks=pytest.mark.slow)]
)
def test_frechet_distance_of_spatial_features_in_blocks_agrees_with_schur_s_root(n, dim):
    x, y = _features(n, dim, seed=2), _features(n - 100, dim, seed=0)
    moments = metrics.Moments()
    for i in range(0, n, 50):
        moments.add(x[i : i + 50])
        if i == 300:
            moments.gaussian()  # merges the blocks so far
    output = metrics.frechet_distance(moments.gaussian(), _gaussian(y))
    assert_close(output, _frechet_distance(x, y), 1e-6)


@pytest.mark.parametrize("spread", [1, 8])
def test_inception_scores_agree(spread):
    """Theirs takes logits and a number of splits."""
    logits = spread * np.random.default_rng(0).normal(size=(1200, 1008)).astype(np.float32)
    reference_output = metric_isc.isc_features_to_metric(
        torch.from_numpy(logits), splits=4, shuffle=False
    )
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = reference_output["inception_score_mean"], reference_output["inception_score_std"]
    assert_trees_close(metrics.inception_score(probabilities, split_size=300), expected, 1e-6)
    f32 = metrics.inception_score(probabilities.astype(np.float32), split_size=300)
    assert_trees_close(f32, expected, 1e-6)


def test_kernel_distances_agree(samples, reference):
    """Of the same random subsets; in f64, for theirs takes f32 sums of f32 features."""
    reference_output = metric_kid.kid_features_to_metric(
        _in_f64(samples), _in_f64(reference), kid_subsets=7, kid_subset_size=500, verbose=False
    )
    expected = (
        reference_output["kernel_inception_distance_mean"],
        reference_output["kernel_inception_distance_std"],
    )
    output = metrics.kernel_distance(samples, reference, subsets=7, subset_size=500)
    assert_trees_close(output, expected, 1e-6)
    defaults = metric_kid.kid_features_to_metric(
        _in_f64(samples[:, :8]), _in_f64(reference[:, :8]), verbose=False
    )
    output = metrics.kernel_distance(samples[:, :8], reference[:, :8])
    assert_close(output[0], defaults["kernel_inception_distance_mean"], 1e-6)
    assert_close(output[1], defaults["kernel_inception_distance_std"], 1e-6)


@pytest.mark.parametrize("neighbours", [3, 5])
@pytest.mark.parametrize("full", [False, True])
def test_precision_and_recall_agree(neighbours, full, samples, reference):
    x, y = samples[:, :24] - 0.2, reference[:, :24]
    reference_output = metric_prc.prc_features_to_metric(
        _in_f64(x),
        _in_f64(y),
        prc_neighborhood=neighbours,
        prc_batch_size=400,
        save_cpu_ram=not full,
        verbose=False,
    )
    output = precision_recall.compute(x, y, neighbours)
    assert all(0.1 < share < 0.95 for share in output)
    assert_trees_close(output, (reference_output["precision"], reference_output["recall"]), 1e-6)
