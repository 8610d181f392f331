"""Counts of multiply-adds and parameters against papers, closed forms, and XLA's own counts."""

import json
import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import default
from dit_jax import models
from dit_jax.models import counts, unet_presets

# gmacs as the paper prints them, and the number of parameters with the position table.
PUBLISHED = {
    "DiT-S/8": (0.36, 33_148_160),
    "DiT-S/4": (1.41, 32_945_024),
    "DiT-S/2": (6.06, 32_963_360),
    "DiT-B/8": (1.42, 130_881_536),
    "DiT-B/4": (5.56, 130_475_648),
    "DiT-B/2": (23.01, 130_512_416),
    "DiT-L/8": (5.01, 458_594_816),
    "DiT-L/4": (19.70, 458_053_760),
    "DiT-L/2": (80.71, 458_102_816),
    "DiT-XL/8": (7.39, 675_683_072),
    "DiT-XL/4": (29.05, 675_074_432),
    "DiT-XL/2": (118.64, 675_129_632),
}
# gmacs and millions of parameters of DiT-XL/2 with each block, as the paper prints them.
BLOCKS = {
    "in-context": (119.37, 449),
    "cross-attention": (137.62, 598),
    "adaLN": (118.56, 600),
    "adaLN-Zero": (118.64, 675),
}


