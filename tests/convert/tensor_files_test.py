"""Files of named arrays: each format gives the same parameters, and invalid files are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from helpers import torch_format

from dit_jax import convert
from dit_jax.convert import tensor_files
from dit_jax.system import npz_files


def test_files_give_the_parameters_of_the_arrays(
    golden_model_config, golden_params, published, tmp_path
):
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
    actual = tensor_files.read(tmp_path / "half.safetensors")
    assert {a.dtype for a in actual.values()} == {np.dtype(np.float32)}
    assert (actual["a"].tolist(), actual["b"].tolist()) == ([1.0, -2.5], [0.25])


def test_torch_files_give_the_parameters_of_the_arrays(
    golden_model_config, golden_params, published, tmp_path
):
    by_name, records = torch_format.tensors(published)
    torch_format.save(tmp_path / "plain.pt", by_name, records)
    torch_format.save(tmp_path / "training.pt", {"model": {}, "ema": by_name}, records)
    for name in ("plain.pt", "training.pt"):
        params = convert.load("dit", tmp_path / name, golden_model_config)
        jax.tree.map(np.testing.assert_array_equal, params, golden_params)


def test_torch_file_with_other_objects_is_refused(tmp_path):
    by_name, records = torch_format.tensors({"weight": np.zeros(2, np.float32)})
    torch_format.save(tmp_path / "mixed.pt", by_name | {"epoch": 3}, records)
    with pytest.raises(ValueError, match=r"holds more than tensors: epoch \(int\)"):
        tensor_files.read(tmp_path / "mixed.pt")


def _save(path):
    weight = np.arange(1000, dtype=np.float32)
    if path.suffix == ".npz":
        np.savez(path, weight=weight)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file({"weight": weight}, path)
    else:
        is_old = path.suffix == ".pth"  # torchvision's and LPIPS's are
        save = torch_format.save_legacy if is_old else torch_format.save
        save(path, *torch_format.tensors({"weight": weight}))


@pytest.mark.parametrize("damage", ["empty", "beginning", "half", "web page"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth", ".bin"])
def test_damaged_file_is_named_with_the_way_out(suffix, damage, tmp_path):
    path = tmp_path / f"weights{suffix}"
    _save(path)
    assert tensor_files.read(path)["weight"][-1] == 999
    contents = path.read_bytes()
    damaged = {
        "empty": b"",
        "beginning": contents[:50],
        "half": contents[: len(contents) // 2],
        "web page": b"<!DOCTYPE html><title>Not found</title>",
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"cannot read .*weights{suffix}: ") as error:
        tensor_files.read(path)
    message = str(error.value)
    beginning = (
        f"has {len(damaged):,} bytes and begins with {damaged[:20]!r}. It is cut short, damaged"
    )
    assert beginning in message
    assert message.endswith("compare its size and SHA-256 with docs/weights.md.")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        tensor_files.read(tmp_path / "none.npz")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"expected \.npz, \.safetensors, \.pt, \.pth, \.bin, \.ckpt\."
    ):
        tensor_files.read(tmp_path / "weights.h5")
    with pytest.raises(ValueError, match="is a directory: give the file in it"):
        tensor_files.read(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1 + 1j], np.complex64), r"more than real numbers: a\\x1b \(complex64\)"),
        (np.array(["1.5"]), r"more than real numbers: a\\x1b \(<U3\)"),
        (np.array([{}]), "holds Python objects, which could run code"),
        (
            np.zeros((0, 2**40), np.float32),
            r"empty arrays: a\\x1b \(0, 1099511627776\)",
        ),
    ],
)
def test_npz_with_other_values_is_refused(tmp_path, array, message):
    np.savez(tmp_path / "x.npz", **{"a\x1b": array})
    with pytest.raises(ValueError, match=message):
        tensor_files.read(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "bool"])
def test_integer_weights_are_refused(tmp_path, suffix, dtype):
    def save(**tensors):
        if suffix == ".npz":
            np.savez(path, **tensors)
        elif suffix == ".safetensors":
            safetensors.numpy.save_file(tensors, path)
        else:
            torch_format.save(path, *torch_format.tensors(tensors))

    path, weight = tmp_path / f"x{suffix}", np.ones((2, 3), np.float32)
    counters = {"embeddings.position_ids": np.arange(3)[None], "ema.num_updates": np.array(7)}
    save(**{"a.weight": weight, **counters})
    assert tensor_files.read(path).keys() == {"a.weight", *counters}
    save(**{"a.weight": weight, "b.weight": weight.astype(dtype), **counters})
    message = rf"x{suffix} has weights that are no floating-point numbers: b\.weight \({dtype}\)\. "
    with pytest.raises(ValueError, match=message):
        tensor_files.read(path)


def test_other_values_beside_prefixed_arrays_are_ignored(tmp_path):
    np.savez(tmp_path / "x.npz", **{"w/a": np.ones(2), "text": np.array("x"), "none": np.zeros(0)})
    assert tensor_files.read(tmp_path / "x.npz").keys() == {"a"}


def _write_safetensors(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def _entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _entry(), "b": _entry()}, "SafetensorError"),  # one over the other
        ({"a": _entry(shape=(2**61, 2))}, "SafetensorError"),
        ({"a": _entry(shape=(-1,))}, "SafetensorError"),
        ({"a": _entry(end=2**62, shape=(2**60,))}, "SafetensorError"),
        ({"a": _entry("F8_E4M3", (4,))}, r"more than real numbers: a \(F8_E4M3\)"),
        ({"a": _entry("F32", (2**50, 0), 0, 0), "b": _entry()}, r"empty arrays: a \(1125899"),
        (b"[" * 10**6, "SafetensorError"),
        (b'{"a":' * 10**6, "SafetensorError"),
        (b"{}", "SafetensorError"),
    ],
)
def test_harmful_safetensors_are_refused(tmp_path, header, message):
    _write_safetensors(tmp_path / "x.safetensors", header, b"1234")
    with pytest.raises(ValueError, match=message):
        tensor_files.read(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ValueError, match="SafetensorError"):
        tensor_files.read(tmp_path / "x.safetensors")


def test_half_precision_is_limited_by_its_size_in_f32(tmp_path, monkeypatch):
    """A compressed file of many zeros has two bytes for each, and their f32 array four."""
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2**20, np.float16))
    assert tensor_files.read(tmp_path / "x.npz")["a"].shape == (2**20,)
    monkeypatch.setattr(npz_files, "FREE_BYTES", 2**21)  # enough for the bytes alone
    with pytest.raises(ValueError, match="would take 4,194,304 bytes, but the file has 2,"):
        tensor_files.read(tmp_path / "x.npz")
