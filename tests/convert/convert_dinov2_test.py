"""DINOv2 from the official file and from transformers' directory."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers import published_files
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert

CONFIG = ConfigDict(
    dict(name="dinov2", hidden_size=128, depth=2, num_heads=2, dtype="float32")
).lock()
# Published name -> shape, of one block and of the whole model, with D = 128.
BLOCK_SHAPES = {
    "norm1.weight": (128,),
    "norm1.bias": (128,),
    "attn.qkv.weight": (384, 128),
    "attn.qkv.bias": (384,),
    "attn.proj.weight": (128, 128),
    "attn.proj.bias": (128,),
    "ls1.gamma": (128,),
    "norm2.weight": (128,),
    "norm2.bias": (128,),
    "mlp.fc1.weight": (512, 128),
    "mlp.fc1.bias": (512,),
    "mlp.fc2.weight": (128, 512),
    "mlp.fc2.bias": (128,),
    "ls2.gamma": (128,),
}
SHAPES = {
    "cls_token": (1, 1, 128),
    "pos_embed": (1, 1370, 128),
    "mask_token": (1, 128),
    "patch_embed.proj.weight": (128, 3, 14, 14),
    "patch_embed.proj.bias": (128,),
    **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK_SHAPES.items()},
    "norm.weight": (128,),
    "norm.bias": (128,),
}


@pytest.fixture
def published():
    """Random arrays under their published names."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def test_official_file_becomes_a_workdir(published, run_command, tmp_path):
    safetensors.numpy.save_file(published, tmp_path / "dinov2.safetensors")
    out = run_command("convert", "dinov2", tmp_path / "dinov2.safetensors", tmp_path / "workdir")
    assert out == f"{tmp_path / 'workdir'}: {json.dumps(CONFIG.to_dict())}\n"
    _, params = published_files.restore(tmp_path / "workdir", "dinov2")
    kernel = params["patch_embed"]["kernel"]  # [14*14*3, D]
    assert kernel[(5 * 14 + 7) * 3 + 2, 9] == published["patch_embed.proj.weight"][9, 2, 5, 7]
    qkv = params["blocks"]["attn"]["qkv"]["kernel"]  # [L, D, 3, heads, head size]
    assert qkv.shape == (2, 128, 3, 2, 64)
    assert qkv[1, 5, 2, 1, 7] == published["blocks.1.attn.qkv.weight"][2 * 128 + 64 + 7, 5]
    np.testing.assert_array_equal(
        params["blocks"]["ls2"]["gamma"][1], published["blocks.1.ls2.gamma"]
    )
    np.testing.assert_array_equal(params["pos_embed"][:, 0], published["pos_embed"][:, 0])


def _write_transformers(published, directory, **changes):
    """Writes the arrays as transformers does."""
    tensors = {}
    for name, array in published.items():
        block = f"encoder.layer.{name.split('.')[1]}" if name.startswith("blocks.") else ""
        leaf = name.rpartition(".")[2]
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                tensors[f"{block}.attention.attention.{part}.{leaf}"] = rows
            continue
        for old, new in {
            "cls_token": "embeddings.cls_token",
            "mask_token": "embeddings.mask_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "blocks.": "encoder.layer.",
            "attn.proj": "attention.output.dense",
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
        }.items():
            name = name.replace(old, new)
        tensors[name if block else name.replace("norm.", "layernorm.")] = array
    config = dict(
        hidden_act="gelu",
        hidden_size=128,
        layer_norm_eps=1e-6,
        mlp_ratio=4,
        model_type="dinov2",
        num_attention_heads=2,
        patch_size=14,
        use_swiglu_ffn=False,
    )
    return published_files.write(directory, tensors, config | changes, "model.safetensors")


