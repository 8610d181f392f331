"""The UNet against diffusers' UNet2DConditionModel and UNet2DModel, with random weights."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from dit_jax import convert, models
from dit_jax.models import unet_presets

T = np.array([0, 17, 500, 999])
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CONDITIONAL = {
    "small": dict(
        block_out_channels=(32, 48, 64),
        down_block_types=("DownBlock2D", DOWN, DOWN),
        up_block_types=(UP, UP, "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=24,
        resnet_time_scale_shift="scale_shift",
        out_channels=8,
        sample_size=16,
    ),
    "Stable Diffusion 1 with 2 levels": dict(
        block_out_channels=(320, 640),
        down_block_types=(DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", UP),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=768,
        sample_size=16,
    ),
    "Stable Diffusion 2 with 2 levels": dict(
        block_out_channels=(320, 640),
        down_block_types=(DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", UP),
        layers_per_block=1,
        attention_head_dim=(5, 10),
        cross_attention_dim=1024,
        use_linear_projection=True,
        sample_size=16,
    ),
}


def _perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():  # so that no scale is 1 and no bias 0
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def _assert_agrees(name, reference, config, params, cond, **reference_cond):
    size, channels = config.input_size, config.in_channels
    x_t = np.random.default_rng(0).normal(size=(len(T), size, size, channels)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(x_t, -1, 1).copy())
        expected = reference(x, torch.from_numpy(T), **reference_cond).sample
    expected = np.moveaxis(expected.numpy(), 1, -1)
    apply = jax.jit(models.build(config).apply)
    actual = np.asarray(apply({"params": params}, x_t, T.astype(np.float32), cond))
    assert actual.shape == expected.shape
    largest = np.abs(expected).max(axis=(1, 2, 3))
    errors = np.abs(actual - expected).max(axis=(1, 2, 3)) / largest
    print(f"{name}: {errors.max():.1e} of the largest value, {largest.min():.2g} at least")
    assert largest.min() > 0.1
    assert errors.max() < 1e-4


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_unet_agrees_with_diffusers(name, tmp_path):
    torch.manual_seed(0)
    reference = _perturb(diffusers.UNet2DConditionModel(**CONDITIONAL[name]))
    reference.save_pretrained(tmp_path)
    config = convert.unet.read_model_config(tmp_path)
    params = convert.load("unet", tmp_path, config)
    shape = (len(T), 77, config.context_size)
    context = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    reference_cond = dict(encoder_hidden_states=torch.from_numpy(context))
    _assert_agrees(name, reference, config, params, context, **reference_cond)


def test_sd15_preset_has_the_names_and_sizes_of_diffusers_default():
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    fields = dict(name="unet", **unet_presets.get("sd15-unet"))
    config = ConfigDict(fields | dict(dtype="float32", attention="auto", remat="none"))
    shapes = convert.parameters.get_shapes(config)
    actual = {
        convert.parameters.to_diffusers_name(path): np.prod(shape) for path, shape in shapes.items()
    }
    assert actual == {name: tensor.numel() for name, tensor in reference.state_dict().items()}


ADM = dict(
    name="unet",
    input_size=16,
    in_channels=3,
    base_channels=32,
    channel_mult=(1, 2),
    blocks_per_level=2,
    attention_levels=(1,),
    transformer_depth=0,
    num_heads=0,
    head_dim=16,
    context_size=0,
    time_scale_shift=True,
    resample="resnet",
    norm_groups=8,
    norm_epsilon=1e-5,
    dropout=0.0,
    condition="label",
    num_classes=10,
    null_condition=False,
    **unet_presets.UNUSED_TEXT_FIELDS,
    learn_sigma=True,
    dtype="float32",
    attention="auto",
    remat="none",
)


@pytest.mark.parametrize("is_adm", [True, False], ids=["ADM's", "DDPM's"])
def test_unet_without_transformers_agrees_with_diffusers(is_adm):
    torch.manual_seed(0)
    if is_adm:
        resample, time_scale_shift = "resnet", "scale_shift"
        down_block, up_block = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    else:
        resample, time_scale_shift = "conv", "default"
        down_block, up_block = "DownBlock2D", "UpBlock2D"
    reference = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=(down_block, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", up_block),
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift=time_scale_shift,
        attention_head_dim=16,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_class_embeds=10,
    )
    reference = _perturb(reference)
    config = ConfigDict(ADM | dict(resample=resample, time_scale_shift=is_adm))
    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    params = convert.load("unet", arrays, config)
    y = np.array([0, 9, 3, 3], np.int32)
    reference_cond = dict(class_labels=torch.from_numpy(y.astype(np.int64)))
    name = "ADM's" if is_adm else "DDPM's"
    _assert_agrees(name, reference, config, params, y, **reference_cond)
