"""The VAE of diffusers' files: names, sizes, and the workdir."""

import json

import jax
import numpy as np
import pytest
from helpers import published_configs, published_files
from helpers.published_files import WEIGHTS

from dit_jax import convert, models, workdirs
from dit_jax.workdirs import checkpoint


@pytest.fixture(scope="module")
def published():
    return published_files.read_golden("vae")


@pytest.fixture
def diffusers_dir(published, tmp_path):
    """The recorded VAE as diffusers writes it."""
    return published_files.write(tmp_path, published, published_configs.VAE)


@pytest.fixture
def model_config(diffusers_dir):
    return convert.vae.read_model_config(diffusers_dir)


def test_old_names_of_the_attention_are_read_too(published, model_config):
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, old_name in old_names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old_name}.")
        return name

    tensors = {rename(name): a for name, a in published.items()}
    assert len(tensors.keys() - published.keys()) == 16
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.load("vae", tensors, model_config),
        convert.load("vae", published, model_config),
    )


def test_missing_and_unexpected_tensors_are_listed(published, model_config):
    tensors = dict(published)
    tensors["encoder.mid_block.resnets.7.norm1.weight"] = tensors.pop("quant_conv.bias")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("vae", tensors, model_config)
    assert "missing (1): quant_conv.bias (4,)" in str(error.value)
    assert "unexpected (1): encoder.mid_block.resnets.7.norm1.weight (4,)" in str(error.value)


def test_config_defaults_are_stable_diffusion_s(model_config):
    assert (model_config.scale, model_config.shift, model_config.use_quant_conv) == (
        0.18215,
        0.0,
        True,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        {"use_post_quant_conv": False},
        {"out_channels": 4},
    ],
)
def test_vae_of_another_kind_is_refused(diffusers_dir, change):
    path = diffusers_dir / "config.json"
    path.write_text(json.dumps(published_configs.VAE | change))
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match="of another kind") as error:
        convert.vae.read_model_config(diffusers_dir)
    assert f"{name}={value!r}; supported: " in str(error.value)


@pytest.mark.parametrize(
    ("config_json", "message"),
    [
        (
            json.dumps(published_configs.VAE)[:50],
            r"cannot read .*config\.json: it ends too early: .* It must be the config",
        ),
        ("[1]", r"cannot read .*config\.json: "),
        ('{"_class_name": "AutoencoderTiny"}', "the class AutoencoderTiny, but only AutoencoderKL"),
        (
            json.dumps(
                {k: v for k, v in published_configs.VAE.items() if not k.endswith("_types")}
            ),
            "(?s)down_block_types=None; supported: .*up_block_types=None; supported: a list",
        ),
        (
            json.dumps(published_configs.VAE | dict(block_out_channels=128, norm_num_groups=0)),
            "(?s)norm_num_groups=0; supp.*block_out_channels=128; supported: a list",
        ),
        (
            json.dumps(published_configs.VAE | dict(latents_mean=[[0.0]])),
            "(?s)another kind.*latents_mean",
        ),
    ],
)
def test_damaged_config_and_other_classes_are_refused(diffusers_dir, config_json, message):
    path = diffusers_dir / "config.json"
    path.write_text(config_json)
    with pytest.raises(ValueError, match=message):
        convert.vae.read_model_config(diffusers_dir)


def test_tensor_under_an_old_and_a_new_name_is_refused(published, model_config):
    name = "encoder.mid_block.attentions.0.to_q.weight"
    tensors = published | {name.replace("to_q", "query"): -published[name]}
    with pytest.raises(ValueError, match=f"holds {name} under an old name too"):
        convert.load("vae", tensors, model_config)


def test_command_names_a_damaged_file(diffusers_dir, tmp_path, run_command):
    path = diffusers_dir / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    error = run_command("convert", "vae", diffusers_dir, tmp_path / "vae", fails=True)
    assert error.startswith(f"error: cannot read {path}: SafetensorError: ")
    assert "Traceback" not in error
    assert not (tmp_path / "vae").exists()


def test_converted_workdir_holds_the_parameters_and_the_config(
    diffusers_dir, published, model_config, tmp_path, run_command
):
    workdir = tmp_path / "vae"
    out = run_command("convert", "vae", diffusers_dir, workdir)
    assert f"{workdir}: " in out
    loaded = workdirs.load_config(workdir)
    assert loaded.model.to_dict() == model_config.to_dict() | {"block_channels": [8, 16]}
    shapes = models.param_shapes(models.build(loaded.model))
    params, step = checkpoint.restore_params(workdir, shapes)
    assert step == 0
    expected = convert.load("vae", published, model_config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(ValueError, match=r"vae is not empty: choose a new directory"):
        convert.to_workdir("vae", diffusers_dir, workdir)


def test_weights_without_their_config_are_refused(diffusers_dir, tmp_path):
    (diffusers_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: it must be .* that diffusers"):
        convert.to_workdir("vae", diffusers_dir, tmp_path / "vae")
