"""The metrics equal closed forms and sums over all pairs, whatever the blocks of the features."""

import numpy as np
import pytest
from helpers.close import assert_close

from dit_jax.evaluation import metrics


def _rotation(dim, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def test_distance_of_known_gaussians():
    a = metrics.Gaussian(np.array([0.0, 1]), np.diag([4.0, 9.0]))
    b = metrics.Gaussian(np.array([3.0, 5]), np.diag([1.0, 16.0]))
    expected = 9 + 16 + (2 - 1) ** 2 + (3 - 4) ** 2
    assert_close(metrics.frechet_distance(a, b), expected, 1e-10)


@pytest.mark.parametrize("dim", [5, 64])
def test_distance_of_covariances_that_commute(dim):
    """In a common basis the distance is |mu_a - mu_b|^2 + sum (sqrt a - sqrt b)^2."""
    rng, basis = np.random.default_rng(dim), _rotation(dim, 0)
    values_a, values_b = rng.uniform(0.01, 9, (2, dim))
    mu_a, mu_b = rng.normal(size=(2, dim))
    a = metrics.Gaussian(mu_a, basis * values_a @ basis.T)
    b = metrics.Gaussian(mu_b, basis * values_b @ basis.T)
    expected = np.sum((mu_a - mu_b) ** 2) + np.sum((values_a**0.5 - values_b**0.5) ** 2)
    assert_close(metrics.frechet_distance(a, b), expected, 5e-11)


def test_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr P^(1/2) = sqrt(tr P + 2 sqrt(det P)), with P = S_a S_b."""
    s_a, s_b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    product = s_a @ s_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(s_a + s_b) - 2 * root
    a, b = metrics.Gaussian(np.zeros(2), s_a), metrics.Gaussian(np.zeros(2), s_b)
    assert_close(metrics.frechet_distance(a, b), expected, 1e-10)


def test_distance_to_the_image_of_a_linear_map():
    """T is the best coupling of x ~ N(0, S) and T x: the distance is tr (S + TST - 2 TS)."""
    basis_s, basis_t = _rotation(64, 1), _rotation(64, 2)
    s = basis_s * np.geomspace(1e-3, 10, 64) @ basis_s.T
    t = basis_t * np.linspace(0.5, 2, 64) @ basis_t.T
    assert np.abs(s @ t - t @ s).max() > 0.1
    image = metrics.Gaussian(np.zeros(64), t @ s @ t)
    expected = np.trace(s + t @ s @ t - 2 * t @ s)
    actual = metrics.frechet_distance(metrics.Gaussian(np.zeros(64), s), image)
    assert_close(actual, expected, 1e-10)


def test_distance_of_few_samples():
    """With S = X^T X the trace of the root is the nuclear norm of X_a X_b^T."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 64)), rng.normal(size=(40, 64)) * np.linspace(0.5, 2, 64)
    x_a, x_b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    expected = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.sum(x_a**2) + np.sum(x_b**2)
    expected -= 2 * np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    actual = metrics.frechet_distance(metrics.fit_gaussian(a), metrics.fit_gaussian(b))
    assert_close(actual, expected, 1e-6)


def test_distance_is_symmetric_and_zero_for_equal_gaussians():
    rng = np.random.default_rng(0)
    a = metrics.fit_gaussian(rng.normal(size=(50, 4)))
    b = metrics.fit_gaussian(rng.normal(size=(70, 4)) + 0.3)
    same = metrics.Gaussian(a.mean.copy(), a.covariance.copy())
    assert metrics.frechet_distance(a, same) == 0.0
    assert_close(metrics.frechet_distance(a, b), metrics.frechet_distance(b, a), 1e-10)
    assert metrics.frechet_distance(a, b) > 0.1


def test_too_few_samples_give_one_warning(caplog):
    rng = np.random.default_rng(0)
    few, enough = (metrics.fit_gaussian(rng.normal(size=(n, 4))) for n in (4, 5))
    published = metrics.Gaussian(enough.mean, enough.covariance)
    metrics.frechet_distance(enough, published)
    assert not caplog.records
    metrics.frechet_distance(few, few)
    assert [r.getMessage() for r in caplog.records] == [
        "Frechet distance: too few samples (4 and 4) for features of 4 values, so a covariance is "
        "rank-deficient. Compare the distance only with distances of as many samples."
    ]


def test_gaussians_that_do_not_fit_or_are_not_finite_are_refused():
    a = metrics.Gaussian(np.zeros(2), np.eye(2))
    for other in (
        metrics.Gaussian(np.zeros(3), np.eye(3)),
        metrics.Gaussian(np.zeros(2), np.ones(2)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            metrics.frechet_distance(a, other)
    for value in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="the second mean or covariance"):
            metrics.frechet_distance(a, metrics.Gaussian(np.zeros(2), np.full((2, 2), value)))
        with pytest.raises(FloatingPointError, match="the first mean or covariance"):
            metrics.frechet_distance(metrics.Gaussian(np.full(2, value), np.eye(2)), a)


def _assert_gaussian_of(features, gaussian):
    """Asserts that a Gaussian is that of the features, within 1e-12 of its scale."""
    features = features.astype(np.float64)
    assert gaussian.n == len(features)
    assert_close(gaussian.mean, features.mean(axis=0), 1e-12)
    expected = np.cov(features.T)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((gaussian.covariance - expected) / scale).max() < 1e-12
    assert gaussian.covariance.dtype == np.float64


def _gaussian_of_blocks(blocks):
    moments = metrics.Moments()
    for block in blocks:
        moments.add(block)
    return moments.gaussian()


def test_distances_are_not_below_zero():
    """Rounding below zero becomes 0. A matrix that is not a covariance raises an error."""
    x = np.random.default_rng(0).normal(size=(20, 300))
    few = metrics.fit_gaussian(x)
    for factor in (1 - 1e-15, 1 + 1e-15, 1 + 1e-12):
        scaled = metrics.Gaussian(few.mean, few.covariance * factor, few.n)
        assert 0 <= metrics.frechet_distance(few, scaled) < 1e-3
    negative = metrics.Gaussian(np.zeros(5), -2 * np.eye(5))
    with pytest.raises(FloatingPointError, match=r"distance is -9, but it cannot be below zero"):
        metrics.frechet_distance(metrics.Gaussian(np.ones(5) / 5**0.5, np.zeros((5, 5))), negative)


@pytest.mark.parametrize("dim", [1, 7, 200])
def test_covariances_are_accepted_with_their_rounding(dim):
    x = np.random.default_rng(0).normal(size=(40, dim)) * np.geomspace(1e-3, 1e3, dim)
    covariance = np.cov(x.T).reshape(dim, dim)
    single = np.cov(x.T.astype(np.float32), dtype=np.float32).reshape(dim, dim).astype(float)
    for matrix in (covariance, single, np.zeros((dim, dim)), np.diag(np.arange(dim) > 3) * 1.0):
        metrics.check_gaussian(np.zeros(dim), matrix, dim)
    # The eigenvalue -3e-5 is beyond the rounding of a variance, but not of the largest eigenvalue.
    metrics.check_gaussian(np.zeros(dim), np.ones((dim, dim)) - 3e-5 * np.eye(dim), dim)


def test_matrices_that_are_not_covariances_are_refused():
    covariance = np.cov(np.random.default_rng(0).normal(size=(6, 100)))
    with pytest.raises(ValueError, match="not symmetric: two values that must be equal differ by"):
        metrics.check_gaussian(np.zeros(6), np.tril(covariance), 6)
    with pytest.raises(ValueError, match=r"has eigenvalues from -1\.\d+ to -0\.\d+, but variances"):
        metrics.check_gaussian(np.zeros(6), -covariance, 6)
    correlated = np.array([[1.0, 1.5], [1.5, 1.0]])  # more than is possible
    with pytest.raises(ValueError, match=r"has eigenvalues from -0\.5 to 2\.5"):
        metrics.check_gaussian(np.zeros(2), correlated, 2)


@pytest.mark.parametrize("block_size", [1, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_do_not_depend_on_the_order_of_blocks(dtype, block_size, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_SIZE", block_size)  # merges every row, or all at once
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(1000, 5)) * 3 + 100).astype(dtype)
    parts = np.split(features, [1, 7, 300, 310, 900])
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 3, 1]):
        _assert_gaussian_of(features, _gaussian_of_blocks(parts[i] for i in order))


def test_gaussian_does_not_change_when_more_features_are_added():
    features, moments = np.random.default_rng(0).normal(size=(50, 3)), metrics.Moments()
    moments.add(features[:20])
    first = moments.gaussian()
    moments.add(features[20:])
    _assert_gaussian_of(features, moments.gaussian())
    _assert_gaussian_of(features[:20], first)


def test_moments_do_not_depend_on_the_size_of_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_SIZE", 64)
    features = np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32) + 10
    before = features.copy()
    for size in (1, 63, 64, 65, 500, 1000):
        blocks = (features[i : i + size] for i in range(0, 1000, size))
        _assert_gaussian_of(features, _gaussian_of_blocks(blocks))
    _assert_gaussian_of(features, metrics.fit_gaussian(features))
    np.testing.assert_array_equal(features, before)


