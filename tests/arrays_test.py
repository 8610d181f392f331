"""Every kind of file gives the same parameters; others are refused."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from dit_jax import convert
from dit_jax.convert import arrays


def test_files_give_what_the_mapping_gives(golden_model_config, golden_params, published, tmp_path):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(a) for name, a in published.items()},
        tmp_path / "dit.safetensors",
    )
    np.savez(tmp_path / "plain.npz", **published)
    for source in (published, tmp_path / "dit.safetensors", str(tmp_path / "plain.npz")):
        params = convert.load("dit", source, golden_model_config)
        jax.tree.map(np.testing.assert_array_equal, params, golden_params)


def test_half_precision_files_are_read(tmp_path):
    """The public VAEs of Stable Diffusion 3 and FLUX are f16 and bf16."""
    saved = {"a": jnp.array([1.0, -2.5], jnp.bfloat16), "b": jnp.array([0.25], jnp.float16)}
    safetensors.flax.save_file(saved, tmp_path / "half.safetensors")
    found = arrays.read(tmp_path / "half.safetensors")
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}
    assert (found["a"].tolist(), found["b"].tolist()) == ([1.0, -2.5], [0.25])


def test_torch_file(golden_model_config, golden_params, published, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    state = {name: torch.from_numpy(a.copy()) for name, a in published.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save(
        {"model": {}, "ema": state, "args": argparse.Namespace(lr=1)}, tmp_path / "training.pt"
    )
    for name in ("plain.pt", "training.pt"):
        params = convert.load("dit", tmp_path / name, golden_model_config)
        jax.tree.map(np.testing.assert_array_equal, params, golden_params)


def test_torch_file_of_more_than_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="holds more than tensors: epoch"):
        arrays.read(tmp_path / "mixed.pt")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        arrays.read(tmp_path / "none.npz")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected \.npz, \.safetensors or \.pt"):
        arrays.read(tmp_path / "weights.bin")
