"""Counts against the published table and against XLA's own."""

import json
import math

import flax.traverse_util
import jax
import jax.extend
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import default, smoke
from dit_jax import models
from dit_jax.models import counts, unet

# gmacs as printed in the paper, parameters with the position table.
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
# Of the blocks at XL/2: gmacs and millions of parameters as printed.
BLOCKS = {
    "in-context": (119.37, 449),
    "cross-attention": (137.62, 598),
    "adaLN": (118.56, 600),
    "adaLN-Zero": (118.64, 675),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    gmacs, params = PUBLISHED[name]
    found = counts.of_dit(counts.published_config(name))
    # 0.3%, or half a unit of the last digit printed, which for S/8 is 1.4%.
    assert found["gmacs"] == pytest.approx(gmacs, rel=0.003, abs=0.005)
    assert found["params_with_pos_embed"] == params
    assert found["gflops"] == 2 * found["gmacs"]
    assert found["train_gflops_per_image"] == 3 * found["gflops"]


@pytest.mark.parametrize("block", BLOCKS)
def test_counts_of_the_blocks_are_the_published_ones(block):
    gmacs, params = BLOCKS[block]
    found = counts.of_dit(counts.published_config("DiT-XL/2", block=block))
    assert found["gmacs"] == pytest.approx(gmacs, rel=0.003)
    # A unit of the last digit: adaLN's 600.7 is printed as 600.
    assert found["params_with_pos_embed"] / 1e6 == pytest.approx(params, abs=1)
    assert found["tokens"] == 256  # of the image


def test_counts_at_512_pixels():
    found = counts.of_dit(counts.published_config("DiT-XL/2", image_size=512))
    assert found["gmacs"] == pytest.approx(524.6, rel=0.003)
    assert found["tokens"] == 1024


def test_count_of_inception_is_the_published_one():
    found = models.count(ConfigDict(dict(model=dict(name="inception", dtype="float32"))))
    assert found["gmacs"] == pytest.approx(5.71, abs=0.005)  # as torchvision prints for its v3
    # torchvision's 27,161,264 without the 3,326,696 of its auxiliary head, with 1008 classes for
    # 1000 and no bias of theirs, and one number for each of the 17,216 channels' norms, not two.
    assert found["params"] == 27_161_264 - 3_326_696 + 8 * 2048 - 1000 - 17_216
    assert found["gflops"] == 2 * found["gmacs"]


def _model_config(name, block="adaLN-Zero"):
    config = smoke.get_config().model
    config.unlock()
    config.update(counts.published_config(name, block=block), scan_unroll=True)
    return config


@pytest.mark.parametrize(
    ("name", "block"), [("DiT-S/8", "adaLN-Zero"), *(("DiT-XL/2", block) for block in BLOCKS)]
)
def test_parameters_are_those_of_the_module(name, block):
    config = _model_config(name, block)
    model = models.build(config)
    shapes = models.param_shapes(model)
    leaves = flax.traverse_util.flatten_dict(shapes).values()
    assert sum(leaf.size for leaf in leaves) == counts.of_dit(config)["params"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        *((name, "adaLN-Zero") for name in ("DiT-S/2", "DiT-B/4", "DiT-L/8", "DiT-XL/2")),
        *(("DiT-B/4", block) for block in ("in-context", "cross-attention", "adaLN")),
    ],
)
def test_formula_is_xla_s_count_of_the_unrolled_program(name, block):
    config = _model_config(name, block)
    model = models.build(config)
    params = models.param_shapes(model)
    size = config.input_size
    inputs = (
        jax.ShapeDtypeStruct((1, size, size, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    lowered = jax.jit(lambda p, *a: model.apply({"params": p}, *a)).lower(params, *inputs)
    assert "while" not in lowered.as_text()  # XLA counts the body of a loop once
    xla_gflops = lowered.cost_analysis()["flops"] / 1e9
    assert xla_gflops == pytest.approx(counts.of_dit(config)["gflops"], rel=0.01)


@pytest.mark.parametrize("block", BLOCKS)
def test_counts_of_a_dit_of_captions_are_the_module_s_and_its_program_s(block):
    """With the encoder that is trained along; of a frozen one CLIP's 77 tokens."""
    config = _model_config("DiT-S/8", block)
    config.update(condition="tokens", context_size=96, text_length=100, text_depth=3)
    model = models.build(config)
    params = models.param_shapes(model)

    def check(shape, dtype):
        found = counts.of_dit(config)
        inputs = [((1, 32, 32, 4), jnp.float32), ((1,), jnp.float32), (shape, dtype)]
        inputs = [jax.ShapeDtypeStruct(*shape_and_dtype) for shape_and_dtype in inputs]
        traced = jax.jit(lambda p, *a: model.apply({"params": p}, *a)).trace(params, *inputs)
        macs, _ = _products(traced.jaxpr.jaxpr)
        assert macs == pytest.approx(1e9 * found["gmacs"], rel=1e-9)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == found["params"]

    check((1, 100), jnp.int32)
    config.condition = "context"
    model = models.build(config)
    params = models.param_shapes(model)
    check((1, counts.CLIP_LENGTH, 96), jnp.float32)


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(use_quant_conv=False, mid_attention=False),
        dict(block_channels=(64, 96, 128), layers_per_block=1, latent_channels=16),
    ],
    ids=str,
)
def test_counts_of_a_vae_are_the_module_s_and_xla_s(change):
    """XLA leaves out products with the padding: 1.3% of Stable Diffusion's encoder at 256 px."""
    config = default.get_config("vae").model
    config.update(change)
    model = models.build(config)
    found = counts.of_vae(config, 256)
    params = models.param_shapes(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == found["params"]
    if not change:
        assert found["params"] == 83_653_863  # published
    size = 256 // model.factor
    for method, shape in (
        ("encode", (1, 256, 256, 3)),
        ("decode", (1, size, size, config.latent_channels)),
    ):
        apply = jax.jit(lambda p, x, m=method: model.apply({"params": p}, x, method=m))
        lowered = apply.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32))
        xla_gflops = lowered.cost_analysis()["flops"] / 1e9
        assert xla_gflops == pytest.approx(2 * found[f"{method}_gmacs"], rel=0.015)


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
    class_dropout_prob=0.1,
    **unet.NO_TOKENS,
    learn_sigma=True,
    dtype="float32",
    attention="xla",
    remat="none",
)
LATENT = dict(transformer_depth=2, context_size=96, time_scale_shift=False, resample="conv")
# So many words that the encoder's share is some per cent.
TOKENS = dict(condition="tokens", text_length=400, text_depth=1)