def test_caller_may_overwrite_a_block_after_adding_it():
    features, block = np.random.default_rng(0).normal(size=(30, 3)), np.empty((10, 3))

    def blocks():
        for part in np.split(features, 3):
            block[:] = part
            yield block

    _assert_gaussian_of(features, _gaussian_of_blocks(blocks()))


def test_moments_of_too_few_features_are_refused():
    with pytest.raises(ValueError, match=r"must be \[N, D\], not \[3\]"):
        metrics.fit_gaussian(np.zeros(3))
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"{n} samples have no covariance. Take 2"):
            metrics.fit_gaussian(np.zeros((n, 3)))


def test_inception_score_is_1_for_equal_predictions_and_k_for_all_classes():
    constant = np.tile(np.float32([0.5, 0.25, 0.25, 0]), (40, 1))
    assert_close(metrics.inception_score(constant), (1, 0), 1e-12)
    one_hot = np.eye(8, dtype=np.float32)[np.arange(80) % 8]
    assert_close(metrics.inception_score(one_hot), (8, 0), 1e-13)


def test_inception_score_takes_splits_in_order():
    """The splits have 1, 1, 2 and 1 classes; the last is short. Mixed, they have up to 3."""
    one_hot = np.eye(3)[[0] * 4 + [1] * 4 + [2, 2, 0, 0] + [1] * 3]
    assert_close(metrics.inception_score(one_hot, 4), (1.25, np.sqrt(3) / 4), 1e-12)
    mixed = one_hot[np.argsort(np.arange(15) % 4, kind="stable")]
    assert metrics.inception_score(mixed, 4)[0] > 2
    shares = np.array([6, 7, 2]) / 15
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert_close(metrics.inception_score(one_hot, 15), (expected, 0), 1e-12)