def _count(model_config):
    return models.count(ConfigDict({"model": model_config}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_paper_s(name):
    gmacs, params = PUBLISHED[name]
    actual = _count(counts.make_published_config(name))
    # Within 0.3%, or half a unit of the last printed digit, which for S/8 is 1.4%.
    assert actual["gmacs"] == pytest.approx(gmacs, rel=0.003, abs=0.005)
    assert actual["params_with_pos_embed"] == params
    assert actual["gflops"] == 2 * actual["gmacs"]
    assert actual["train_gflops_per_image"] == 3 * actual["gflops"]


@pytest.mark.parametrize("block", BLOCKS)
def test_counts_with_every_block_equal_the_paper_s(block):
    gmacs, params = BLOCKS[block]
    actual = _count(counts.make_published_config("DiT-XL/2", block=block))
    assert actual["gmacs"] == pytest.approx(gmacs, rel=0.003)
    # Within a unit of the last digit: the paper prints adaLN's 600.7 as 600.
    assert actual["params_with_pos_embed"] / 1e6 == pytest.approx(params, abs=1)
    assert actual["tokens"] == 256  # image tokens alone, also for in-context


def test_counts_at_512_pixels_equal_the_paper_s():
    actual = _count(counts.make_published_config("DiT-XL/2", image_size=512))
    assert actual["gmacs"] == pytest.approx(524.6, rel=0.003)
    assert actual["tokens"] == 1024


def test_inception_counts_equal_torchvision_s():
    actual = models.count(ConfigDict(dict(model=dict(name="inception", dtype="float32"))))
    assert actual["gmacs"] == pytest.approx(5.71, abs=0.005)  # torchvision's value for its v3
    # torchvision has 27,161,264 parameters, including an auxiliary head with 3,326,696. This
    # network has 1008 classes, not 1000, and no biases for them. It has one norm parameter for
    # each of 17,216 channels, not two.
    assert actual["params"] == 27_161_264 - 3_326_696 + 8 * 2048 - 1000 - 17_216
    assert actual["gflops"] == 2 * actual["gmacs"]


def test_count_of_adaln_zero_equals_its_closed_form():
    config = counts.make_published_config("DiT-B/4")
    d, depth, tokens, patch = 768, 12, 64, 4 * 4 * 4
    block = tokens * 12 * d**2 + 2 * tokens**2 * d + 6 * d**2  # projections; attention; modulation
    # The patch embedding and an output of twice the channels; the time embedding; final modulation.
    outside = tokens * (patch + 2 * patch) * d + (256 + d) * d + 2 * d**2
    assert _count(config)["gmacs"] == (depth * block + outside) / 1e9


@pytest.mark.parametrize(
    ("name", "block"),
    [
        *((name, "adaLN-Zero") for name in ("DiT-S/2", "DiT-B/4", "DiT-L/8", "DiT-XL/2")),
        *(("DiT-B/4", block) for block in ("in-context", "cross-attention", "adaLN")),
    ],
)
def test_count_equals_xla_s_for_the_unrolled_program(name, block):
    config = counts.make_published_config(name, block=block)
    config.scan_unroll = True
    model = models.build(config)
    lowered = _lower(model, *model.example_inputs())
    assert "while" not in lowered.as_text()  # XLA counts the body of a loop once
    xla_gflops = lowered.cost_analysis()["flops"] / 1e9
    assert xla_gflops == pytest.approx(_count(config)["gflops"], rel=0.01)


def _lower(model, *inputs, method=None):
    def apply(params, *inputs):
        return model.apply({"params": params}, *inputs, method=method)

    return jax.jit(apply).lower(models.param_shapes(model), *inputs)


@pytest.mark.parametrize("option", [dict(scan_unroll=True), dict(remat="full"), dict(remat="dots")])
def test_compilation_options_do_not_change_the_count(option):
    config = counts.make_published_config("DiT-S/8")
    expected = _count(config)
    config.update(option)
    assert _count(config) == expected


def test_count_includes_caption_tokens_and_a_trained_text_encoder():
    """A frozen encoder is not counted; its captions have CLIP's 77 tokens."""
    config = counts.make_published_config("DiT-S/8", block="cross-attention")
    config.update(condition="context", context_size=96)
    d, depth, width = 384, 12, 96
    frozen = _count(config)
    config.update(condition="tokens", text_length=77, text_depth=3)
    encoder = 77 * 3 * 12 * width**2 + 3 * 2 * 77**2 * width
    assert _count(config)["gmacs"] == pytest.approx(frozen["gmacs"] + encoder / 1e9, rel=1e-12)
    config.text_length = 100
    # Each further token costs its projection, keys and values, and attention from 16 image tokens.
    per_token = width * d + depth * (2 * d * d + 2 * 16 * d)
    encoder = 100 * 3 * 12 * width**2 + 3 * 2 * 100**2 * width
    expected = frozen["gmacs"] + ((100 - 77) * per_token + encoder) / 1e9
    assert _count(config)["gmacs"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(use_quant_conv=False, mid_attention=False),
        dict(block_channels=(64, 96, 128), layers_per_block=1, latent_channels=16),
    ],
    ids=str,
)
def test_vae_counts_equal_xla_s(change):
    """XLA omits products with padding: 1.3% for Stable Diffusion's encoder at 256 px."""
    config = default.get_config("vae")
    config.model.update(change)
    config.data.image_size = 256
    model, actual = models.build(config.model), models.count(config)
    if not change:
        assert actual["params"] == 83_653_863  # published
    size = 256 // model.factor
    for method, shape in (
        ("encode", (1, 256, 256, 3)),
        ("decode", (1, size, size, config.model.latent_channels)),
    ):
        lowered = _lower(model, jax.ShapeDtypeStruct(shape, jnp.float32), method=method)
        xla_gflops = lowered.cost_analysis()["flops"] / 1e9
        assert xla_gflops == pytest.approx(2 * actual[f"{method}_gmacs"], rel=0.015)
    assert actual["gflops"] == 2 * (actual["encode_gmacs"] + actual["decode_gmacs"])


UNET = dict(
    name="unet",
    input_size=32,
    in_channels=4,
    base_channels=256,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_levels=(1,),
    transformer_depth=0,
    num_heads=0,
    head_dim=64,
    context_size=0,
    time_scale_shift=True,
    resample="resnet",
    norm_groups=32,
    norm_epsilon=1e-5,
    dropout=0.0,
    condition="label",
    num_classes=10,
    null_condition=True,
    **unet_presets.UNUSED_TEXT_FIELDS,
    learn_sigma=True,
    dtype="float32",
    attention="xla",
    remat="none",
)
LATENT = dict(transformer_depth=2, context_size=96, time_scale_shift=False, resample="conv")
# Captions so long that the encoder's share is some per cent.
TOKENS = dict(condition="tokens", text_length=400, text_depth=1)


def _count_padding(jaxpr):
    """Returns the multiply-adds with padding in a program's convolutions, which are square."""
    padding = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                padding += _count_padding(value.jaxpr)
        if equation.primitive.name == "conv_general_dilated":
            before = equation.params["padding"][0][0]
            stride = equation.params["window_strides"][0]
            (_, size, _, _), (taps, _, channels, _) = (v.aval.shape for v in equation.invars)
            shape = equation.outvars[0].aval.shape
            inside = sum(
                0 <= stride * out + tap - before < size
                for out in range(shape[1])
                for tap in range(taps)
            )
            share = 1 - (inside / (shape[1] * taps)) ** 2
            padding += math.prod(shape) * taps**2 * channels * share
    return padding


@pytest.mark.parametrize(
    "change",
    [
        {},
        LATENT,
        pytest.param(
            LATENT | dict(condition="context", blocks_per_level=2, num_heads=4, head_dim=0),
            marks=pytest.mark.slow,
        ),
        LATENT | TOKENS,
        dict(resample="conv", num_classes=0, null_condition=False, channel_mult=(1, 1.5, 2)),
    ],
    ids=["adm", "label", "context", "tokens", "conv"],
)
def test_unet_counts_equal_xla_s_plus_products_with_padding(change):
    """XLA omits products with padding, which are some per cent at this size."""
    config = ConfigDict(UNET | change)
    model, actual = models.build(config), _count(config)
    inputs = list(model.example_inputs())
    if config.condition == "context":
        inputs[-1] = jnp.zeros((1, counts.CLIP_LENGTH, 96))
    lowered = _lower(model, *inputs)
    macs = 1e9 * actual["gmacs"]
    traced = jax.make_jaxpr(lambda params, *a: model.apply({"params": params}, *a))
    padding = _count_padding(traced(models.param_shapes(model), *inputs).jaxpr)
    assert 0.01 < padding / macs < 0.1
    xla_flops = lowered.cost_analysis()["flops"]
    assert xla_flops == pytest.approx(2 * (macs - padding), rel=0.01)


def test_counts_of_published_unets_equal_their_papers():
    """The DiT paper prints the gmacs of ADM and LDM-4."""
    rows = counts.count_names(["adm-imagenet256", "ldm4-imagenet256", "sd15-unet"])
    assert rows["adm-imagenet256"]["gmacs"] == pytest.approx(1120, abs=0.5)
    assert rows["ldm4-imagenet256"]["gmacs"] == pytest.approx(103.6, rel=0.01)
    assert rows["sd15-unet"]["params"] == 859_520_964
    row = rows["sd15-unet"]
    assert row["train_gflops_per_image"] == 3 * row["gflops"] == 6 * row["gmacs"]


def test_count_names_takes_dits_and_unets_but_options_for_dits_alone():
    assert [*counts.count_names([])][-1] == "unet-tiny"
    assert [*counts.count_names([], block="adaLN")][-1] == "DiT-XL/2"
    with pytest.raises(ValueError, match=r"unknown model 'XL/2'; the names are DiT-.*, sd15-unet"):
        counts.count_names(["XL/2"])
    for options in (dict(image_size=256), dict(block="adaLN")):
        with pytest.raises(ValueError, match=r"sd15-unet is a UNet of .* give --config"):
            counts.count_names(["DiT-S/2", "sd15-unet"], **options)


def test_unknown_block_is_refused():
    with pytest.raises(ValueError, match="unknown block='film'; choose one of in-context, "):
        _count(counts.make_published_config("DiT-S/8", block="film"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.depth=0", "model.depth=0 must be a whole number in 1"),
        ("batch_size=-1", "batch_size=-1 must be a whole number in 1"),
        (
            "model.mlp_ratio=0.001",
            "mlp_ratio=0.001 gives an MLP without channels for hidden_size=32",
        ),
        ("model.num_heads=3", "num_heads=3 must divide hidden_size=32"),
    ],
)
def test_flops_refuses_invalid_models(run_command, change, message):
    flags = ["--config", "configs/smoke.py", f"--config.{change}"]
    assert run_command("flops", *flags, fails=True).startswith(f"error: {message}")


@pytest.mark.parametrize("image_size", [250, 8, 0])
def test_image_sizes_that_are_no_multiple_of_the_patches_are_refused(image_size):
    with pytest.raises(ValueError, match=rf"image_size={image_size} must be a multiple of 16"):
        counts.make_published_config("DiT-XL/2", image_size)


@pytest.mark.slow
def test_flops_prints_a_named_model_a_config_or_the_whole_table(run_command):
    row = json.loads(run_command("flops", "DiT-XL/2", "--image_size", 256, "--json"))
    assert row["params_with_pos_embed"] == 675_129_632
    assert row.keys() == {
        "params",
        "params_with_pos_embed",
        "tokens",
        "gmacs",
        "gflops",
        "train_gflops_per_image",
    }
    in_context = run_command("flops", "DiT-XL/2", "--block", "in-context", "--json")
    assert json.loads(in_context)["params"] < 0.7 * row["params"]
    table = run_command("flops").splitlines()
    assert len(table) == 1 + 12 + len(unet_presets.PRESETS)
    assert table[12].split()[0] == "DiT-XL/2"
    assert table[-1].split()[:4] == ["unet-tiny", "702,753", "-", "-"]
    row = json.loads(run_command("flops", "--config", "configs/smoke.py", "--json"))
    assert row["tokens"] == 16
    row = run_command("flops", "--config", "configs/imagenet256.py:DiT-S/8").splitlines()[-1]
    assert row.split()[0] == "imagenet256.py:DiT-S/8"
    row = json.loads(run_command("flops", "--config", "configs/vae_digits.py", "--json"))
    assert row["params"] == 158_805
    error = run_command("flops", "DiT-S/2", "--config", "configs/smoke.py", fails=True)
    assert "give a model name or --config, not both: DiT-S/2" in error
    flags = ["--config", "configs/smoke.py", "--image_size", "512"]
    message = "--image_size is for a model name. With --config, set --config.model.input_size"
    assert message in run_command("flops", *flags, fails=True)
