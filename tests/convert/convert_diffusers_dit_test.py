"""The DiT of diffusers' files: the published arrays under other names."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import published_configs, published_files, torch_format
from helpers.published_files import WEIGHTS

from configs import dit_xl_2_256_published
from dit_jax import convert
from dit_jax.convert import diffusers_dit


@pytest.fixture
def diffusers_dir(published, tmp_path):
    """The recorded DiT as diffusers writes it."""
    return published_files.write_dit(tmp_path / "transformer", published)


def test_diffusers_directory_gives_the_published_parameters(
    golden_model_config, golden_params, diffusers_dir, tmp_path
):
    config = convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    assert config.model.to_dict() == golden_model_config.to_dict()
    assert config.data.image_size == 64
    jax.tree.map(
        np.testing.assert_array_equal,
        published_files.restore(tmp_path / "ours", "dit")[1],
        golden_params,
    )


def test_weights_that_torch_wrote_are_read(golden_params, diffusers_dir, tmp_path):
    tensors = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    (diffusers_dir / WEIGHTS).unlink()
    torch_format.save(diffusers_dir / "diffusion_pytorch_model.bin", *torch_format.tensors(tensors))
    convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    jax.tree.map(
        np.testing.assert_array_equal,
        published_files.restore(tmp_path / "ours", "dit")[1],
        golden_params,
    )


def test_weights_in_several_files_are_joined(golden_params, diffusers_dir, tmp_path):
    tensors = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    (diffusers_dir / WEIGHTS).unlink()
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: array for name, array in tensors.items() if weight_map[name] == file}
        safetensors.numpy.save_file(part, diffusers_dir / file)
    (diffusers_dir / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    jax.tree.map(
        np.testing.assert_array_equal,
        published_files.restore(tmp_path / "ours", "dit")[1],
        golden_params,
    )
    (diffusers_dir / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*part-1\.safetensors"):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "again")


def test_blocks_with_different_embedders_are_refused(diffusers_dir, tmp_path):
    tensors = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    time = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2.bias"
    label = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    tensors[time.format(1)][3] += 1e-6
    tensors[label.format(2)][7, 0] = 0
    published_files.write(diffusers_dir, tensors, published_configs.DIT)
    message = f"2 of the blocks' embedders .* such as {time.format(1)}, {label.format(2)}: "
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_missing_tensors_of_diffusers_are_listed_under_its_names(diffusers_dir, tmp_path):
    tensors = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    tensors["transformer_blocks.3.attn1.to_k.bias"] = tensors.pop(
        "transformer_blocks.2.attn1.to_k.bias"
    )
    tensors["proj_out_2.bias"] = tensors["proj_out_2.bias"][:16]
    published_files.write(diffusers_dir, tensors, published_configs.DIT)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    assert "missing (1): transformer_blocks.2.attn1.to_k.bias (48,)" in str(error.value)
    assert "unexpected (1): transformer_blocks.3.attn1.to_k.bias (48,)" in str(error.value)
    assert "wrong shape (1): proj_out_2.bias (16,) instead of (32,)" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(_class_name="UNet2DModel"), "describes the class UNet2DModel, but only DiTTrans"),
        (dict(_class_name=None), "describes the class None, but"),
        (dict(norm_type="layer_norm"), "norm_type='layer_norm'; supported: ada_norm_zero"),
        (dict(activation_fn="geglu"), "activation_fn='geglu'; supported: gelu-approximate"),
        (dict(attention_bias=False), "attention_bias=False; supported: True"),
        (dict(upcast_attention=True), "upcast_attention=True; supported: False"),
        (dict(norm_elementwise_affine=True), "norm_elementwise_affine=True; supported: False"),
        (dict(norm_eps=1e-3), "norm_eps=0.001; supported: 1e-05, 1e-06"),
        (dict(out_channels=5), "out_channels=5; supported: None, in_channels, or twice"),
        (
            dict(num_layers=0, sample_size=[8, 8], patch_size=True),
            r"(?s)num_layers=0; supp.*sample_size=\[8, 8\]; supp.*patch_size=True; supported: a",
        ),
    ],
)
def test_diffusers_model_of_another_kind_is_refused(diffusers_dir, change, message):
    (diffusers_dir / "config.json").write_text(json.dumps(published_configs.DIT | change))
    with pytest.raises(ValueError, match=message):
        diffusers_dit.read_sizes(diffusers_dir)


def test_missing_fields_have_diffusers_defaults(diffusers_dir):
    old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    (diffusers_dir / "config.json").write_text(json.dumps(old | {"out_channels": 8}))
    published = dit_xl_2_256_published.get_config().model
    sizes = diffusers_dit.read_sizes(diffusers_dir)
    assert sizes == {name: published[name] for name in sizes}
    (diffusers_dir / "config.json").write_text(json.dumps(old | {"out_channels": None}))
    assert not diffusers_dit.read_sizes(diffusers_dir)["learn_sigma"]


def test_whole_pipeline_and_missing_files_are_refused_with_the_way_out(diffusers_dir, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"a complete pipeline\. .* run `convert dit .*/transformer DST`"
    ):
        convert.to_workdir("dit", tmp_path, tmp_path / "ours")
    (diffusers_dir / WEIGHTS).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"no {WEIGHTS} or .* in .*, where diffusers writes"
    ):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    (diffusers_dir / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"config\.json: it must be .* that diffusers writes"
    ):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
