"""Imports of one model from every file format in which diffusers and transformers save it."""

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from dit_jax import convert
from dit_jax.workdirs import checkpoint

FORMATS = {
    "whole": {},
    "shards": dict(max_shard_size="20KB"),
    "bin": dict(safe_serialization=False),
    "bin shards": dict(max_shard_size="20KB", safe_serialization=False),
}


def _vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def _unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )


def _dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        num_layers=12,
        sample_size=4,
        num_embeds_ada_norm=5,
        out_channels=8,
    )
    state = model.state_dict()
    for name in state:  # in a published model, every block has a copy of the embedders
        if ".norm1.emb." in name:
            state[name] = state["transformer_blocks.0." + name.split(".", 2)[2]].clone()
    model.load_state_dict(state)
    return model


def _dinov2():
    config = transformers.Dinov2Config(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=518,
        patch_size=14,
    )
    return transformers.Dinov2Model(config)


MODELS = {"vae": _vae, "unet": _unet, "dit": _dit, "dinov2": _dinov2}


@pytest.fixture
def saved(monkeypatch):
    """A list that receives the parameters of every workdir, which is not written."""
    saved = []
    monkeypatch.setattr(checkpoint, "save_params", lambda *args: saved.append(args[2]))
    return saved


@pytest.mark.parametrize("kind", MODELS)
def test_all_file_formats_give_the_same_parameters(kind, saved, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]()
    # transformers 5 writes safetensors alone.
    formats = {name: o for name, o in FORMATS.items() if kind != "dinov2" or "bin" not in name}
    for name, options in formats.items():
        if kind == "dit" and "shards" in name:
            options = options | dict(max_shard_size="20MB")
        model.save_pretrained(tmp_path / name, **options)
        suffix = "bin" if "bin" in name else "safetensors"
        weights = list((tmp_path / name).glob(f"*.{suffix}"))
        assert (len(weights) > 1) == ("shards" in name)
        convert.to_workdir(kind, tmp_path / name, tmp_path / "workdirs" / name)
    for params in saved[1:]:
        jax.tree.map(np.testing.assert_array_equal, params, saved[0])
    assert len(saved) == len(formats)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_models_saved_in_wrappers_give_the_same_parameters(suffix, saved, tmp_path):
    """Training code saves models in DataParallel, compiled, and as parts of other modules."""
    torch.manual_seed(0)
    model = _vae()
    wrapper = torch.nn.Module()
    wrapper.vae = torch.compile(torch.nn.DataParallel(model))
    for name, module in (("plain", model), ("wrapped", wrapper)):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "diffusion_pytorch_model.safetensors").unlink()
        path = tmp_path / name / f"diffusion_pytorch_model{suffix}"
        state = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        if suffix == ".bin":
            torch.save({"state_dict": state, "epoch": 3}, path)
        else:
            safetensors.torch.save_file(state, path)
        convert.to_workdir("vae", tmp_path / name, tmp_path / "workdirs" / name)
    assert any(key.startswith("vae._orig_mod.module.") for key in state)
    jax.tree.map(np.testing.assert_array_equal, *saved)
