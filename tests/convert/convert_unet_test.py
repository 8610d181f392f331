"""The UNet of diffusers' files: names, layouts, sizes and process."""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from helpers import published_configs, published_files
from helpers.published_files import WEIGHTS

from configs import default
from dit_jax import convert, models, workdirs
from dit_jax.models import unet_presets

BLOCK_TYPES = published_configs.UNET["down_block_types"]


@pytest.fixture(scope="module")
def golden():
    """A recorded UNet2DConditionModel of diffusers: its arrays, inputs, and output, as NHWC."""
    with np.load(GOLDENS / "unet_tiny_reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    inputs = np.moveaxis(arrays["x_t"], 1, -1), arrays["t"], arrays["context"]
    return published_files.read_golden("unet"), inputs, np.moveaxis(arrays["out"], 1, -1)


@pytest.fixture(scope="module")
def published(golden):
    return golden[0]


@pytest.fixture
def diffusers_dir(published, tmp_path):
    """The recorded UNet as diffusers writes it."""
    return published_files.write(tmp_path / "unet", published, published_configs.UNET)


def test_output_is_the_recorded_one(golden, diffusers_dir):
    published, inputs, expected = golden
    config = convert.unet.read_model_config(diffusers_dir)
    params = convert.load("unet", published, config)
    out = jax.jit(models.build(config).apply)({"params": params}, *inputs)
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()


def test_diffusers_directory_becomes_a_workdir(diffusers_dir, published, tmp_path):
    config = convert.to_workdir("unet", diffusers_dir, tmp_path / "ours")
    saved = workdirs.load_config(tmp_path / "ours")
    assert saved.to_dict().keys() == default.get_config().to_dict().keys()
    assert saved.diffusion.to_dict() == default.get_config().diffusion.to_dict() | dict(
        schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    assert (saved.objective.prediction, saved.model.learn_sigma) == ("eps", False)
    assert (saved.latents.scale, saved.latents.source) == ([0.18215], "moments")
    assert saved.data.image_size == 64
    assert (saved.sample.sampler, saved.sample.grid) == ("ddim_level1", "leading")
    _, params = published_files.restore(tmp_path / "ours", "unet")
    expected = convert.load("unet", published, config.model)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_scheduler_beside_a_unet_gives_its_process(diffusers_dir, tmp_path):
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "num_train_timesteps": 500,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    config = convert.to_workdir("unet", diffusers_dir, tmp_path / "ours")
    assert config.diffusion.to_dict() == default.get_config().diffusion.to_dict() | dict(
        schedule="cosine", num_steps=500, zero_terminal_snr=True
    )
    assert (config.objective.prediction, config.sample.grid) == ("v", "uniform")
    assert config.sample.sampler == "ddim"


def test_weights_file_may_be_given_instead_of_its_directory(diffusers_dir, tmp_path):
    config = convert.to_workdir("unet", diffusers_dir / WEIGHTS, tmp_path / "ours")
    expected = convert.to_workdir("unet", diffusers_dir, tmp_path / "from_directory")
    assert config.to_dict() == expected.to_dict()
    workdirs_of_both = (tmp_path / "ours", tmp_path / "from_directory")
    params = (published_files.restore(workdir, "unet")[1] for workdir in workdirs_of_both)
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_axes_of_published_arrays(published, diffusers_dir):
    """Compares single entries; the recorded output shows that all are right."""
    config = convert.unet.read_model_config(diffusers_dir)
    params = convert.load("unet", published, config)
    block = params["mid_block"]["attentions_0"]["transformer_blocks_0"]
    name = "mid_block.attentions.0.transformer_blocks.0"
    key = published[f"{name}.attn2.to_k.weight"]  # [D, context_size], rows ordered (heads, size)
    assert block["attn2"]["to_k"]["kernel"].shape == (12, 2, 4)
    assert block["attn2"]["to_k"]["kernel"][5, 1, 3] == key[1 * 4 + 3, 5]
    gate_and_h = published[f"{name}.ff.net.0.proj.weight"]  # [8D, D], rows ordered (h or gate, 4D)
    assert block["ff"]["net_0_proj"]["kernel"][5, 1, 7] == gate_and_h[32 + 7, 5]
    kernel = params["down_blocks_0_downsamplers_0"]["conv"]["kernel"]  # [h, w, in, out]
    assert kernel[0, 2, 3, 1] == published["down_blocks.0.downsamplers.0.conv.weight"][1, 3, 0, 2]


def test_linear_projections_are_read_too(published, diffusers_dir):
    """Stable Diffusion 2 has Linears instead of convolutions of 1x1."""
    config = convert.unet.read_model_config(diffusers_dir)
    flat = {
        name: array[:, :, 0, 0] if name.endswith(("proj_in.weight", "proj_out.weight")) else array
        for name, array in published.items()
    }
    assert sum(flat[name].shape != published[name].shape for name in flat) == 8
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.load("unet", flat, config),
        convert.load("unet", published, config),
    )


def test_missing_and_unexpected_tensors_are_listed(published, diffusers_dir):
    config = convert.unet.read_model_config(diffusers_dir)
    renamed = dict(published)
    renamed["up_blocks.1.attentions.2.norm.bias"] = renamed.pop("time_embedding.linear_2.bias")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("unet", renamed, config)
    assert "missing (1): time_embedding.linear_2.bias (16,)" in str(error.value)
    assert "unexpected (1): up_blocks.1.attentions.2.norm.bias (16,)" in str(error.value)


def _read_model_config(directory, **changes):
    (directory / "config.json").write_text(json.dumps(published_configs.UNET | changes))
    return convert.unet.read_model_config(directory)


def test_configs_of_stable_diffusion_are_the_presets(diffusers_dir):
    """The fields are those in the files of Stable Diffusion 1 and 2."""
    sizes = dict(
        block_out_channels=[320, 640, 1280, 1280],
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=64,
    )
    version_1 = _read_model_config(
        diffusers_dir, **sizes, attention_head_dim=8, cross_attention_dim=768
    )
    version_2 = _read_model_config(
        diffusers_dir,
        **sizes,
        attention_head_dim=[5, 10, 20, 20],
        cross_attention_dim=1024,
        use_linear_projection=True,
        upcast_attention=True,
        dual_cross_attention=False,
        num_class_embeds=None,
        only_cross_attention=False,
        resnet_time_scale_shift="default",
    )
    for config, name in ((version_1, "sd15-unet"), (version_2, "sd2-unet")):
        assert config.to_dict().items() >= unet_presets.get(name).items()


def test_optional_fields_are_read_model_config(diffusers_dir):
    config = _read_model_config(
        diffusers_dir,
        block_out_channels=[4, 6],
        attention_head_dim=[2, 2],
        layers_per_block=[3, 3],
        out_channels=8,
        resnet_time_scale_shift="scale_shift",
        dropout=0.1,
    )
    assert (config.channel_mult, config.num_heads, config.head_dim) == ((1, 1.5), 2, 0)
    assert (config.blocks_per_level, config.learn_sigma, config.dropout) == (3, True, 0.1)
    assert config.time_scale_shift


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(class_embed_type="timestep"), r"class_embed_type='timestep'; supported: None"),
        (dict(addition_embed_type="text_time"), "addition_embed_type='text_time'; supported: None"),
        (dict(num_class_embeds=1000), "num_class_embeds=1000; supported: None"),
        (dict(only_cross_attention=[True, False]), r"only_cross_attention=\[True, False\]; supp"),
        (dict(conv_in_kernel=5), "conv_in_kernel=5; supported: 3"),
        (dict(freq_shift=1), "freq_shift=1; supported: 0"),
        (dict(in_channels=5), "out_channels=4; supported: in_channels, or twice that"),
        (dict(in_channels=9), "in_channels=9; supported: out_channels, without an inpainting UNet"),
        (dict(sample_size=[8, 16]), r"sample_size=\[8, 16\]; supported: a whole number"),
        (dict(sample_size=None), "sample_size=None; supported: a whole number above 0"),
        (dict(norm_eps=None), "norm_eps=None; supported: a number above 0"),
        (dict(norm_eps=0), "norm_eps=0; supported: a number above 0"),
        (dict(dropout="0.1"), r"dropout='0.1'; supported: a number in \[0, 1\)"),
        (dict(down_block_types=[["DownBlock2D"]] * 2), "supported: DownBlock2D or CrossAttnDown"),
        (dict(layers_per_block=[1, 2]), r"layers_per_block=\[1, 2\]; supported: a whole number"),
        (dict(attention_head_dim=[2, 3]), r"attention_head_dim=\[2, 3\]; supported: the same"),
        (dict(attention_head_dim=None), "attention_head_dim=None; supported: the same"),
        (
            dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"]),
            "down_block_types=.*; supported: DownBlock2D or CrossAttnDownBlock2D for each level",
        ),
        (
            dict(down_block_types=BLOCK_TYPES[:1]),
            "down_block_types=.*; supported: .* for each level",
        ),
        (
            dict(up_block_types=["UpBlock2D"] * 2),
            "up_block_types=.*; supported: down_block_types in reverse",
        ),
        (dict(block_out_channels=8), "block_out_channels=8; supported: a list of up to 8 numbers"),
        (dict(new_kind_of_norm=True), "new_kind_of_norm=True; supported: not this field"),
        (dict(_class_name="UNet2DModel"), "the class UNet2DModel, but only UNet2DCondition"),
    ],
    ids=str,
)
def test_unet_of_another_kind_is_refused(diffusers_dir, change, message):
    with pytest.raises(ValueError, match=message):
        _read_model_config(diffusers_dir, **change)


def test_whole_pipeline_is_refused_with_the_way_out(diffusers_dir):
    (diffusers_dir.parent / "model_index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"run `convert unet .*/unet DST`\. .* run `convert sd .* DST`\."
    ):
        convert.to_workdir("unet", diffusers_dir.parent, diffusers_dir.parent / "ours")
    (diffusers_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: it must be .* that diffusers"):
        convert.to_workdir("unet", diffusers_dir, diffusers_dir.parent / "ours")


def test_command_prints_the_workdir(diffusers_dir, tmp_path, run_command):
    out = run_command("convert", "unet", diffusers_dir, tmp_path / "ours")
    assert f"{tmp_path / 'ours'}: " in out
