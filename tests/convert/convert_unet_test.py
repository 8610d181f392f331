"""UNets from the files of others: diffusers', and ADM's against a forward pass in NumPy."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS
from helpers import published_configs
from helpers.adm_reference import CLASSES, GROUPS, HEAD_DIM, Published
from ml_collections import ConfigDict

from configs import adm as adm_config
from configs import default
from dit_jax import conditions, convert, models, sharding, workdirs
from dit_jax.convert import adm, parameters
from dit_jax.models import unet_presets
from dit_jax.sampling import generate, runs
from dit_jax.workdirs import checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = published_configs.UNET["down_block_types"]


@pytest.fixture(scope="module")
def golden():
    """A tiny UNet2DConditionModel of diffusers: its parameters, inputs and output, as NHWC."""
    with np.load(GOLDENS / "unet_tiny_reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    published = {n.removeprefix("w/"): a for n, a in arrays.items() if n.startswith("w/")}
    inputs = np.moveaxis(arrays["x_t"], 1, -1), arrays["t"], arrays["context"]
    return published, inputs, np.moveaxis(arrays["out"], 1, -1)


@pytest.fixture(scope="module")
def published(golden):
    return golden[0]


@pytest.fixture
def diffusers_dir(published, tmp_path):
    """The files that diffusers writes."""
    directory = tmp_path / "unet"
    directory.mkdir()
    safetensors.numpy.save_file(published, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(published_configs.UNET))
    return directory


def _restore(workdir):
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    return checkpoint.load_model(workdir, mesh, "float32", "unet")


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
    _, params = _restore(tmp_path / "ours")
    expected = convert.load("unet", published, config.model)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_scheduler_beside_a_unet_tells_its_process(diffusers_dir, tmp_path):
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


def test_the_weights_may_be_given_themselves(diffusers_dir, tmp_path):
    config = convert.to_workdir("unet", diffusers_dir / WEIGHTS, tmp_path / "ours")
    expected = convert.to_workdir("unet", diffusers_dir, tmp_path / "of_folder")
    assert config.to_dict() == expected.to_dict()
    one, two = (_restore(tmp_path / name)[1] for name in ("ours", "of_folder"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_axes_of_the_published_arrays(published, diffusers_dir):
    """Spot checks, entry by entry; that the whole is right the recorded output shows."""
    config = convert.unet.read_model_config(diffusers_dir)
    params = convert.load("unet", published, config)
    block = params["mid_block"]["attentions_0"]["transformer_blocks_0"]
    name = "mid_block.attentions.0.transformer_blocks.0"
    query = published[f"{name}.attn2.to_k.weight"]  # [D, context_size], rows ordered (heads, size)
    assert block["attn2"]["to_k"]["kernel"].shape == (12, 2, 4)
    assert block["attn2"]["to_k"]["kernel"][5, 1, 3] == query[1 * 4 + 3, 5]
    both = published[f"{name}.ff.net.0.proj.weight"]  # [8D, D], rows ordered (h or gate, 4D)
    assert block["ff"]["net_0_proj"]["kernel"][5, 1, 7] == both[32 + 7, 5]
    kernel = params["down_blocks_0_downsamplers_0"]["conv"]["kernel"]  # [h, w, in, out]
    assert kernel[0, 2, 3, 1] == published["down_blocks.0.downsamplers.0.conv.weight"][1, 3, 0, 2]


def test_linear_projections_are_read_too(published, diffusers_dir):
    """As Stable Diffusion 2 has them, not convolutions of 1x1."""
    config = convert.unet.read_model_config(diffusers_dir)
    flat = {
        n: a[:, :, 0, 0] if n.endswith(("proj_in.weight", "proj_out.weight")) else a
        for n, a in published.items()
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


def _read(directory, **changes):
    (directory / "config.json").write_text(json.dumps(published_configs.UNET | changes))
    return convert.unet.read_model_config(directory)


def test_configs_of_stable_diffusion_are_the_presets(diffusers_dir):
    """Of its versions 1 and 2, with what their files say."""
    sizes = dict(
        block_out_channels=[320, 640, 1280, 1280],
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=64,
    )
    first = _read(diffusers_dir, **sizes, attention_head_dim=8, cross_attention_dim=768)
    second = _read(
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
    for config, name in ((first, "sd15-unet"), (second, "sd2-unet")):
        assert config.to_dict().items() >= unet_presets.get(name).items()


def test_configs_may_say_more(diffusers_dir):
    config = _read(
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
        (dict(down_block_types=BLOCKS[:1]), "down_block_types=.*; supported: .* for each level"),
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
        _read(diffusers_dir, **change)


def test_whole_pipeline_is_refused_with_the_way_out(diffusers_dir):
    (diffusers_dir.parent / "model_index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"run `convert unet .*/unet DST`\. .* run `convert sd .* DST`\."
    ):
        convert.to_workdir("unet", diffusers_dir.parent, diffusers_dir.parent / "ours")
    (diffusers_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: it must be .* that diffusers"):
        convert.to_workdir("unet", diffusers_dir, diffusers_dir.parent / "ours")


ADM = dict(
    name="unet",
    input_size=8,
    in_channels=3,
    base_channels=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_levels=(1,),
    transformer_depth=0,
    num_heads=0,
    head_dim=HEAD_DIM,
    context_size=0,
    time_scale_shift=True,
    resample="resnet",
    norm_groups=GROUPS,
    norm_epsilon=1e-5,
    dropout=0.0,
    condition="label",
    num_classes=CLASSES,
    null_condition=False,
    **unet_presets.UNUSED_TEXT_FIELDS,
    learn_sigma=True,
)
RUNTIME = dict(dtype="float32", attention="auto", remat="none")


def _inputs():
    rng = np.random.default_rng(1)
    x_t = rng.standard_normal((3, 8, 8, 3)).astype(np.float32)
    return x_t, np.array([0.0, 250.0, 999.0], np.float32), np.array([0, 4, 2], np.int32)


def _published(new_attention_order, **changes):
    """(model, its output [B, h, w, C]); the arrays are in model.weights."""
    model = Published(ADM | changes, new_attention_order)
    x_t, t, y = _inputs()
    return model, np.moveaxis(model(np.moveaxis(x_t, -1, 1).astype(np.float64), t, y), 1, -1)


@pytest.mark.parametrize(
    ("new_attention_order", "changes"),
    [
        pytest.param(False, {}, id="published"),
        pytest.param(
            *(True, dict(resample="conv", time_scale_shift=False)),
            marks=pytest.mark.slow,
            id="other-options",
        ),
    ],
)
def test_adm_is_the_published_function(new_attention_order, changes, tmp_path):
    reference, expected = _published(new_attention_order, **changes)
    np.savez(tmp_path / "adm.npz", **reference.weights)
    config = default.get_config()
    with config.unlocked():
        config.model = ConfigDict(ADM | RUNTIME | changes)
    options = dict(config=config, new_attention_order=new_attention_order)
    convert.to_workdir("adm", tmp_path / "adm.npz", tmp_path / "ours", **options)
    model, params = _restore(tmp_path / "ours")
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    out = apply(params, *_inputs())
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()
    other = adm.to_params(reference.weights, config.model, not new_attention_order)
    assert np.abs(apply(other, *_inputs()) - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.fixture
def tiny_presets(monkeypatch):
    """A published model of each order, which differ in size."""
    monkeypatch.setattr(
        unet_presets, "PRESETS", {"old": dict(ADM, num_classes=9), "new": ADM, "other": dict(ADM)}
    )
    for fields in unet_presets.PRESETS.values():
        fields.pop("name", None)
    orders = {
        "old": dict(schedule="linear", new_attention_order=False),
        "new": dict(schedule="cosine", new_attention_order=True),
    }
    monkeypatch.setattr(adm, "CHECKPOINTS", orders)


def test_published_adm_needs_no_config(tiny_presets, tmp_path):
    reference, _ = _published(True)
    np.savez(tmp_path / "adm.npz", **reference.weights)
    config = convert.to_workdir("adm", tmp_path / "adm.npz", tmp_path / "ours")
    assert config.diffusion.schedule == "cosine"
    assert (config.latents.source, config.data.image_size) == ("pixels", 8)
    _, params = _restore(tmp_path / "ours")
    jax.tree.map(
        np.testing.assert_array_equal, params, adm.to_params(reference.weights, config.model, True)
    )
    reference.weights["middle_block.3.bias"] = reference.weights.pop("out.2.bias")
    with pytest.raises(ValueError, match=r"match none of old, new\. Give a --config"):
        adm.match_preset(reference.weights)
    with pytest.raises(ValueError, match=r"missing \(1\): out.2.bias") as error:
        adm.to_params(reference.weights, config.model)
    assert "unexpected (1): middle_block.3.bias (6,)" in str(error.value)


@pytest.mark.slow
def test_converted_adm_draws_images(tiny_presets, tmp_path):
    np.savez(tmp_path / "adm.npz", **_published(True)[0].weights)
    convert.to_workdir("adm", tmp_path / "adm.npz", tmp_path / "ours")
    trained = runs.load(tmp_path / "ours", settings=dict(steps=2))
    sample = trained.make_sample_fn()
    images, others = (
        generate.generate(
            sample, trained.params, expected_message, 0, trained.mesh, trained.to_image
        )
        for expected_message in (
            conditions.from_labels(labels, CLASSES) for labels in ([0, 4], [2, 4])
        )
    )
    assert images.shape == (2, 8, 8, 3)
    assert np.any(images[0] != others[0])
    np.testing.assert_array_equal(images[1], others[1])


def test_transformers_and_other_models_are_no_adm(tmp_path):
    fields = ADM | RUNTIME | dict(transformer_depth=1, context_size=8)
    with pytest.raises(ValueError, match=r"transformer_depth=1: .* `convert unet`"):
        adm.make_table(ConfigDict(fields))
    np.savez(tmp_path / "adm.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match=r"--config has model\.name='dit', but ADM is a 'unet'"):
        convert.to_workdir(
            "adm", tmp_path / "adm.npz", tmp_path / "ours", config=default.get_config()
        )


@pytest.mark.slow
def test_orders_and_schedules_of_the_published_models():
    """As their commands say; the larger one's is the older order."""
    assert adm.CHECKPOINTS.keys() == {
        name for name in unet_presets.PRESETS if name.startswith("adm-")
    }
    orders = {name: entry["new_attention_order"] for name, entry in adm.CHECKPOINTS.items()}
    assert orders == {"adm-imagenet64": True, "adm-imagenet256": False}
    schedules = {name: entry["schedule"] for name, entry in adm.CHECKPOINTS.items()}
    assert schedules == {"adm-imagenet64": "cosine", "adm-imagenet256": "linear"}
    for name, schedule in schedules.items():
        config = adm_config.get_config(name.removeprefix("adm-"))
        assert config.diffusion.schedule == schedule
        assert config.sample.clip_x_0
    for name in adm.CHECKPOINTS:
        shapes = parameters.list_published(adm.make_table(adm.get_model_config(name)))
        actual = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
        assert adm.match_preset(actual) == name
    assert models.build(adm.get_model_config("adm-imagenet64")).input_size == 64


def test_commands(diffusers_dir, tmp_path, run_command):
    out = run_command("convert", "unet", diffusers_dir, tmp_path / "ours")
    assert f"{tmp_path / 'ours'}: " in out
    error = run_command("convert", "adm", "a.pt", "b", "--new_attention_order", fails=True)
    assert "--new_attention_order needs --config" in error
