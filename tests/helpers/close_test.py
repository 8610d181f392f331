"""The comparisons of helpers.close: their tolerances and their messages."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close


def test_differences_are_relative_to_the_largest_expected_value():
    expected = np.array([[1e-9, -100.0], [2.0, 0.0]])
    assert_close(expected + 0.9e-3, expected, 1e-5)
    assert_close(jnp.asarray(expected + 0.25, "bfloat16"), expected.tolist(), 0.01)
    with pytest.raises(
        AssertionError, match=r"at \(1, 1\) 0.0011 instead of 0: they differ by 0.0"
    ):
        assert_close(expected + [[0, 0], [0, 1.1e-3]], expected, 1e-5)
    with pytest.raises(AssertionError, match="more than 0; the largest expected is 0"):
        assert_close(1e-9, 0.0, 1.0)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([1.0, 2.0], 1.0, r"shape \(2,\) instead of \(\)"),
        ([[1.0]], [1.0], r"shape \(1, 1\) instead of \(1,\)"),
        ([], [], r"nothing to compare, of shape \(0,\)"),
        ([1.0, np.nan], [1.0, np.nan], r"actual is nan at \(1,\)"),
        ([1.0, 2.0], [1.0, np.inf], r"expected is inf at \(1,\)"),
        ({"a": 1.0}, {"b": 1.0}, "structure .*'a'.* instead of .*'b'"),
        ({"a": (1.0, 2.0)}, {"a": (1.0, 9.0)}, r"\['a'\]\[1\]: at \(\) 2 instead of 9"),
    ],
    ids=str,
)
def test_messages_name_what_differs(actual, expected, message):
    compare = assert_trees_close if isinstance(actual, dict) else assert_close
    with pytest.raises(AssertionError, match=message):
        compare(actual, expected, 0.5)


def test_tolerance_is_relative_to_the_largest_value_of_each_leaf():
    expected = {"large": np.array([100.0, 0.0]), "small": np.array([1e-3])}
    assert_trees_close(
        {"large": np.array([100.0, 1e-4]), "small": np.array([1e-3])}, expected, 1e-5
    )
    with pytest.raises(AssertionError, match=r"\['small'\]: at \(0,\) 0.0011 instead of 0.001"):
        assert_trees_close(expected | {"small": np.array([1.1e-3])}, expected, 1e-5)


def test_floor_applies_only_to_leaves_of_zeros():
    expected = {"zeros": np.zeros(2), "small": np.full(2, 1e-9)}
    assert_trees_close(expected | {"zeros": np.full(2, 1e-7)}, expected, 1e-5, floor=1e-6)
    for changes in ({"zeros": np.full(2, 2e-6)}, {"small": np.full(2, 1e-7)}):
        with pytest.raises(AssertionError, match=next(iter(changes))):
            assert_trees_close(expected | changes, expected, 1e-5, floor=1e-6)
