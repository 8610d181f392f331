"""Precision and recall: the share of each set's points inside the other set's manifold.

A manifold is the union of the closed balls around a set's points, as in `neighbours`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.errors import UserError
from dit_jax.evaluation import metrics, neighbours


def compute(
    samples: np.ndarray,
    reference: np.ndarray,
    num_neighbours: int = 3,
    half: bool = False,
    progress: bool = False,
) -> tuple[float, float]:
    """Returns (precision, recall): the share of each set inside the manifold of the other one.

    Args: num_neighbours and half, as for `find_inside`.
    Raises: ValueError for too few points; FloatingPointError for NaN, infinite or huge features.
    Source: Kynkaanniemi et al. 2019, eq. 1 and 2.
    """
    metrics.check_pair(samples, reference)
    least = num_neighbours + 1  # the point itself and its neighbours
    if min(len(samples), len(reference)) < least:
        raise UserError(
            f"{len(samples)} samples and {len(reference)} reference features are too few for "
            f"{num_neighbours=}. Take at least {least} of each."
        )
    is_inside = find_inside(samples, reference, num_neighbours, half, progress)
    precision, recall = (float(points.mean()) for points in is_inside)
    return precision, recall


def find_inside(
    x: np.ndarray, y: np.ndarray, num_neighbours: int, half: bool = False, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether the points of each set are inside the other's manifold: [N] and [M], bool.

    A point within rounding of a surface is inside.
    Args:
      x: [N, D].
      y: [M, D]. Both sets have more than `num_neighbours` points.
      half: whether squared distances are float16, as in the ADM evaluator with y as its reference.
        The squared norms of Inception's features are some hundreds, where float16 has steps of 1/4
        and more. That made both shares larger by about 0.002.
    Raises: FloatingPointError for NaN, infinite or huge features.
    """
    num_x, num_y = len(x), len(y)
    x, y, half = neighbours.make_blocks(x, y, half)
    # Distances within a set are symmetric, so each pair of its blocks counts once.
    num_pairs = sum(len(blocks) * (len(blocks) + 1) // 2 for blocks in (x, y)) + len(x) * len(y)
    with tqdm(total=num_pairs, desc="distances", disable=not progress) as bar:
        x_radii, y_radii = (
            neighbours.compute_squared_radii(blocks, num_neighbours, half, bar) for blocks in (x, y)
        )
        x_inside, y_inside = [False] * len(x), [False] * len(y)
        for i in range(len(x)):
            for j in range(len(y)):
                y_in, x_in = _compare_blocks(y[j], x[i], y_radii[j], x_radii[i], half)
                x_inside[i], y_inside[j] = x_inside[i] | x_in, y_inside[j] | y_in
            jax.block_until_ready(x_inside[i])  # otherwise the bar runs ahead of the device
            bar.update(len(y))
    return np.concatenate(x_inside)[:num_x], np.concatenate(y_inside)[:num_y]


@functools.partial(jax.jit, static_argnames="half")
def _compare_blocks(a, b, radii_a, radii_b, half):
    """Returns which points of block a [A] are in b's balls, and of block b [B] in a's."""
    squared = neighbours.bound_squared_distances(a, b, half)
    return jnp.any(squared <= radii_b[None], axis=1), jnp.any(squared <= radii_a[:, None], axis=0)
