"""Precision and recall: the share of each set's points inside the other set's manifold.

A manifold is a union of balls around the points of a set.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.errors import UserError

BLOCK = 2048  # points; the distances of two blocks are in memory at a time
# Relative to |x|^2 + |y|^2. An f32 squared distance was off by at most 8e-7 of that, in 2048
# dimensions.
ROUNDING = 2e-6
MAX_HALF_NORM = 32_000.0  # of a squared norm: the sum of two must not overflow float16


def inside(
    x: np.ndarray, y: np.ndarray, neighbours: int, half: bool = False, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether the points of each set are inside the other's manifold: [N] and [M], bool.

    A manifold is the union of closed balls around the set's points. Each ball reaches to the
    `neighbours`-th nearest of the other points. A point within rounding of a surface is inside.
    Distances are computed in blocks on JAX's default device.
    Args:
      x: [N, D].
      y: [M, D]. Both sets have at least `neighbours` + 1 points.
      half: whether squared distances are float16, as in the ADM evaluator with y as its reference.
        The squared norms of Inception's features are some hundreds, where float16 has steps of 1/4
        and more. That made both shares larger by about 0.002. If float16 might overflow, f32 is
        used.
    Raises: FloatingPointError for NaN, infinite or huge features.
    """
    half = half and all(np.einsum("nd,nd->n", a, a).max() < MAX_HALF_NORM for a in (x, y))
    # |x|^2 + |y|^2 - 2 x.y cancels more the further the points are from the origin, so they are
    # centred. float16 reproduces the evaluator, which does not centre them.
    centre = 0 * y[0] if half else np.mean(y, axis=0, dtype=np.float64)
    n, m = len(x), len(y)
    x, y = _to_blocks(x, centre, half), _to_blocks(y, centre, half)
    # Distances within a set are symmetric, so each pair of its blocks counts once.
    pairs = sum(len(blocks) * (len(blocks) + 1) // 2 for blocks in (x, y)) + len(x) * len(y)
    with tqdm(total=pairs, desc="distances", disable=not progress) as bar:
        x_radii, y_radii = (_squared_radii(blocks, neighbours, half, bar) for blocks in (x, y))
        x_inside, y_inside = [False] * len(x), [False] * len(y)
        for i in range(len(x)):
            for j in range(len(y)):
                y_in, x_in = _are_inside(y[j], x[i], y_radii[j], x_radii[i], half)
                x_inside[i], y_inside[j] = x_inside[i] | x_in, y_inside[j] | y_in
            jax.block_until_ready(x_inside[i])  # otherwise the bar runs ahead of the device
            bar.update(len(y))
    return np.concatenate(x_inside)[:n], np.concatenate(y_inside)[:m]


def _to_blocks(features, centre, half):
    """Returns [(points [B, D], squared norms [B])], f32, or rounded to float16's values by `half`.

    B is the same for all blocks. The last block is filled up with points of infinite norm: at an
    infinite distance to any point they are nobody's neighbours and in no ball.
    """
    count = -(-len(features) // BLOCK)
    size = -(-len(features) // count)
    blocks = []
    for start in range(0, len(features), size):
        points = features[start : start + size] - centre[None]
        points = points.astype(np.float16 if half else np.float32)
        norms = np.square(points, dtype=np.float16 if half else np.float64)
        norms = norms.sum(axis=1, dtype=np.float32 if half else np.float64)
        # A squared distance may be 4 times as large as a squared norm.
        if not (norms < np.finfo(np.float32).max / 4).all():
            raise FloatingPointError(
                f"of features {start}..{start + len(points) - 1} some are NaN, infinite or too "
                "large for f32: are the images finite?"
            )
        norms = norms.astype(np.float16 if half else np.float32).astype(np.float32)
        missing = size - len(points)
        points = np.pad(points.astype(np.float32), ((0, missing), (0, 0)))
        norms = np.pad(norms, (0, missing), constant_values=np.inf)
        blocks.append((jnp.asarray(points), jnp.asarray(norms)))
    return blocks


def _squared_radii(blocks, neighbours, half, bar):
    """Returns for each block the squared radii [B]: distances to the `neighbours`-th neighbour."""
    nearest = [jnp.full((len(norms), neighbours), jnp.inf) for _, norms in blocks]
    for i in range(len(blocks)):
        nearest[i] = _update(blocks[i], nearest[i], half)
        # Each pair of blocks is computed once, for both of them.
        for j in range(i + 1, len(blocks)):
            nearest[i], nearest[j] = _update_both(
                blocks[i], blocks[j], nearest[i], nearest[j], half
            )
        jax.block_until_ready(nearest[i])
        bar.update(len(blocks) - i)
    return [squared[:, -1] for squared in nearest]


def _squared_distances(a, b, half):
    """Returns squared distances [A, B] of a and b, and of b and a, which float16 rounds apart."""
    (points_a, norms_a), (points_b, norms_b) = a, b
    products = jnp.matmul(points_a, points_b.T, precision="highest")
    if not half:
        squared = norms_a[:, None] + norms_b[None] - 2 * products
        return squared, squared
    # XLA may remove a cast to float16 and back, but not this.
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    products = rounded(products)

    def squared(first, second):
        return jnp.maximum(rounded(rounded(first - 2 * products) + second), 0)

    return squared(norms_a[:, None], norms_b[None]), squared(norms_b[None], norms_a[:, None])


def _smallest(nearest, squared):
    """Returns the k smallest of each row of `nearest` [B, k] and `squared` [B, C], in order."""
    k = nearest.shape[1]
    new = -jax.lax.top_k(-squared, min(k, squared.shape[1]))[0]
    return -jax.lax.top_k(-jnp.concatenate([nearest, new], axis=1), k)[0]


@functools.partial(jax.jit, static_argnames="half")
def _update(a, nearest, half):
    """Returns `nearest`, updated by the distances between the different points of one block."""
    squared, _ = _squared_distances(a, a, half)
    return _smallest(nearest, jnp.where(jnp.eye(len(squared), dtype=bool), jnp.inf, squared))


@functools.partial(jax.jit, static_argnames="half")
def _update_both(a, b, nearest_a, nearest_b, half):
    """Returns both `nearest`, updated by the distances between two blocks."""
    squared_a, squared_b = _squared_distances(a, b, half)
    return _smallest(nearest_a, squared_a), _smallest(nearest_b, squared_b.T)


@functools.partial(jax.jit, static_argnames="half")
def _are_inside(a, b, radii_a, radii_b, half):
    """Returns which points of block a [A] are in b's balls, and of block b [B] in a's."""
    squared, _ = _squared_distances(a, b, half)
    if not half:
        # A point on a surface counts as inside, whatever the rounding.
        squared -= ROUNDING * (a[1][:, None] + b[1][None])
    # No comparison with NaN is true: a point that fills up a block is in no ball, and no point is
    # in its ball.
    squared = jnp.where(jnp.isfinite(squared), squared, jnp.nan)
    return jnp.any(squared <= radii_b[None], axis=1), jnp.any(squared <= radii_a[:, None], axis=0)


def compute(
    samples: np.ndarray,
    reference: np.ndarray,
    neighbours: int = 3,
    half: bool = False,
    progress: bool = False,
) -> tuple[float, float]:
    """Returns (precision, recall): the share of each set inside the manifold of the other one.

    Args: neighbours, half, as for `inside`.
    Raises: ValueError for too few points; FloatingPointError for NaN, infinite or huge features.
    Source: Kynkaanniemi et al. 2019, eq. 1 and 2.
    """
    check_pair(samples, reference)
    if min(len(samples), len(reference)) < neighbours + 1:
        raise UserError(
            f"{len(samples)} samples and {len(reference)} reference features are too few for "
            f"{neighbours=}: a point needs that many others, so take {neighbours + 1} of each."
        )
    shares = inside(samples, reference, neighbours, half, progress)
    return tuple(float(points.mean()) for points in shares)


def check_pair(samples, reference):
    """Raises ValueError unless the sets are matrices with equally many columns."""
    shapes = np.shape(samples), np.shape(reference)
    if len(shapes[0]) != 2 or shapes[0][1:] != shapes[1][1:]:
        raise UserError(f"features must be [N, D] and [M, D], not {shapes[0]} and {shapes[1]}.")
