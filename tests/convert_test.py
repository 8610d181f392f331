"""Exact coverage both ways, from every kind of file."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from dit_jax import convert


@pytest.fixture
def published(golden):
    return {name.removeprefix("w/"): a for name, a in golden.items() if name.startswith("w/")}


def test_layouts(golden_params, published):
    """Spot checks, entry by entry; that the whole is right the golden output shows."""
    blocks = golden_params["blocks"]
    qkv = published["blocks.1.attn.qkv.weight"]  # [3D, D], rows ordered (3, heads, head size)
    assert blocks["attn"]["qkv"]["kernel"].shape == (3, 48, 3, 4, 12)
    assert blocks["attn"]["qkv"]["kernel"][1, 5, 2, 3, 7] == qkv[2 * 48 + 3 * 12 + 7, 5]
    patch = published["x_embedder.proj.weight"]  # [D, C, p, p]
    kernel = golden_params["x_embedder"]["kernel"]  # [p*p*C, D]
    assert kernel[(1 * 2 + 0) * 4 + 3, 9] == patch[9, 3, 1, 0]


def test_files_give_what_the_mapping_gives(golden_model_config, golden_params, published, tmp_path):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(a) for name, a in published.items()},
        tmp_path / "dit.safetensors",
    )
    np.savez(tmp_path / "plain.npz", **published)
    for source in (published, tmp_path / "dit.safetensors", str(tmp_path / "plain.npz")):
        params = convert.load("dit", source, golden_model_config)
        jax.tree.map(np.testing.assert_array_equal, params, golden_params)


def test_torch_file(golden_model_config, golden_params, published, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    state = {name: torch.from_numpy(a.copy()) for name, a in published.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": {}, "ema": state, "args": None}, tmp_path / "training.pt")
    for name in ("plain.pt", "training.pt"):
        params = convert.load("dit", tmp_path / name, golden_model_config)
        jax.tree.map(np.testing.assert_array_equal, params, golden_params)


def test_differences_are_listed_both_ways(golden_model_config, published):
    published["blocks.3.attn.proj.bias"] = published.pop("blocks.2.attn.proj.bias")
    published["final_layer.linear.bias"] = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("dit", published, golden_model_config)
    message = str(error.value)
    assert "missing (1): blocks.2.attn.proj.bias (48,)" in message
    assert "unexpected (1): blocks.3.attn.proj.bias (48,)" in message
    assert "wrong shape (1): final_layer.linear.bias (16,) instead of (32,)" in message


def test_another_position_table_is_refused(golden_model_config, published):
    published["pos_embed"] = published["pos_embed"][:, ::-1]
    with pytest.raises(ValueError, match="pos_embed differs from the sin-cos table by"):
        convert.load("dit", published, golden_model_config)


def test_unknown_formats_and_files(golden_model_config, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'sit'; known: dit"):
        convert.load("sit", {}, golden_model_config)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        convert.load("dit", tmp_path / "none.npz", golden_model_config)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected \.npz, \.safetensors or \.pt"):
        convert.load("dit", tmp_path / "weights.bin", golden_model_config)
