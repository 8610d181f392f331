"""DINOv2 against transformers', imported from files that it writes, with random weights."""

import jax
import numpy as np
import pytest
import torch
import transformers

from dit_jax import convert, models
from dit_jax.models import dinov2

TINY = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2)
VIT_B = dict(hidden_size=768, num_hidden_layers=2, num_attention_heads=12)


def _build_reference(sizes, image_size=224):
    """Builds a Dinov2Model with weights that give every part an effect on the features."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(image_size=image_size, **sizes)
    reference = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 2 and name.endswith("weight"):
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
            elif "projection.weight" in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:  # norms, biases, LayerScale, tokens, positions
                parameter.add_(0.5 * noise)
    return reference


def _extract(params, config, image):
    model = models.build(config)
    apply = jax.jit(lambda params, image: model.apply({"params": params}, image)["features"])
    return np.asarray(apply(params, image))


@pytest.mark.parametrize("sizes", [TINY, VIT_B], ids=["tiny", "vit-b"])
def test_features_agree_with_transformers(sizes, tmp_path):
    reference = _build_reference(sizes)
    reference.save_pretrained(tmp_path / "hf")
    config = convert.to_workdir("dinov2", tmp_path / "hf", tmp_path / "workdir").model
    assert config.num_heads == sizes["num_attention_heads"]
    params = convert.load("dinov2", convert.dinov2.read(tmp_path / "hf"), config)
    image = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    image[1, 60:] = 30
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (dinov2.MEAN, dinov2.STD))
    with torch.no_grad():
        expected = reference((pixels - mean) / std).pooler_output.numpy()
    actual = _extract(params, config, image)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"{sizes['hidden_size']}: {error:.1e} of the largest value")
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * np.abs(expected).max()
    assert error < 1e-4


def _to_official(reference):
    """Returns the same weights as a state dict of the official code's model."""
    state = reference.state_dict()
    official = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "mask_token": state["embeddings.mask_token"],
    }
    for leaf in ("weight", "bias"):
        official[f"patch_embed.proj.{leaf}"] = state[
            f"embeddings.patch_embeddings.projection.{leaf}"
        ]
        official[f"norm.{leaf}"] = state[f"layernorm.{leaf}"]
    for i in range(reference.config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        for leaf in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                official[f"{block}.{name}.{leaf}"] = state[f"{layer}.{name}.{leaf}"]
            qkv = [state[f"{layer}.attention.{part}_proj.{leaf}"] for part in "qkv"]
            official[f"{block}.attn.qkv.{leaf}"] = torch.cat(qkv)
            official[f"{block}.attn.proj.{leaf}"] = state[f"{layer}.attention.o_proj.{leaf}"]
        for name in ("1", "2"):
            official[f"{block}.ls{name}.gamma"] = state[f"{layer}.layer_scale{name}.lambda1"]
    return official


def test_official_file_gives_the_same_parameters_as_the_directory(tmp_path):
    reference = _build_reference(TINY, image_size=518)
    reference.save_pretrained(tmp_path / "hf")
    torch.save(_to_official(reference), tmp_path / "dinov2_pretrain.pth")
    sources = tmp_path / "hf", tmp_path / "dinov2_pretrain.pth"
    config, official_config = (
        convert.to_workdir("dinov2", source, tmp_path / f"workdir-{i}").model
        for i, source in enumerate(sources)
    )
    assert config == official_config
    a, b = (convert.load("dinov2", convert.dinov2.read(source), config) for source in sources)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a["pos_embed"].shape == (1, 257, 128)


def test_positions_agree_with_the_official_interpolation():
    positions = np.random.default_rng(0).standard_normal((1, 1 + 37 * 37, 32), np.float32)
    patches = torch.from_numpy(positions[:, 1:]).reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    official = torch.nn.functional.interpolate(
        patches, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False
    )
    expected = official.permute(0, 2, 3, 1).reshape(1, 256, 32).numpy()
    actual = convert.dinov2.interpolate_positions(positions, 16)[:, 1:]
    error = np.abs(actual - expected).max()
    print(f"{error:.1e} of positions of variance 1")
    assert error < 1e-5
