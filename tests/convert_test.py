"""Exact coverage both ways, and every layout."""

import numpy as np
import pytest

from dit_jax import convert


def test_layouts(golden_params, published):
    """Spot checks, entry by entry; that the whole is right the golden output shows."""
    blocks = golden_params["blocks"]
    qkv = published["blocks.2.attn.qkv.weight"]  # [3D, D], rows ordered (3, heads, head size)
    assert blocks["attn"]["qkv"]["kernel"].shape == (3, 48, 3, 4, 12)
    assert blocks["attn"]["qkv"]["kernel"][2, 5, 2, 3, 7] == qkv[2 * 48 + 3 * 12 + 7, 5]
    patch = published["x_embedder.proj.weight"]  # [D, C, p, p]
    kernel = golden_params["x_embedder"]["kernel"]  # [p*p*C, D]
    assert kernel[(1 * 2 + 0) * 4 + 3, 9] == patch[9, 3, 1, 0]


def test_differences_are_listed_both_ways(golden_model_config, published):
    published["blocks.3.attn.proj.bias"] = published.pop("blocks.2.attn.proj.bias")
    published["final_layer.linear.bias"] = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("dit", published, golden_model_config)
    message = str(error.value)
    assert "missing (1): blocks.2.attn.proj.bias (48,)" in message
    assert "unexpected (1): blocks.3.attn.proj.bias (48,)" in message
    assert "wrong shape (1): final_layer.linear.bias (16,) instead of (32,)" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(golden_model_config, published, value):
    broken = list(published)[2:6]
    for name in broken:
        published[name] = published[name].copy()
        published[name].flat[-1] = value
    with pytest.raises(ValueError, match="tensors hold NaN or infinity") as error:
        convert.load("dit", published, golden_model_config)
    assert str(error.value).startswith(f"4 of the checkpoint's {len(published)} tensors")
    assert f"such as {', '.join(broken[:3])}.\n" in str(error.value)


def test_another_position_table_is_refused(golden_model_config, published):
    published["pos_embed"] = published["pos_embed"][:, ::-1]
    with pytest.raises(ValueError, match="pos_embed differs from the sin-cos table by"):
        convert.load("dit", published, golden_model_config)


def test_unknown_format_lists_the_known(golden_model_config):
    with pytest.raises(ValueError, match="unknown format 'sit'; known: dit"):
        convert.load("sit", {}, golden_model_config)


def test_another_model_s_config_is_refused(golden_model_config):
    with pytest.raises(ValueError, match="'dit', but 'vae' is asked for"):
        convert.load("vae", {}, golden_model_config)