def _products(jaxpr):
    """(multiply-adds of a program, those of its convolutions with their padding)."""
    macs = padding = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                inner = _products(value.jaxpr)
                macs, padding = macs + times * inner[0], padding + times * inner[1]
        shapes = [v.aval.shape for v in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            macs += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            taps, _, channels, _ = shapes[1]
            macs += outputs * taps**2 * channels
            stride, before = equation.params["window_strides"][0], equation.params["padding"][0][0]
            size, outs = shapes[0][1], equation.outvars[0].aval.shape[1]
            inside = sum(
                0 <= stride * out + tap - before < size
                for out in range(outs)
                for tap in range(taps)
            )
            padding += outputs * taps**2 * channels * (1 - (inside / (outs * taps)) ** 2)
    return macs, padding


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
        pytest.param(LATENT | TOKENS | dict(text_depth=3), marks=pytest.mark.slow),
        dict(resample="conv", num_classes=0, class_dropout_prob=0.0, channel_mult=(1, 1.5, 2)),
    ],
    ids=["adm", "label", "context", "tokens", "3 blocks of text", "conv"],
)
def test_counts_of_a_unet_are_the_module_s_and_xla_s(change):
    """Of captions with the encoder that is trained along."""
    config = ConfigDict(UNET | change)
    model = models.build(config)
    params = models.param_shapes(model)
    tokens = 20
    found = counts.of_unet(config, context_tokens=tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == found["params"]
    cond = {
        "label": ((1,), jnp.int32),
        "tokens": ((1, config.text_length), jnp.int32),
        "context": ((1, tokens, 96), jnp.float32),
    }[config.condition]
    inputs = [((1, 32, 32, 4), jnp.float32), ((1,), jnp.float32), cond]
    inputs = [jax.ShapeDtypeStruct(*shape_and_dtype) for shape_and_dtype in inputs]
    traced = jax.jit(lambda p, *a: model.apply({"params": p}, *a)).trace(params, *inputs)
    macs, padding = _products(traced.jaxpr.jaxpr)
    assert macs == pytest.approx(1e9 * found["gmacs"], rel=1e-9)
    # XLA leaves products with the padding out, some per cent at this size.
    assert 0.01 < padding / macs < 0.1
    if config.condition == "tokens" and config.text_depth > 1:
        return  # XLA counts the body of a loop once
    xla_flops = traced.lower().cost_analysis()["flops"]
    assert xla_flops == pytest.approx(2 * (macs - padding), rel=0.01)


def test_counts_of_published_unets():
    """ADM's and LDM-4's gmacs are those that the DiT paper prints."""
    rows = counts.count_names(["adm-imagenet256", "ldm4-imagenet256", "sd15-unet"])
    assert rows["adm-imagenet256"]["gmacs"] == pytest.approx(1120, abs=0.5)
    assert rows["ldm4-imagenet256"]["gmacs"] == pytest.approx(103.6, rel=0.01)
    assert rows["sd15-unet"]["params"] == 859_520_964
    row = rows["sd15-unet"]
    assert row["train_gflops_per_image"] == 3 * row["gflops"] == 6 * row["gmacs"]


def test_names_of_both_families():
    assert [*counts.count_names([])][-1] == "unet-tiny"
    assert [*counts.count_names([], block="adaLN")][-1] == "DiT-XL/2"
    with pytest.raises(ValueError, match=r"unknown model 'XL/2'; the names are DiT-.*, sd15-unet"):
        counts.count_names(["XL/2"])
    for options in (dict(image_size=256), dict(block="adaLN")):
        with pytest.raises(ValueError, match=r"sd15-unet is a UNet, of .* give --config"):
            counts.count_names(["DiT-S/2", "sd15-unet"], **options)


def test_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block='film' is unknown; choose one of in-context, "):
        counts.of_dit(counts.published_config("DiT-S/8", block="film"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.depth=0", "model.depth=0 must be a whole number in 1"),
        ("batch_size=-1", "batch_size=-1 must be a whole number in 1"),
        ("model.mlp_ratio=0.001", "mlp_ratio=0.001 of hidden_size=32 is an MLP without a channel"),
        ("model.num_heads=3", "num_heads=3 must divide hidden_size=32"),
    ],
)
def test_models_that_cannot_be_are_not_counted(run_command, change, message):
    flags = ["--config", "configs/smoke.py", f"--config.{change}"]
    assert run_command("flops", *flags, fails=True).startswith(f"error: {message}")


@pytest.mark.parametrize("image_size", [250, 8, 0])
def test_image_size_that_patches_do_not_divide_is_refused(image_size):
    with pytest.raises(ValueError, match=rf"image_size={image_size} must be a multiple of 16"):
        counts.published_config("DiT-XL/2", image_size)


@pytest.mark.slow
def test_flops_of_a_name_a_config_and_the_table(run_command):
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
    plain = run_command("flops", "DiT-XL/2", "--block", "in-context", "--json")
    assert json.loads(plain)["params"] < 0.7 * row["params"]
    table = run_command("flops").splitlines()
    assert len(table) == 1 + 12 + len(unet.PRESETS)
    assert table[12].split()[0] == "DiT-XL/2"
    assert table[-1].split()[:4] == ["unet-tiny", "702,753", "-", "-"]
    assert (
        json.loads(run_command("flops", "--config", "configs/smoke.py", "--json"))["tokens"] == 16
    )
    row = run_command("flops", "--config", "configs/imagenet256.py:DiT-S/8").splitlines()[-1]
    assert row.split()[0] == "imagenet256.py:DiT-S/8"
    row = json.loads(run_command("flops", "--config", "configs/vae_digits.py", "--json"))
    assert row["params"] == 158_805
    error = run_command("flops", "DiT-S/2", "--config", "configs/smoke.py", fails=True)
    assert "give a model name or --config, not both: DiT-S/2" in error
    flags = ["--config", "configs/smoke.py", "--image_size", "512"]
    message = "--image_size is of a model name; of a --config set --config.model.input_size"
    assert message in run_command("flops", *flags, fails=True)
