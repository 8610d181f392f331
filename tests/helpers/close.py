"""The one comparison of computed numbers: differences against the largest expected value.

Rounding moves every element of an array by about the same amount, which depends on the machine's
vector instructions and threads. Relative to the element itself, an error near zero has no bound.
"""

import jax
import numpy as np


def assert_close(actual, expected, tolerance):
    """Asserts max |actual - expected| <= tolerance * max |expected|.

    Args:
      actual, expected: Arrays, lists or numbers of one shape and of any dtype.
      tolerance: Relative to the largest expected value.

    Raises: AssertionError for other shapes, for nothing to compare, for values that are not
      finite, and for a larger difference, with the index and both values of the largest.
    """
    _assert_close(actual, expected, tolerance, "")


def assert_trees_close(actual, expected, tolerance, floor=0.0):
    """Asserts `assert_close` of every leaf of two trees of one structure.

    Args:
      floor: The largest difference in a leaf whose expected values are all 0.
    """
    structures = jax.tree.structure(actual), jax.tree.structure(expected)
    assert structures[0] == structures[1], f"structure {structures[0]} instead of {structures[1]}"
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), e in zip(leaves, jax.tree.leaves(expected), strict=True):
        _assert_close(a, e, tolerance, jax.tree_util.keystr(path) + ": ", floor)


def _assert_close(actual, expected, tolerance, where, floor=0.0):
    a, e = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert a.shape == e.shape, f"{where}shape {a.shape} instead of {e.shape}"
    assert a.size, f"{where}nothing to compare, of shape {a.shape}"
    for name, values in (("actual", a), ("expected", e)):
        finite = np.isfinite(values)
        assert finite.all(), f"{where}{name} is {values[~finite][0]} at {_first(~finite)}"
    difference = np.abs(a - e)
    index = _first(difference == difference.max())
    largest = np.abs(e).max()
    limit = tolerance * largest if largest else floor
    assert difference[index] <= limit, (
        f"{where}at {index} {a[index]:.9g} instead of {e[index]:.9g}: they differ by"
        f" {difference[index]:.3g}, more than {limit:.3g}; the largest expected is {largest:.3g}"
    )


def _first(mask):
    return tuple(int(i) for i in np.argwhere(mask)[0])
