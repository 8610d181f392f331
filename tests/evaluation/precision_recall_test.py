"""Precision and recall equal those by all distances, with exact results on surfaces."""

import numpy as np
import pytest

from dit_jax.evaluation import neighbours, precision_recall


def _find_inside(x, y, num_neighbours):
    """Returns what `precision_recall.find_inside` does, by all distances in f64."""

    def distances(a, b):
        return np.stack([np.linalg.norm(b - point, axis=1) for point in a])

    radius_x, radius_y = (np.sort(distances(z, z), axis=1)[:, num_neighbours] for z in (x, y))
    cross = distances(x, y)
    return (cross <= radius_y).any(axis=1), (cross <= radius_x[:, None]).any(axis=0)


@pytest.mark.parametrize(
    ("n", "m", "dim", "num_neighbours", "block_size", "offset"),
    [
        (300, 230, 8, 3, 64, 0.0),
        (101, 407, 8, 1, 50, 0.0),
        (64, 129, 300, 5, 64, 0.0),
        (500, 400, 64, 3, 2048, 100.0),
        (5, 4, 3, 3, 2, 0.0),
    ],
)
def test_manifolds_equal_those_by_all_distances(
    n, m, dim, num_neighbours, block_size, offset, monkeypatch
):
    monkeypatch.setattr(neighbours, "BLOCK_SIZE", block_size)
    rng = np.random.default_rng(n)
    x = (rng.normal(size=(n, dim)) + offset).astype(np.float32)
    y = (rng.normal(size=(m, dim)) * np.linspace(0.8, 1.3, dim) + offset).astype(np.float32)
    expected = _find_inside(x.astype(np.float64), y.astype(np.float64), num_neighbours)
    actual = precision_recall.find_inside(x, y, num_neighbours)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])
    if min(n, m) > 50:
        assert all(0.02 < points.mean() < 0.98 for points in expected)
    shares = precision_recall.compute(x, y, num_neighbours)
    assert shares == (expected[0].mean(), expected[1].mean())


def test_precision_and_recall_of_points_on_a_line():
    """The reference's balls cover -0.25..2 and 4.5..7.5, the samples' -1..5 and 6.5..10.25."""
    reference = np.array([[0.5], [1.25], [5.5], [6.5]])
    samples = np.array([[1.0], [3.0], [4.0], [7.75], [9.0]])
    # The radii are 0.75, 0.75, 1, 1 and 2, 1, 1, 1.25, 1.25.
    precision, recall = precision_recall.compute(samples, reference, num_neighbours=1)
    assert (precision, recall) == (1 / 5, 3 / 4)
    # A point on the surface of a ball, 1 from 5.5, is inside.
    assert precision_recall.compute(np.array([[4.5], [20]]), reference, 1)[0] == 1 / 2


@pytest.mark.parametrize("copies", [1, 2, 4, 7])
@pytest.mark.parametrize("block_size", [16, 2048])
def test_identical_sets_cover_each_other_even_with_duplicates(copies, block_size, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_SIZE", block_size)
    points = np.random.default_rng(0).normal(size=(50, 200)).astype(np.float32) + 3
    points = np.repeat(points, copies, axis=0)
    assert precision_recall.compute(points, points) == (1.0, 1.0)
    shuffled = points[np.random.default_rng(1).permutation(len(points))]
    assert precision_recall.compute(shuffled, points) == (1.0, 1.0)


def test_copies_of_one_point_cover_each_other():
    assert precision_recall.compute(np.ones((5, 3)), np.ones((6, 3))) == (1.0, 1.0)


def test_points_on_surfaces_are_inside_in_spite_of_rounding():
    """The reference is pairs far apart; each sample mirrors a pair's second point at its first."""
    rng = np.random.default_rng(0)
    first, step = 1000 * rng.normal(size=(60, 50)).round(), rng.integers(-9, 10, (60, 50))
    reference, samples = np.concatenate([first, first + step]), first - step
    assert precision_recall.compute(samples, reference, num_neighbours=1)[0] == 1.0
    assert precision_recall.compute(first - 1.5 * step, reference, num_neighbours=1)[0] == 0.0


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("distance", [40.0, 1e4])
def test_distant_sets_do_not_cover_each_other(copies, distance):
    rng = np.random.default_rng(0)
    samples = np.repeat(rng.normal(size=(50, 20)), copies, axis=0)
    reference = np.repeat(rng.normal(size=(60, 20)), copies, axis=0) + distance
    assert precision_recall.compute(samples, reference) == (0.0, 0.0)


def test_points_without_a_manifold_are_refused():
    x = np.zeros((10, 3))
    with pytest.raises(
        ValueError, match=r"3 samples and 10 reference features .* Take at least 4 of each"
    ):
        precision_recall.compute(x[:3], x)
    with pytest.raises(ValueError, match="10 samples and 1 reference features"):
        precision_recall.compute(x, x[:1], num_neighbours=1)
    with pytest.raises(ValueError, match=r"not \(10, 3\) and \(10, 2\)"):
        precision_recall.compute(x, x[:, :2])
    for value in (np.nan, np.inf, 1e30):
        with pytest.raises(FloatingPointError, match=r"features 0\.\.9"):
            precision_recall.compute(x + value, x)