def test_transformers_directory_holds_the_same_arrays(published, tmp_path):
    tensors = convert.dinov2.read(_write_transformers(published, tmp_path / "hf"))
    assert tensors.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_arrays_without_a_published_name_are_listed(published, tmp_path):
    published["head.weight"] = np.zeros((10, 128), np.float32)
    with pytest.raises(ValueError, match=r"unexpected \(1\): head.weight \(10, 128\)"):
        convert.to_workdir(
            "dinov2", _write_transformers(published, tmp_path / "hf"), tmp_path / "workdir"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "dinov2_with_registers"},
            "model_type='dinov2_with_registers'; supported: di",
        ),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05; supported: 1e-06"),
        ({"num_attention_heads": 4}, r"hidden_size=128; supported: num_attention_heads \* 64, 256"),
    ],
)
def test_other_models_of_transformers_are_refused(published, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert.to_workdir(
            "dinov2",
            _write_transformers(published, tmp_path / "hf", **changes),
            tmp_path / "workdir",
        )


def test_transformers_directory_without_config_is_refused(published, tmp_path):
    directory = _write_transformers(published, tmp_path / "hf")
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*config.json: it must be .* that trans"):
        convert.to_workdir("dinov2", directory, tmp_path / "workdir")
    with pytest.raises(ValueError, match="To convert transformers' model, give the directory"):
        convert.to_workdir("dinov2", directory / "model.safetensors", tmp_path / "workdir")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("register_tokens", (1, 4, 128), r"register_tokens \(1, 4, 128\), but this model has none"),
        ("patch_embed.proj.weight", (128, 3, 16, 16), "patches of 16x16 pixels instead of 14x14"),
        ("patch_embed.proj.weight", (96, 3, 14, 14), "hidden_size=96, not a multiple of the head"),
        ("patch_embed.proj.weight", (128,), r"weight is \(128,\), not \[D, 3, 14, 14\]"),
        ("blocks.0.mlp.w12.weight", (512, 128), "a gated MLP, as ViT-g's"),
        ("pos_embed", (1, 1371, 128), r"pos_embed \(1, 1371, 128\) instead of \(1, 257, 128\)"),
        ("head.weight", (10, 128), r"unexpected \(1\): head.weight"),
        ("blocks.2.norm1.bias", (128,), r"missing \(13\): blocks.2.attn.proj.bias \(128,\)"),
    ],
)
def test_other_files_are_refused(published, name, shape, message, tmp_path):
    published[name] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "dinov2.npz", **published)
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dinov2", tmp_path / "dinov2.npz", tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_positions_are_interpolated_with_the_official_offset():
    """Between points of a ramp, at fraction s, the cubic errs by s (1 - s) (1 - 2 s) / 2."""
    ramp = np.zeros((1, 1 + 37 * 37, 2), np.float32)
    ramp[0, 1:] = np.stack(np.divmod(np.arange(37 * 37), 37), axis=-1)  # row, column
    ramp[0, 0] = 7
    positions = convert.dinov2.interpolate_positions(ramp, 16)
    assert positions.dtype == np.float32
    np.testing.assert_array_equal(positions[:, 0], 7)
    position = (np.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5  # away from the border
    s = position % 1
    expected = position + s * (1 - s) * (1 - 2 * s) / 2
    grid = positions[0, 1:].reshape(16, 16, 2)[1:15, 1:15]
    assert_close(grid[..., 0], np.tile(expected[:, None], (1, 14)), 1e-6)
    assert_close(grid[..., 1], np.tile(expected[None], (14, 1)), 1e-6)
    flat = np.full((1, 1 + 37 * 37, 2), 3, np.float32)  # the border repeats
    positions = convert.dinov2.interpolate_positions(flat, 16)
    assert_close(positions, np.full_like(positions, 3), 1e-6)


def test_positions_of_224_px_are_unchanged():
    positions = np.random.default_rng(0).standard_normal((1, 257, 8), np.float32)
    np.testing.assert_array_equal(convert.dinov2.interpolate_positions(positions, 16), positions)
