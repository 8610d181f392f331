"""The DiT of published files: names, layouts, sizes, and the way back."""

import math

import jax
import numpy as np
import pytest
from helpers import published_files
from helpers.published_files import WEIGHTS

from configs import dit_xl_2_256_published
from dit_jax import convert, workdirs
from dit_jax.convert import exported, parameters
from dit_jax.models import dit
from dit_jax.workdirs import checkpoint


@pytest.fixture
def diffusers_dir(published, tmp_path):
    """The recorded DiT as diffusers writes it."""
    return published_files.write_dit(tmp_path / "transformer", published)


def test_axes_of_published_arrays(golden_params, published):
    """Compares single entries; the recorded output shows that all are right."""
    blocks = golden_params["blocks"]
    qkv = published["blocks.2.attn.qkv.weight"]  # [3D, D], rows ordered (3, heads, head size)
    assert blocks["attn"]["qkv"]["kernel"].shape == (3, 48, 3, 4, 12)
    assert blocks["attn"]["qkv"]["kernel"][2, 5, 2, 3, 7] == qkv[2 * 48 + 3 * 12 + 7, 5]
    patch = published["x_embedder.proj.weight"]  # [D, C, p, p]
    kernel = golden_params["x_embedder"]["kernel"]  # [p*p*C, D]
    assert kernel[(1 * 2 + 0) * 4 + 3, 9] == patch[9, 3, 1, 0]


def test_another_position_table_is_refused(golden_model_config, published):
    published["pos_embed"] = published["pos_embed"][:, ::-1]
    with pytest.raises(ValueError, match="pos_embed differs from the sin-cos table by"):
        convert.load("dit", published, golden_model_config)


def test_published_arrays_survive_a_round_trip(golden_model_config, golden_params, published):
    exported_tensors = convert.dit.to_published(golden_params, golden_model_config)
    assert exported_tensors.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(exported_tensors[name], array)
        assert exported_tensors[name].dtype == np.float32
        assert exported_tensors[name].flags.c_contiguous  # safetensors writes the buffer as it is
    restored = convert.load("dit", exported_tensors, golden_model_config)
    jax.tree.map(np.testing.assert_array_equal, restored, golden_params)


def test_sizes_are_inferred_from_the_published_arrays(monkeypatch, golden_model_config, published):
    monkeypatch.setitem(dit.SIZES, "tiny", (48, 3, 4))
    sizes = convert.dit.infer_sizes(published)
    assert sizes == {name: golden_model_config[name] for name in sizes}
    other_keys = {"name", "null_condition", "block", "dtype", "attention", "remat"}
    other_keys |= {"scan_unroll", "condition", "context_size"}
    other_keys |= {"text_vocab_size", "text_length", "text_depth", "text_num_heads"}
    assert golden_model_config.keys() - sizes.keys() == other_keys
    published["final_layer.linear.weight"] = published["final_layer.linear.weight"][:16]
    published["y_embedder.embedding_table.weight"] = np.zeros((1000, 48), np.float32)
    published["pos_embed"] = np.zeros((1, 64, 48), np.float32)
    published["blocks.0.mlp.fc1.weight"] = np.zeros((96, 48), np.float32)
    changed = dict(learn_sigma=False, num_classes=1000, null_condition=False)
    changed |= dict(input_size=16, mlp_ratio=2.0)
    assert convert.dit.infer_sizes(published) == sizes | changed


def test_sizes_of_published_xl_2_are_its_config_s():
    """The table also has the published number of parameters."""
    config = dit_xl_2_256_published.get_config()
    shapes = parameters.list_published(convert.dit.make_table(config.model))
    sample = {key: config.sample[key] for key in ("sampler", "steps", "cfg_scale", "cfg_channels")}
    assert sample == dict(sampler="ddpm", steps=250, cfg_scale=1.5, cfg_channels=3)
    assert sum(math.prod(shape) for shape in shapes.values()) == 675_129_632  # with pos_embed
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert {**config.model, **convert.dit.infer_sizes(tensors)} == dict(config.model)


def test_huge_position_table_is_refused(golden_model_config):
    config = golden_model_config.copy_and_resolve_references()
    config.input_size = 2**20
    message = "are 274,877,906,944 tokens. .* more than 67,108,864 numbers. Correct the sizes"
    with pytest.raises(ValueError, match=message):
        convert.dit.make_table(config)


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaLN"])
def test_other_blocks_have_no_published_names(
    golden_model_config, golden_params, diffusers_dir, published, tmp_path, block
):
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config, block=block)
    message = f"model.block='{block}' has no published names .* Only 'adaLN-Zero' can be converted"
    np.savez(tmp_path / "dit.npz", **published)
    for source in (diffusers_dir, tmp_path / "dit.npz"):
        with pytest.raises(ValueError, match=message):
            convert.to_workdir("dit", source, tmp_path / "ours", config=config)
    checkpoint.save_params(tmp_path / "run", config, golden_params)
    with pytest.raises(ValueError, match=message):
        exported.write(tmp_path / "run", tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=message):
        convert.dit.to_published(golden_params, config.model)
    assert not list(tmp_path.glob("*.safetensors"))


def test_models_conditioned_on_captions_have_no_published_names(workdir, tmp_path):
    config = workdirs.load_config(workdir)
    config.model.condition = "tokens"
    with pytest.raises(ValueError, match=r"model\.condition='tokens' has no published names"):
        convert.dit.make_table(config.model)
    workdirs.write_config(workdir, config)
    with pytest.raises(ValueError, match="Only 'label' can be converted"):
        exported.write(workdir, tmp_path / "dit.safetensors")


def test_published_file_needs_no_config(
    monkeypatch, golden_model_config, golden_params, published, tmp_path
):
    monkeypatch.setitem(dit.SIZES, "tiny", (48, 3, 4))
    np.savez(tmp_path / "dit.npz", **published)
    config = convert.to_workdir("dit", tmp_path / "dit.npz", tmp_path / "ours")
    assert config.model.to_dict() == golden_model_config.to_dict()
    assert workdirs.load_config(tmp_path / "ours").data.image_size == 64
    jax.tree.map(
        np.testing.assert_array_equal,
        published_files.restore(tmp_path / "ours", "dit")[1],
        golden_params,
    )


def test_sizes_of_a_given_config_must_fit_the_arrays(
    golden_model_config, diffusers_dir, published, tmp_path
):
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config)
    config.model.depth = 2
    np.savez(tmp_path / "dit.npz", **published)
    for source in (diffusers_dir, tmp_path / "dit.npz"):
        with pytest.raises(ValueError, match="does not fit the model") as error:
            convert.to_workdir("dit", source, tmp_path / "ours", config=config)
        assert "wrong shape (0)" in str(error.value)
        assert "blocks.2." in str(error.value)
    config.model.update(depth=3, num_heads=3)  # of the same shapes
    with pytest.raises(ValueError, match=r"has 4 heads, but --config has model\.num_heads=3"):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours", config=config)


def test_unknown_sizes_and_unknown_names_are_refused(published, diffusers_dir, tmp_path):
    np.savez(tmp_path / "dit.npz", **published)
    with pytest.raises(ValueError, match=r"hidden_size=48 and depth=3, .* Give --config"):
        convert.to_workdir("dit", tmp_path / "dit.npz", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"'x_embedder.proj.weight': 'missing'.* the directory"):
        convert.to_workdir("dit", diffusers_dir / WEIGHTS, tmp_path / "ours")
