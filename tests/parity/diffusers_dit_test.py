"""Our DiT beside diffusers', on the directories that it writes, with random weights."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from dit_jax import convert, sharding
from dit_jax.convert import exported
from dit_jax.workdirs import checkpoint

SIZES = {
    "S/8": dict(num_attention_heads=6, attention_head_dim=64, num_layers=12, patch_size=8),
    "B/4": dict(num_attention_heads=12, attention_head_dim=64, num_layers=12, patch_size=4),
    "XL/2 of 2 blocks": dict(
        num_attention_heads=16, attention_head_dim=72, num_layers=2, patch_size=2
    ),
}
# Diffusers has 10000^(-k/127) where the published model, and ours, has 10000^(-k/128).
STOCK, PUBLISHED = 1, 0
T = np.array([0, 17, 500, 999])
Y = np.array([0, 207, 999, 1000])  # 1000 is the null class of num_embeds_ada_norm=1000


def _reference(sizes, **changes):
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(out_channels=8, sample_size=32, **sizes, **changes)
    with torch.no_grad():
        for parameter in reference.parameters():  # so that no gate and no bias is 0
            parameter.add_(0.02 * torch.randn_like(parameter))
        first, *others = (block.norm1.emb for block in reference.transformer_blocks)
        for embedder in others:  # copies in a published model
            embedder.load_state_dict(first.state_dict())
    return reference.eval()


def _errors(reference, frequencies, model, params):
    """Of every t, the largest difference of the outputs over the largest value."""
    x_t = np.random.default_rng(0).normal(size=(len(T), 32, 32, 4)).astype(np.float32)
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = frequencies
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(x_t, -1, 1).copy())
        expected = reference(x, torch.from_numpy(T), class_labels=torch.from_numpy(Y)).sample
    expected = np.moveaxis(expected.numpy(), 1, -1)
    actual = np.asarray(jax.jit(lambda p, *x: model.apply({"params": p}, *x))(params, x_t, T, Y))
    assert actual.shape == expected.shape == (len(T), 32, 32, 8)
    largest = np.abs(expected).max(axis=(1, 2, 3))
    assert largest.min() > 1
    return np.abs(actual - expected).max(axis=(1, 2, 3)) / largest


def _load(workdir):
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    return checkpoint.load_model(workdir, mesh, "float32", "dit")


@pytest.mark.parametrize("name", SIZES)
def test_outputs_agree(name, tmp_path):
    reference = _reference(SIZES[name], norm_eps=1e-6)
    reference.save_pretrained(tmp_path / "theirs")
    convert.to_workdir("dit", tmp_path / "theirs", tmp_path / "ours")
    model, params = _load(tmp_path / "ours")
    errors = _errors(reference, PUBLISHED, model, params)
    print(f"{name}: {errors.max():.1e} of the largest value")
    assert errors.max() < 1e-5
    stock = _errors(reference, STOCK, model, params)
    print(f"{name}, diffusers' frequencies, t = {T}: {stock}")
    assert stock[0] < 1e-5  # at t = 0 frequencies do not matter


def test_norm_eps_of_diffusers_changes_little(tmp_path):
    reference = _reference(SIZES["S/8"])
    assert reference.config.norm_eps == 1e-5
    reference.save_pretrained(tmp_path / "theirs")
    convert.to_workdir("dit", tmp_path / "theirs", tmp_path / "ours")
    errors = _errors(reference, PUBLISHED, *_load(tmp_path / "ours"))
    print(f"norm_eps=1e-5: {errors.max():.1e} of the largest value")
    assert errors.max() < 2e-5


def test_through_the_published_names_and_back(tmp_path):
    """From files in several parts, and from the .safetensors of dit-export, all as from one."""
    reference = _reference(SIZES["S/8"])
    reference.save_pretrained(tmp_path / "theirs")
    reference.save_pretrained(tmp_path / "parts", max_shard_size="40MB")
    assert (tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    config = convert.to_workdir("dit", tmp_path / "theirs", tmp_path / "ours")
    convert.to_workdir("dit", tmp_path / "parts", tmp_path / "from_parts")
    exported.write(tmp_path / "ours", tmp_path / "dit.safetensors")
    again = convert.to_workdir("dit", tmp_path / "dit.safetensors", tmp_path / "again")
    config.latents.moments = ""  # names of places stay here
    assert again.to_dict() == json.loads(json.dumps(config.to_dict()))  # whose tuples are lists
    _, params = _load(tmp_path / "ours")
    for workdir in ("from_parts", "again"):
        jax.tree.map(np.testing.assert_array_equal, _load(tmp_path / workdir)[1], params)
