"""Parameters and published arrays: their layouts, and what a message lists of their differences."""

import numpy as np
import pytest

from dit_jax.convert import parameters


@pytest.mark.parametrize(
    ("path", "shape", "published"),
    [
        ("conv/kernel", (3, 2, 4, 5), (5, 4, 3, 2)),
        ("fc/kernel", (4, 5), (5, 4)),
        ("to_q/kernel", (4, 2, 3), (6, 4)),  # heads
        ("to_q/bias", (2, 3), (6,)),
        ("norm/scale", (4,), (4,)),
        ("class_embedding/embedding", (7, 4), (7, 4)),
    ],
)
def test_layouts_of_torch_and_back(path, shape, published):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert parameters.to_torch_shape(path, shape) == published
    there = parameters.to_torch(path, array, published)
    assert there.shape == published
    np.testing.assert_array_equal(parameters.from_torch(path, there).reshape(shape), array)


def test_names():
    name = parameters.to_diffusers_name
    assert name("mid_block/resnets_0/norm1/scale") == "mid_block.resnets.0.norm1.weight"
    assert name("time_embedding/linear_1/kernel") == "time_embedding.linear_1.weight"
    assert name("up_blocks_1_resnets_2/conv1/bias") == "up_blocks.1.resnets.2.conv1.bias"


def test_long_lists_are_cut():
    actual = {f"found{i}\n": np.zeros(2) for i in range(1000)}
    with pytest.raises(ValueError, match="does not fit the model") as error:
        parameters.check(actual, {f"expected{i}": (2,) for i in range(700)})
    message = str(error.value)
    assert "missing (700): expected0 (2,), expected1 (2,), " in message
    assert "expected4 (2,) and 695 more\n" in message
    assert r"unexpected (1000): found0\n (2,), found1\n (2,)" in message
    assert len(message) < 500
