"""Comparisons of computed values, relative to the largest expected value.

Rounding changes all elements of an array by about the same amount, which depends on the machine's
vector instructions and threads. Relative to an element near zero, this amount has no bound.
"""

import jax
import numpy as np


def assert_close(actual, expected, tolerance):
    """Asserts max |actual - expected| <= tolerance * max |expected|.

    Args:
      actual, expected: Arrays, lists or numbers of one shape and of any dtype.
      tolerance: Relative to the largest expected value.

    Raises: AssertionError if the shapes differ, if the arrays are empty, if a value is not finite,
      or if a difference is larger. The message has the index and both values of the largest one.
    """
    _assert_close(actual, expected, tolerance, "")


def assert_trees_close(actual, expected, tolerance, floor=0.0):
    """Asserts that two trees have one structure, and applies `assert_close` to each pair of leaves.

    Args:
      floor: The largest allowed difference in a leaf whose expected values are all 0.
    """
    structures = jax.tree.structure(actual), jax.tree.structure(expected)
    assert structures[0] == structures[1], f"structure {structures[0]} instead of {structures[1]}"
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, leaf), expected_leaf in zip(leaves, jax.tree.leaves(expected), strict=True):
        _assert_close(leaf, expected_leaf, tolerance, jax.tree_util.keystr(path) + ": ", floor)


def _assert_close(actual, expected, tolerance, prefix, floor=0.0):
    """Implements `assert_close`; messages begin with the prefix."""
    actual, expected = (np.asarray(values).astype(np.float64) for values in (actual, expected))
    assert actual.shape == expected.shape, (
        f"{prefix}shape {actual.shape} instead of {expected.shape}"
    )
    assert actual.size, f"{prefix}nothing to compare, of shape {actual.shape}"
    for name, values in (("actual", actual), ("expected", expected)):
        finite = np.isfinite(values)
        assert finite.all(), f"{prefix}{name} is {values[~finite][0]} at {_find_first(~finite)}"
    difference = np.abs(actual - expected)
    index = _find_first(difference == difference.max())
    largest = np.abs(expected).max()
    limit = tolerance * largest if largest else floor
    assert difference[index] <= limit, (
        f"{prefix}at {index} {actual[index]:.9g} instead of {expected[index]:.9g}: they differ by"
        f" {difference[index]:.3g}, more than {limit:.3g}; the largest expected is {largest:.3g}"
    )


def _find_first(mask):
    return tuple(int(i) for i in np.argwhere(mask)[0])
