"""Nearest-neighbour distances in large sets of features, in blocks on JAX's default device.

The ball around a point of a set reaches to the point's k-th nearest neighbour in that set.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

BLOCK_SIZE = 2048  # points; the distances between two blocks are in memory at a time
# Relative to |x|^2 + |y|^2. In 2048 dimensions an f32 squared distance was off by at most 8e-7 of
# this sum.
ROUNDING = 2e-6
MAX_HALF_NORM = 32_000.0  # of a squared norm: the sum of two must not overflow float16


class Block(NamedTuple):
    """B points of a set, padded with points at an infinite distance to all others."""

    points: jax.Array  # [B, D] f32
    squared_norms: jax.Array  # [B] f32, infinite for padding


def make_blocks(x: np.ndarray, y: np.ndarray, half: bool) -> tuple[list[Block], list[Block], bool]:
    """Returns the blocks of x [N, D] and of y [M, D], and whether their distances are float16.

    Args:
      half: whether to compute squared distances in float16, as the ADM evaluator does with y as its
        reference. If float16 might overflow, f32 is used.
    Raises: FloatingPointError for NaN, infinite or huge features.
    """
    half = half and all(np.einsum("nd,nd->n", a, a).max() < MAX_HALF_NORM for a in (x, y))
    # |x|^2 + |y|^2 - 2 x.y cancels more the further the points are from the origin, so they are
    # centred. float16 reproduces the evaluator, which does not centre them.
    centre = np.zeros_like(y[0]) if half else np.mean(y, axis=0, dtype=np.float64)
    return _split(x, centre, half), _split(y, centre, half), half


def _split(features, centre, half):
    """Splits features [N, D] - centre [D] into blocks of equal size; `half` rounds to float16."""
    num_blocks = -(-len(features) // BLOCK_SIZE)
    size = -(-len(features) // num_blocks)
    blocks = []
    for start in range(0, len(features), size):
        points = features[start : start + size] - centre[None]
        points = points.astype(np.float16 if half else np.float32)
        norms = np.square(points, dtype=np.float16 if half else np.float64)
        norms = norms.sum(axis=1, dtype=np.float32 if half else np.float64)
        # A squared distance may be 4 times as large as a squared norm.
        if not (norms < np.finfo(np.float32).max / 4).all():
            raise FloatingPointError(
                f"some of the features {start}..{start + len(points) - 1} are NaN, infinite or too "
                "large for f32. Are the images finite?"
            )
        norms = norms.astype(np.float16 if half else np.float32).astype(np.float32)
        num_missing = size - len(points)
        points = np.pad(points.astype(np.float32), ((0, num_missing), (0, 0)))
        norms = np.pad(norms, (0, num_missing), constant_values=np.inf)
        blocks.append(Block(jnp.asarray(points), jnp.asarray(norms)))
    return blocks


def compute_squared_radii(
    blocks: list[Block], num_neighbours: int, half: bool, bar: tqdm.tqdm
) -> list[jax.Array]:
    """Returns for each block the squared radii [B] of the balls around its points.

    Args: bar, advanced by one for each pair of blocks.
    """
    nearest = [jnp.full((len(block.points), num_neighbours), jnp.inf) for block in blocks]
    for i in range(len(blocks)):
        nearest[i] = _update(blocks[i], nearest[i], half)
        # Each pair of blocks is computed once, for both of them.
        for j in range(i + 1, len(blocks)):
            nearest[i], nearest[j] = _update_both(
                blocks[i], blocks[j], nearest[i], nearest[j], half
            )
        jax.block_until_ready(nearest[i])  # otherwise the bar runs ahead of the device
        bar.update(len(blocks) - i)
    return [squared_distances[:, -1] for squared_distances in nearest]


def bound_squared_distances(a: Block, b: Block, half: bool) -> jax.Array:
    """Returns lower bounds [A, B] of the squared distances, NaN for padding.

    The bounds are below the distances by more than the rounding of f32, so that a point on the
    surface of a ball is inside. Distances in float16 are their own bounds, as in the evaluator.
    """
    squared, _ = _compute_squared_distances(a, b, half)
    if not half:
        squared -= ROUNDING * (a.squared_norms[:, None] + b.squared_norms[None])
    # No comparison with NaN is true, so padding is in no ball, and no point is in its ball.
    return jnp.where(jnp.isfinite(squared), squared, jnp.nan)


def _compute_squared_distances(a, b, half):
    """Returns squared distances [A, B] from a to b and from b to a, which float16 rounds apart."""
    products = jnp.matmul(a.points, b.points.T, precision="highest")
    norms_a, norms_b = a.squared_norms[:, None], b.squared_norms[None]
    if not half:
        squared = norms_a + norms_b - 2 * products
        return squared, squared
    # XLA may remove a cast to float16 and back, but not this.
    to_half = functools.partial(jax.lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    products = to_half(products)

    def add_norms(norms_from, norms_to):
        return jnp.maximum(to_half(to_half(norms_from - 2 * products) + norms_to), 0)

    return add_norms(norms_a, norms_b), add_norms(norms_b, norms_a)


def _merge_smallest(nearest, squared):
    """Returns the k smallest of each row of `nearest` [B, k] and `squared` [B, C], in order."""
    k = nearest.shape[1]
    candidates = -jax.lax.top_k(-squared, min(k, squared.shape[1]))[0]
    return -jax.lax.top_k(-jnp.concatenate([nearest, candidates], axis=1), k)[0]


@functools.partial(jax.jit, static_argnames="half")
def _update(a, nearest, half):
    """Returns `nearest`, updated by the distances between the different points of one block."""
    squared, _ = _compute_squared_distances(a, a, half)
    is_same_point = jnp.eye(len(squared), dtype=bool)
    return _merge_smallest(nearest, jnp.where(is_same_point, jnp.inf, squared))


@functools.partial(jax.jit, static_argnames="half")
def _update_both(a, b, nearest_a, nearest_b, half):
    """Returns both `nearest`, updated by the distances between two blocks."""
    squared_a, squared_b = _compute_squared_distances(a, b, half)
    return _merge_smallest(nearest_a, squared_a), _merge_smallest(nearest_b, squared_b.T)
