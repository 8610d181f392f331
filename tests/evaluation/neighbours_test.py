"""Distances in half precision equal those of the ADM evaluator, as do precision and recall."""

import numpy as np
import pytest
import tqdm

from dit_jax.evaluation import neighbours, precision_recall


def _compute_half_distances(u, v):
    """Returns the ADM evaluator's squared distances [U, V], in NumPy's float16."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    norm_u, norm_v = ((a * a).sum(axis=1, dtype=np.float32).astype(np.float16) for a in (u, v))
    products = (u.astype(np.float64) @ v.T.astype(np.float64)).astype(np.float16)
    squared = (norm_u[:, None] - np.float16(2) * products) + norm_v[None]
    assert squared.dtype == np.float16
    return np.maximum(squared, np.float16(0))


def _compute_half_radii(points, k):
    # Index k, not k - 1, because the nearest point is the point itself.
    return np.partition(_compute_half_distances(points, points), k, axis=1)[:, k]


@pytest.mark.parametrize("block_size", [64, 2048])
def test_half_precision_equals_the_adm_evaluator(monkeypatch, block_size):
    """float16 has steps of 1/64 to 1/4 at these squared norms, so the order of sums counts."""
    monkeypatch.setattr(neighbours, "BLOCK_SIZE", block_size)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        samples, reference = (
            (1 + 0.1 * rng.normal(size=(n, 300))) * np.geomspace(0.3, 1, n)[:, None]
            for n in (310, 205)
        )
        # Products of multiples of 1/64 add up exactly in any order.
        samples, reference = (np.float32(np.round(64 * a) / 64) for a in (samples, reference))
        sample_radii, reference_radii = (_compute_half_radii(x, 3) for x in (samples, reference))
        blocks, _, half = neighbours.make_blocks(samples, reference, half=True)
        assert half
        radii = neighbours.compute_squared_radii(blocks, 3, half, tqdm.tqdm(disable=True))
        np.testing.assert_array_equal(np.concatenate(radii)[:310], sample_radii)
        between = _compute_half_distances(reference, samples)
        expected = (
            (between <= reference_radii[:, None]).any(axis=0),
            (between <= sample_radii[None]).any(axis=1),
        )
        actual = precision_recall.find_inside(samples, reference, 3, half=True)
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_array_equal(actual[1], expected[1])
        shares = tuple(float(points.mean()) for points in expected)
        assert precision_recall.compute(samples, reference, half=True) == shares
        assert precision_recall.compute(samples, reference) != shares


def test_norms_too_large_for_half_precision_are_computed_in_single():
    rng = np.random.default_rng(0)
    samples, reference = (rng.normal(size=(n, 8)).astype(np.float32) * 1e3 for n in (50, 40))
    half = precision_recall.compute(samples, reference, half=True)
    assert half == precision_recall.compute(samples, reference)
