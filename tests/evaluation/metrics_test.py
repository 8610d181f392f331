"""Closed forms, brute force, and statistics that do not depend on how the data came in."""

import numpy as np
import pytest
import tqdm
from helpers.close import assert_close

from dit_jax.evaluation import metrics, precision_recall


def _rotation(dim, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def test_distance_of_known_gaussians():
    a = metrics.Gaussian(np.array([0.0, 1]), np.diag([4.0, 9.0]))
    b = metrics.Gaussian(np.array([3.0, 5]), np.diag([1.0, 16.0]))
    expected = 9 + 16 + (2 - 1) ** 2 + (3 - 4) ** 2
    assert_close(metrics.frechet_distance(a, b), expected, 1e-10)


@pytest.mark.parametrize("dim", [5, 64])
def test_distance_of_covariances_that_commute_is_that_of_their_spectra(dim):
    """In a common basis it is |mu_a - mu_b|^2 + sum (sqrt a - sqrt b)^2."""
    rng, basis = np.random.default_rng(dim), _rotation(dim, 0)
    values_a, values_b = rng.uniform(0.01, 9, (2, dim))
    mu_a, mu_b = rng.normal(size=(2, dim))
    a = metrics.Gaussian(mu_a, basis * values_a @ basis.T)
    b = metrics.Gaussian(mu_b, basis * values_b @ basis.T)
    expected = np.sum((mu_a - mu_b) ** 2) + np.sum((values_a**0.5 - values_b**0.5) ** 2)
    assert_close(metrics.frechet_distance(a, b), expected, 5e-11)


def test_distance_of_covariances_that_do_not_commute():
    """tr (S_a S_b)^(1/2) in two dimensions is sqrt(tr + 2 sqrt(det)) of the product."""
    s_a, s_b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    product = s_a @ s_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(s_a + s_b) - 2 * root
    a, b = metrics.Gaussian(np.zeros(2), s_a), metrics.Gaussian(np.zeros(2), s_b)
    assert_close(metrics.frechet_distance(a, b), expected, 1e-10)


def test_distance_to_the_image_of_a_linear_map():
    """x ~ N(0, S) and T x with a positive T are coupled best by T: tr (S + TST - 2 TS)."""
    basis_s, basis_t = _rotation(64, 1), _rotation(64, 2)
    s = basis_s * np.geomspace(1e-3, 10, 64) @ basis_s.T
    t = basis_t * np.linspace(0.5, 2, 64) @ basis_t.T
    assert np.abs(s @ t - t @ s).max() > 0.1
    image = metrics.Gaussian(np.zeros(64), t @ s @ t)
    expected = np.trace(s + t @ s @ t - 2 * t @ s)
    actual = metrics.frechet_distance(metrics.Gaussian(np.zeros(64), s), image)
    assert_close(actual, expected, 1e-10)


def test_distance_of_few_samples_is_that_of_their_deviations():
    """S = X^T X / (n - 1), so the trace of the root is the nuclear norm of X_a X_b^T, scaled."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 64)), rng.normal(size=(40, 64)) * np.linspace(0.5, 2, 64)
    x_a, x_b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    expected = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.sum(x_a**2) + np.sum(x_b**2)
    expected -= 2 * np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    actual = metrics.frechet_distance(metrics.fit_gaussian(a), metrics.fit_gaussian(b))
    assert_close(actual, expected, 1e-6)


def test_distance_is_zero_for_equal_and_symmetric_for_others():
    rng = np.random.default_rng(0)
    a = metrics.fit_gaussian(rng.normal(size=(50, 4)))
    b = metrics.fit_gaussian(rng.normal(size=(70, 4)) + 0.3)
    same = metrics.Gaussian(a.mean.copy(), a.covariance.copy())
    assert metrics.frechet_distance(a, same) == 0.0
    assert_close(metrics.frechet_distance(a, b), metrics.frechet_distance(b, a), 1e-10)
    assert metrics.frechet_distance(a, b) > 0.1


def test_too_few_samples_are_told_once(caplog):
    rng = np.random.default_rng(0)
    few, enough = (metrics.fit_gaussian(rng.normal(size=(n, 4))) for n in (4, 5))
    published = metrics.Gaussian(enough.mean, enough.covariance)
    metrics.frechet_distance(enough, published)
    assert not caplog.records
    metrics.frechet_distance(few, few)
    assert [r.getMessage() for r in caplog.records] == [
        "Frechet distance: fewer samples than features (4 and 4 of 4 values), so a covariance is "
        "rank-deficient; compare it only with others of the same numbers."
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
    """Within 1e-12 of the mean's and covariance's scale."""
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
    """What rounding leaves is 0; what a matrix that is no covariance leaves is an error."""
    x = np.random.default_rng(0).normal(size=(20, 300))
    few = metrics.fit_gaussian(x)
    for factor in (1 - 1e-15, 1 + 1e-15, 1 + 1e-12):
        turned = metrics.Gaussian(few.mean, few.covariance * factor, few.n)
        assert 0 <= metrics.frechet_distance(few, turned) < 1e-3
    none = metrics.Gaussian(np.zeros(5), -2 * np.eye(5))
    with pytest.raises(FloatingPointError, match=r"distance is -9, below zero: a covariance is no"):
        metrics.frechet_distance(metrics.Gaussian(np.ones(5) / 5**0.5, np.zeros((5, 5))), none)


@pytest.mark.parametrize("dim", [1, 7, 200])
def test_covariances_are_accepted_with_their_rounding(dim):
    x = np.random.default_rng(0).normal(size=(40, dim)) * np.geomspace(1e-3, 1e3, dim)
    covariance = np.cov(x.T).reshape(dim, dim)
    single = np.cov(x.T.astype(np.float32), dtype=np.float32).reshape(dim, dim).astype(float)
    for matrix in (covariance, single, np.zeros((dim, dim)), np.diag(np.arange(dim) > 3) * 1.0):
        metrics.check_gaussian(np.zeros(dim), matrix, dim)
    # Below zero by more than a variance's rounding, by less than the largest eigenvalue's.
    metrics.check_gaussian(np.zeros(dim), np.ones((dim, dim)) - 3e-5 * np.eye(dim), dim)


def test_what_is_no_covariance_is_refused():
    covariance = np.cov(np.random.default_rng(0).normal(size=(6, 100)))
    with pytest.raises(ValueError, match="not symmetric: two values that must be equal differ by"):
        metrics.check_gaussian(np.zeros(6), np.tril(covariance), 6)
    with pytest.raises(ValueError, match=r"has eigenvalues from -1\.\d+ to -0\.\d+, but variances"):
        metrics.check_gaussian(np.zeros(6), -covariance, 6)
    correlated = np.array([[1.0, 1.5], [1.5, 1.0]])  # more than is possible
    with pytest.raises(ValueError, match=r"has eigenvalues from -0\.5 to 2\.5"):
        metrics.check_gaussian(np.zeros(2), correlated, 2)


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_are_those_of_the_whole_in_any_order(dtype, rows, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", rows)  # each row is merged, or all at once
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(1000, 5)) * 3 + 100).astype(dtype)
    parts = np.split(features, [1, 7, 300, 310, 900])
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 3, 1]):
        _assert_gaussian_of(features, _gaussian_of_blocks(parts[i] for i in order))


def test_moments_so_far_stay_as_they_are():
    features, moments = np.random.default_rng(0).normal(size=(50, 3)), metrics.Moments()
    moments.add(features[:20])
    first = moments.gaussian()
    moments.add(features[20:])
    _assert_gaussian_of(features, moments.gaussian())
    _assert_gaussian_of(features[:20], first)


def test_blocks_of_any_size_give_the_moments_of_the_whole(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 64)
    features = np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32) + 10
    before = features.copy()
    for size in (1, 63, 64, 65, 500, 1000):
        blocks = (features[i : i + size] for i in range(0, 1000, size))
        _assert_gaussian_of(features, _gaussian_of_blocks(blocks))
    _assert_gaussian_of(features, metrics.fit_gaussian(features))
    np.testing.assert_array_equal(features, before)


def test_a_block_may_be_overwritten_when_the_next_one_is_made():
    features, block = np.random.default_rng(0).normal(size=(30, 3)), np.empty((10, 3))

    def blocks():
        for part in np.split(features, 3):
            block[:] = part
            yield block

    _assert_gaussian_of(features, _gaussian_of_blocks(blocks()))


def test_moments_of_too_little_are_refused():
    with pytest.raises(ValueError, match=r"must be \[N, D\], not \[3\]"):
        metrics.fit_gaussian(np.zeros(3))
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"{n} samples have no covariance; take 2"):
            metrics.fit_gaussian(np.zeros((n, 3)))


def test_inception_score_is_1_for_one_prediction_and_k_for_all():
    constant = np.tile(np.float32([0.5, 0.25, 0.25, 0]), (40, 1))
    assert_close(metrics.inception_score(constant), (1, 0), 1e-12)
    one_hot = np.eye(8, dtype=np.float32)[np.arange(80) % 8]
    assert_close(metrics.inception_score(one_hot), (8, 0), 1e-13)


def test_inception_score_takes_splits_in_order():
    """Sorted by class, splits have 1, 1, 2 and, the short one, 1 class; mixed, 3 each."""
    one_hot = np.eye(3)[[0] * 4 + [1] * 4 + [2, 2, 0, 0] + [1] * 3]
    assert_close(metrics.inception_score(one_hot, 4), (1.25, np.sqrt(3) / 4), 1e-12)
    mixed = one_hot[np.argsort(np.arange(15) % 4, kind="stable")]
    assert metrics.inception_score(mixed, 4)[0] > 2
    shares = np.array([6, 7, 2]) / 15
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert_close(metrics.inception_score(one_hot, 15), (expected, 0), 1e-12)


def test_what_are_no_probabilities_is_refused():
    logits = np.random.default_rng(0).normal(size=(10, 4))
    with pytest.raises(ValueError, match="apply softmax"):
        metrics.inception_score(logits)
    for numbers in ([[1.5, -0.5]], [[0.5, 0.5], [0.5, 0.7]]):
        with pytest.raises(ValueError, match="apply softmax"):
            metrics.inception_score(np.array(numbers))
    with pytest.raises(ValueError, match=r"must be \[N, K\], not \[0, 4\]"):
        metrics.inception_score(logits[:0])
    with pytest.raises(FloatingPointError, match="NaN"):
        metrics.inception_score(logits * np.nan)


def _inside(x, y, neighbours):
    """By all distances in f64."""

    def distances(a, b):
        return np.stack([np.linalg.norm(b - point, axis=1) for point in a])

    radius_x, radius_y = (np.sort(distances(z, z), axis=1)[:, neighbours] for z in (x, y))
    cross = distances(x, y)
    return (cross <= radius_y).any(axis=1), (cross <= radius_x[:, None]).any(axis=0)


@pytest.mark.parametrize(
    ("n", "m", "dim", "neighbours", "block", "offset"),
    [
        (300, 230, 8, 3, 64, 0.0),
        (101, 407, 8, 1, 50, 0.0),
        (64, 129, 300, 5, 64, 0.0),
        (500, 400, 64, 3, 2048, 100.0),
        (5, 4, 3, 3, 2, 0.0),
    ],
)
def test_manifolds_are_those_of_all_distances(n, m, dim, neighbours, block, offset, monkeypatch):
    monkeypatch.setattr(precision_recall, "BLOCK", block)
    rng = np.random.default_rng(n)
    x = (rng.normal(size=(n, dim)) + offset).astype(np.float32)
    y = (rng.normal(size=(m, dim)) * np.linspace(0.8, 1.3, dim) + offset).astype(np.float32)
    expected = _inside(x.astype(np.float64), y.astype(np.float64), neighbours)
    actual = precision_recall.inside(x, y, neighbours)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])
    if min(n, m) > 50:
        assert all(0.02 < points.mean() < 0.98 for points in expected)
    shares = precision_recall.compute(x, y, neighbours)
    assert shares == (expected[0].mean(), expected[1].mean())


def test_precision_and_recall_of_points_on_a_line():
    """With one neighbour: the reference's balls are [0, 2] and [4.5, 7.5], the samples' [0, 6]."""
    reference = np.array([[0.5], [1.25], [5.5], [6.5]])
    samples = np.array([[1.0], [3.0], [4.0], [7.75], [9.0]])
    # radii: 0.75, 0.75, 1, 1 and 2, 1, 1, 1.25, 1.25
    precision, recall = precision_recall.compute(samples, reference, neighbours=1)
    assert (precision, recall) == (1 / 5, 3 / 4)
    # on the surface of a ball, 1 from 5.5, is inside
    assert precision_recall.compute(np.array([[4.5], [20]]), reference, 1)[0] == 1 / 2


@pytest.mark.parametrize("copies", [1, 2, 4, 7])
@pytest.mark.parametrize("block", [16, 2048])
def test_identical_sets_cover_each_other_with_duplicates_too(copies, block, monkeypatch):
    monkeypatch.setattr(precision_recall, "BLOCK", block)
    points = np.random.default_rng(0).normal(size=(50, 200)).astype(np.float32) + 3
    points = np.repeat(points, copies, axis=0)
    assert precision_recall.compute(points, points) == (1.0, 1.0)
    shuffled = points[np.random.default_rng(1).permutation(len(points))]
    assert precision_recall.compute(shuffled, points) == (1.0, 1.0)


def test_sets_of_one_point_cover_each_other():
    assert precision_recall.compute(np.ones((5, 3)), np.ones((6, 3))) == (1.0, 1.0)


def test_points_on_surfaces_are_inside_in_spite_of_rounding():
    """Pairs far apart make balls of one neighbour; each sample mirrors a pair's second point."""
    rng = np.random.default_rng(0)
    first, step = 1000 * rng.normal(size=(60, 50)).round(), rng.integers(-9, 10, (60, 50))
    reference, samples = np.concatenate([first, first + step]), first - step
    assert precision_recall.compute(samples, reference, neighbours=1)[0] == 1.0
    assert precision_recall.compute(first - 1.5 * step, reference, neighbours=1)[0] == 0.0


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("distance", [40.0, 1e4])
def test_sets_apart_cover_nothing_of_each_other(copies, distance):
    rng = np.random.default_rng(0)
    samples = np.repeat(rng.normal(size=(50, 20)), copies, axis=0)
    reference = np.repeat(rng.normal(size=(60, 20)), copies, axis=0) + distance
    assert precision_recall.compute(samples, reference) == (0.0, 0.0)


def test_points_that_make_no_manifold_are_refused():
    x = np.zeros((10, 3))
    with pytest.raises(ValueError, match=r"3 samples and 10 reference features .* take 4 of each"):
        precision_recall.compute(x[:3], x)
    with pytest.raises(ValueError, match="10 samples and 1 reference features"):
        precision_recall.compute(x, x[:1], neighbours=1)
    with pytest.raises(ValueError, match=r"not \(10, 3\) and \(10, 2\)"):
        precision_recall.compute(x, x[:, :2])
    for value in (np.nan, np.inf, 1e30):
        with pytest.raises(FloatingPointError, match=r"features 0\.\.9"):
            precision_recall.compute(x + value, x)


def test_kernel_distance_is_the_unbiased_one():
    """Of subsets that are whole sets, by its sums over pairs."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 0.5

    def mean_kernel(a, b, pairs):
        return np.mean([(a[i] @ b[j] / 4 + 1) ** 3 for i, j in pairs])

    others = [(i, j) for i in range(6) for j in range(6) if i != j]
    everyone = [(i, j) for i in range(6) for j in range(6)]
    expected = mean_kernel(x, x, others) + mean_kernel(y, y, others)
    expected -= 2 * mean_kernel(x, y, everyone)
    mean, deviation = metrics.kernel_distance(x, y, subsets=3, subset_size=6)
    assert_close((mean, deviation), (expected, 0), 1e-12)


def test_subsets_are_drawn_of_the_samples_and_of_the_reference_in_turn():
    rng, random = np.random.default_rng(0), np.random.RandomState(2020)
    x, y = rng.normal(size=(40, 4)), rng.normal(size=(30, 4)) + 0.5
    each = []
    for _ in range(2):
        subsets = (z[random.choice(len(z), 10, replace=False)] for z in (x, y))
        each.append(metrics.kernel_distance(*subsets, subsets=1, subset_size=10)[0])
    expected = np.mean(each), abs(each[0] - each[1]) / 2
    assert_close(metrics.kernel_distance(x, y, subsets=2, subset_size=10), expected, 1e-10)


def test_kernel_distance_is_near_zero_of_equal_distributions_and_grows():
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


def _half_distances(u, v):
    """The ADM evaluator's squared distances [U, V] in NumPy's own float16."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    norm_u, norm_v = ((a * a).sum(axis=1, dtype=np.float32).astype(np.float16) for a in (u, v))
    products = (u.astype(np.float64) @ v.T.astype(np.float64)).astype(np.float16)
    squared = (norm_u[:, None] - np.float16(2) * products) + norm_v[None]
    assert squared.dtype == np.float16
    return np.maximum(squared, np.float16(0))


def _half_radii(points, neighbours):  # the point itself is the nearest
    return np.partition(_half_distances(points, points), neighbours, axis=1)[:, neighbours]


@pytest.mark.parametrize("block", [64, 2048])
def test_half_precision_distances_are_those_of_the_adm_evaluator(monkeypatch, block):
    """Squared norms of 20 to 300, where float16 has steps of 1/64 to 1/4: the order counts."""
    monkeypatch.setattr(precision_recall, "BLOCK", block)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        samples, reference = (
            (1 + 0.1 * rng.normal(size=(n, 300))) * np.geomspace(0.3, 1, n)[:, None]
            for n in (310, 205)
        )
        # Of 64ths the products add up exactly in any order.
        samples, reference = (np.float32(np.round(64 * a) / 64) for a in (samples, reference))
        sample_radii, reference_radii = _half_radii(samples, 3), _half_radii(reference, 3)
        blocks = precision_recall._to_blocks(samples, 0 * samples[0], half=True)
        radii = precision_recall._squared_radii(blocks, 3, half=True, bar=tqdm.tqdm(disable=True))
        np.testing.assert_array_equal(np.concatenate(radii)[:310], sample_radii)
        between = _half_distances(reference, samples)
        expected = (
            (between <= reference_radii[:, None]).any(axis=0),
            (between <= sample_radii[None]).any(axis=1),
        )
        for actual, wanted in zip(
            precision_recall.inside(samples, reference, 3, half=True), expected, strict=True
        ):
            np.testing.assert_array_equal(actual, wanted)
        shares = tuple(float(points.mean()) for points in expected)
        assert precision_recall.compute(samples, reference, half=True) == shares
        assert precision_recall.compute(samples, reference) != shares


def test_norms_that_overflow_half_precision_are_measured_in_single():
    rng = np.random.default_rng(0)
    samples, reference = (rng.normal(size=(n, 8)).astype(np.float32) * 1e3 for n in (50, 40))
    half = precision_recall.compute(samples, reference, half=True)
    assert half == precision_recall.compute(samples, reference)
