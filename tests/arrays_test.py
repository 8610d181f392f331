"""Every kind of file gives the same parameters; others are refused."""

import argparse
import sys

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


def test_torch_file_without_torch_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"needs torch, which is not installed: .*\.safetensors"):
        arrays.read(tmp_path / "weights.pt")


def test_torch_file_of_more_than_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="holds more than tensors: epoch"):
        arrays.read(tmp_path / "mixed.pt")


def test_torch_file_with_code_is_refused_in_a_line(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    torch.save({"weight": torch.zeros(2), "path": tmp_path}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="must hold tensors alone, as running") as error:
        arrays.read(tmp_path / "code.pt")
    assert "PosixPath" in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to run it


def _save(path):
    weight = np.arange(1000, dtype=np.float32)
    if path.suffix == ".npz":
        np.savez(path, weight=weight)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file({"weight": weight}, path)
    else:
        torch = pytest.importorskip("torch", reason="torch is optional")
        is_new = path.suffix != ".pth"  # torchvision's and LPIPS's are not
        tensors = {"weight": torch.from_numpy(weight)}
        torch.save(tensors, path, _use_new_zipfile_serialization=is_new)


@pytest.mark.parametrize("damage", ["empty", "beginning", "half", "web page"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth", ".bin"])
def test_damaged_file_is_named_with_the_way_out(suffix, damage, tmp_path):
    path = tmp_path / f"weights{suffix}"
    _save(path)
    assert arrays.read(path)["weight"][-1] == 999
    whole = path.read_bytes()
    left = {
        "empty": b"",
        "beginning": whole[:50],
        "half": whole[: len(whole) // 2],
        "web page": b"<!DOCTYPE html><title>Not found</title>",
    }[damage]
    path.write_bytes(left)
    with pytest.raises(ValueError, match=f"cannot read .*weights{suffix}: ") as error:
        arrays.read(path)
    message = str(error.value)
    assert f"Its {len(left):,} bytes begin with {left[:20]!r}: it is cut short, damaged" in message
    assert message.endswith("compare its size and SHA-256 with docs/weights.md.")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        arrays.read(tmp_path / "none.npz")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected \.npz, \.safetensors or \.pt"):
        arrays.read(tmp_path / "weights.h5")
