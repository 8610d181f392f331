"""Parameters and published arrays: their layouts, and messages about differences."""

import numpy as np
import pytest

from dit_jax import convert
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
def test_published_axes_and_back(path, shape, published):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert parameters.to_torch_shape(path, shape) == published
    in_file = parameters.to_torch(path, array, published)
    assert in_file.shape == published
    np.testing.assert_array_equal(parameters.from_torch(path, in_file).reshape(shape), array)


def test_diffusers_names():
    to_name = parameters.to_diffusers_name
    assert to_name("mid_block/resnets_0/norm1/scale") == "mid_block.resnets.0.norm1.weight"
    assert to_name("time_embedding/linear_1/kernel") == "time_embedding.linear_1.weight"
    assert to_name("up_blocks_1_resnets_2/conv1/bias") == "up_blocks.1.resnets.2.conv1.bias"


def test_missing_unexpected_and_wrong_shapes_are_listed(golden_model_config, published):
    published["blocks.3.attn.proj.bias"] = published.pop("blocks.2.attn.proj.bias")
    published["final_layer.linear.bias"] = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("dit", published, golden_model_config)
    message = str(error.value)
    assert "missing (1): blocks.2.attn.proj.bias (48,)" in message
    assert "unexpected (1): blocks.3.attn.proj.bias (48,)" in message
    assert "wrong shape (1): final_layer.linear.bias (16,) instead of (32,)" in message


def test_long_lists_are_cut():
    tensors = {f"actual{i}\n": np.zeros(2) for i in range(1000)}
    with pytest.raises(ValueError, match="does not fit the model") as error:
        parameters.check(tensors, {f"expected{i}": (2,) for i in range(700)})
    message = str(error.value)
    assert "missing (700): expected0 (2,), expected1 (2,), " in message
    assert "expected4 (2,) and 695 more\n" in message
    assert r"unexpected (1000): actual0\n (2,), actual1\n (2,)" in message
    assert len(message) < 500


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(golden_model_config, published, value):
    not_finite = list(published)[2:6]
    for name in not_finite:
        published[name] = published[name].copy()
        published[name].flat[-1] = value
    with pytest.raises(ValueError, match="tensors hold NaN or infinity") as error:
        convert.load("dit", published, golden_model_config)
    assert str(error.value).startswith(f"4 of the checkpoint's {len(published)} tensors")
    assert f"such as {', '.join(not_finite[:3])}.\n" in str(error.value)
