"""DiT against diffusers', imported from the directories that it writes, with random weights."""

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
    "XL/2 with 2 blocks": dict(
        num_attention_heads=16, attention_head_dim=72, num_layers=2, patch_size=2
    ),
}
# downscale_freq_shift: diffusers' 1 gives the time frequencies 10000^(-k/127). With 0 they are
# 10000^(-k/128), as in the published model and in dit_jax.
DIFFUSERS_SHIFT, PUBLISHED_SHIFT = 1, 0
T = np.array([0, 17, 500, 999])
Y = np.array([0, 207, 999, 1000])  # 1000 is the null class of num_embeds_ada_norm=1000


def _build_reference(sizes, **changes):
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(out_channels=8, sample_size=32, **sizes, **changes)
    with torch.no_grad():
        for parameter in reference.parameters():  # so that no gate and no bias is 0
            parameter.add_(0.02 * torch.randn_like(parameter))
        # In a published model, the embedders of all blocks are copies of one.
        first_embedder, *embedders = (block.norm1.emb for block in reference.transformer_blocks)
        for embedder in embedders:
            embedder.load_state_dict(first_embedder.state_dict())
    return reference.eval()


def _compute_errors(reference, frequency_shift, model, params):
    """Returns the largest difference of the outputs for each t, relative to the largest value."""
    x_t = np.random.default_rng(0).normal(size=(len(T), 32, 32, 4)).astype(np.float32)
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift
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
def test_outputs_agree_with_diffusers(name, tmp_path):
    reference = _build_reference(SIZES[name], norm_eps=1e-6)
    reference.save_pretrained(tmp_path / "diffusers")
    convert.to_workdir("dit", tmp_path / "diffusers", tmp_path / "workdir")
    model, params = _load(tmp_path / "workdir")
    errors = _compute_errors(reference, PUBLISHED_SHIFT, model, params)
    print(f"{name}: {errors.max():.1e} of the largest value")
    assert errors.max() < 1e-5
    errors = _compute_errors(reference, DIFFUSERS_SHIFT, model, params)
    print(f"{name}, diffusers' frequencies, t = {T}: {errors}")
    assert errors[0] < 1e-5  # at t = 0 the frequencies have no effect


def test_outputs_agree_also_with_the_default_norm_eps_of_diffusers(tmp_path):
    reference = _build_reference(SIZES["S/8"])
    assert reference.config.norm_eps == 1e-5
    reference.save_pretrained(tmp_path / "diffusers")
    convert.to_workdir("dit", tmp_path / "diffusers", tmp_path / "workdir")
    errors = _compute_errors(reference, PUBLISHED_SHIFT, *_load(tmp_path / "workdir"))
    print(f"norm_eps=1e-5: {errors.max():.1e} of the largest value")
    assert errors.max() < 2e-5


def test_sharded_files_and_exported_files_give_the_same_parameters(tmp_path):
    """The exported file has the published names, with which it is imported again."""
    reference = _build_reference(SIZES["S/8"])
    reference.save_pretrained(tmp_path / "diffusers")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="40MB")
    assert (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    config = convert.to_workdir("dit", tmp_path / "diffusers", tmp_path / "workdir")
    convert.to_workdir("dit", tmp_path / "shards", tmp_path / "from_shards")
    exported.write(tmp_path / "workdir", tmp_path / "dit.safetensors")
    reimported = convert.to_workdir("dit", tmp_path / "dit.safetensors", tmp_path / "reimported")
    config.latents.moments = ""  # an export leaves out paths
    # Through JSON, tuples become lists.
    assert reimported.to_dict() == json.loads(json.dumps(config.to_dict()))
    _, params = _load(tmp_path / "workdir")
    for workdir in ("from_shards", "reimported"):
        jax.tree.map(np.testing.assert_array_equal, _load(tmp_path / workdir)[1], params)