def test_logits_and_other_wrong_probabilities_are_refused():
    logits = np.random.default_rng(0).normal(size=(10, 4))
    with pytest.raises(ValueError, match="Apply softmax"):
        metrics.inception_score(logits)
    for probabilities in ([[1.5, -0.5]], [[0.5, 0.5], [0.5, 0.7]]):
        with pytest.raises(ValueError, match="Apply softmax"):
            metrics.inception_score(np.array(probabilities))
    with pytest.raises(ValueError, match=r"must be \[N, K\], not \[0, 4\]"):
        metrics.inception_score(logits[:0])
    with pytest.raises(FloatingPointError, match="NaN"):
        metrics.inception_score(logits * np.nan)


def test_kernel_distance_is_unbiased():
    """A subset that is the whole set gives the sums over pairs of different points."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 0.5

    def mean_kernel(a, b, pairs):
        return np.mean([(a[i] @ b[j] / 4 + 1) ** 3 for i, j in pairs])

    all_pairs = [(i, j) for i in range(6) for j in range(6)]
    different = [(i, j) for i, j in all_pairs if i != j]
    expected = mean_kernel(x, x, different) + mean_kernel(y, y, different)
    expected -= 2 * mean_kernel(x, y, all_pairs)
    mean, deviation = metrics.kernel_distance(x, y, subsets=3, subset_size=6)
    assert_close((mean, deviation), (expected, 0), 1e-12)


def test_kernel_distance_draws_subsets_of_samples_and_reference_in_turn():
    rng, random = np.random.default_rng(0), np.random.RandomState(2020)
    x, y = rng.normal(size=(40, 4)), rng.normal(size=(30, 4)) + 0.5
    distances = []
    for _ in range(2):
        subsets = (z[random.choice(len(z), 10, replace=False)] for z in (x, y))
        distances.append(metrics.kernel_distance(*subsets, subsets=1, subset_size=10)[0])
    expected = np.mean(distances), abs(distances[0] - distances[1]) / 2
    assert_close(metrics.kernel_distance(x, y, subsets=2, subset_size=10), expected, 1e-10)


def test_kernel_distance_is_near_zero_for_equal_distributions_and_grows():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2000, 16)).astype(np.float32)
    mean, deviation = metrics.kernel_distance(x, y, subsets=20, subset_size=500)
    assert abs(mean) < deviation
    assert metrics.kernel_distance(x, y + 0.5, subsets=20, subset_size=500)[0] > 10 * deviation
    same = metrics.kernel_distance(x, y, subsets=20, subset_size=500)
    assert same == (mean, deviation)
    assert metrics.kernel_distance(x, y, 20, 500, seed=1) != same


def test_sets_smaller_than_a_subset_are_refused():
    x = np.zeros((10, 3))
    with pytest.raises(
        ValueError, match=r"10 samples and 9 reference .* do not fill subsets of 10"
    ):
        metrics.kernel_distance(x, x[:9], subset_size=10)
    with pytest.raises(FloatingPointError, match="not finite"):
        metrics.kernel_distance(x * np.nan, x, subset_size=10)
