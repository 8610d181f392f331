"""DiT against the published model, its initial parameters, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import initial_params, random_params
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import models
from dit_jax.models import blocks, dit


def _inputs(golden):
    return golden["x_t"], golden["t"], golden["y"]


def test_output_equals_the_published_model(golden, golden_predict):
    out = golden_predict(*_inputs(golden))
    assert_close(out, golden["model_out"], 2e-5)


def test_bfloat16_returns_f32_near_the_f32_output(golden, golden_model_config, golden_params):
    config = golden_model_config.copy_and_resolve_references()
    config.dtype = "bfloat16"
    apply = jax.jit(models.build(config).apply)
    out = apply({"params": golden_params}, *_inputs(golden))
    assert out.dtype == jnp.float32
    error = np.abs(out - golden["model_out"]).max() / np.abs(golden["model_out"]).max()
    assert 1e-5 < error < 0.05  # above 1e-5, so bfloat16 was used


@pytest.mark.parametrize("block", blocks.BLOCKS)
def test_model_without_classes_has_one_label_embedding(golden_model_config, block):
    config = golden_model_config.copy_and_resolve_references()
    config.update(num_classes=0, null_condition=False, depth=1, block=block)
    model = models.build(config)
    params = random_params(model)
    assert params["y_embedder"]["embedding"].shape == (1, config.hidden_size)
    x_t = np.ones((1, config.input_size, config.input_size, config.in_channels))
    out = jax.jit(model.apply)({"params": params}, x_t, np.ones(1), np.zeros(1, np.int32))
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_classes=0), "null_condition=True with num_classes=0: there are no labels"),
        (dict(num_classes=-1, null_condition=False), "num_classes=-1"),
    ],
    ids=str,
)
def test_invalid_numbers_of_classes_are_refused(golden_model_config, changes, message):
    config = golden_model_config.copy_and_resolve_references()
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        models.build(config)


@pytest.fixture(scope="module")
def initial(golden_model_config):
    config = golden_model_config.copy_and_resolve_references()
    config.update(hidden_size=192, num_heads=4, depth=2)
    model = models.build(config)
    return model, initial_params(model)


def test_initial_output_is_exactly_zero(golden, initial):
    model, params = initial
    out = jax.jit(model.apply)({"params": params}, *_inputs(golden))
    assert not np.any(np.asarray(out))


def test_block_is_the_identity_at_initialisation():
    block = blocks.AdaLNZeroBlock(num_heads=2, mlp_ratio=4.0, dtype="float32", attention="xla")
    rng = np.random.default_rng(0)
    x, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 16), (2, 16)))
    (out, _), _ = jax.jit(block.init_with_output)(jax.random.key(0), x, c)
    np.testing.assert_array_equal(out, x)


def test_initial_statistics_equal_the_published_ones(initial):
    _, params = initial
    d = 192

    def bound(fan_in, fan_out):
        return np.sqrt(6 / (fan_in + fan_out))

    uniform = {  # path -> bound of the uniform distribution
        "x_embedder": bound(2 * 2 * 4, d),
        "blocks/attn/qkv": bound(d, 3 * d),  # one matrix, not three
        "blocks/attn/proj": bound(d, d),
        "blocks/mlp/fc1": bound(d, 4 * d),
        "blocks/mlp/fc2": bound(4 * d, d),
    }
    zeros = ("blocks/adaLN_modulation", "final_layer/adaLN_modulation", "final_layer/linear")
    normal = ("t_embedder/mlp_0/kernel", "t_embedder/mlp_2/kernel", "y_embedder/embedding")
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        module, _, kind = path.rpartition("/")
        seen.add(path)
        if kind == "bias" or module in zeros:
            assert not np.any(np.asarray(leaf)), path
        elif path in normal:
            # The label table has few rows, hence the loose tolerance.
            assert np.std(leaf) == pytest.approx(0.02, rel=0.08), path
        else:
            limit = uniform[module]
            assert np.abs(leaf).max() == pytest.approx(limit, rel=0.02), path
            assert np.std(leaf) == pytest.approx(limit / np.sqrt(3), rel=0.03), path
    assert {f"{module}/kernel" for module in uniform} | set(normal) <= seen


def test_blocks_have_independent_initial_kernels(initial):
    _, params = initial
    kernel = np.asarray(params["blocks"]["mlp"]["fc1"]["kernel"])
    assert kernel.shape == (2, 192, 768)
    assert np.abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.02


def test_patches_are_row_major_with_channels_fastest():
    x = jnp.arange(4 * 6 * 3, dtype=jnp.float32).reshape(1, 4, 6, 3)
    tokens = dit.patchify(x, 2)
    assert tokens.shape == (1, 6, 12)
    np.testing.assert_array_equal(tokens[0, 2], x[0, 0:2, 4:6].reshape(-1))  # the top right patch
    np.testing.assert_array_equal(dit.unpatchify(tokens, 2, (2, 3)), x)


def test_names_from_the_paper_give_its_sizes():
    assert dit.parse_name("DiT-XL/2") == dict(
        hidden_size=1152, depth=28, num_heads=16, patch_size=2
    )
    assert dit.parse_name("DiT-S/16")["patch_size"] == 16


@pytest.mark.parametrize("name", ["DiT-XXL/2", "XL/2", "DiT-XL", "DiT-XL/0", "DiT-XL/2/2"])
def test_error_for_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"S,B,L,XL"):
        dit.parse_name(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=5), "num_heads=5 must divide hidden_size=48"),
        (dict(hidden_size=46, num_heads=2), "hidden_size=46 must be a multiple of 4"),
        (dict(patch_size=3), r"patch_size=3 must divide input_size=8.*\[1, 2, 4, 8\]"),
        (dict(block="film"), "block='film'.*in-context, cross-attention, adaLN, adaLN-Zero"),
        (dict(remat="some"), "remat='some'.*none, dots, full"),
        (dict(dtype="float8"), "dtype='float8'.*bfloat16"),
        (dict(attention="flash"), "attention='flash'.*auto, xla, cudnn"),
        (dict(attention="cudnn"), "cudnn.*not an NVIDIA GPU"),
        (dict(name="gan"), "unknown model name 'gan'; known: dit"),
    ],
    ids=str,
)
def test_invalid_configs_are_refused(golden_model_config, change, message):
    config = golden_model_config.copy_and_resolve_references()
    config.update(change)
    with pytest.raises(ValueError, match=message):
        models.build(config)


def test_input_with_a_wrong_size_is_refused(golden, golden_model_config, golden_params):
    model = models.build(golden_model_config)
    with pytest.raises(ValueError, match=r"\(3, 4, 8, 4\).*'B', 8, 8, 4"):
        model.apply({"params": golden_params}, golden["x_t"][:, :4], golden["t"], golden["y"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size=0 must be a whole number in 1"),
        ("patch_size", -1, "patch_size=-1 must be a whole number in 1"),
        ("depth", -1, "depth=-1 must be a whole number in 1"),
        ("num_heads", 0, "num_heads=0 must divide hidden_size=48"),
        ("mlp_ratio", 0.0, r"mlp_ratio=0.0 must be a number in \(0, 100\]"),
        ("input_size", 2**13, "the position table would have 805,306,368 numbers"),
    ],
)
def test_sizes_out_of_range_are_refused(golden_model_config, key, value, message):
    config = golden_model_config.copy_and_resolve_references()
    config[key] = value
    with pytest.raises(ValueError, match=message):
        models.build(config)


def test_model_for_rectangles_refuses_transposed_images(golden_model_config):
    config = golden_model_config.copy_and_resolve_references()
    config.update(depth=1)
    config = ConfigDict(config.to_dict() | dict(input_size=[8, 12]))
    model = models.build(config)
    assert model.input_size == (8, 12)
    params = random_params(model)
    x_t = np.random.default_rng(0).standard_normal((1, 8, 12, 4), np.float32)
    out = model.apply({"params": params}, x_t, jnp.ones(1), jnp.zeros(1, int))
    assert out.shape == (1, 8, 12, 8)
    with pytest.raises(ValueError, match=r"takes \('B', 8, 12, 4\)"):
        model.apply({"params": params}, x_t.swapaxes(1, 2), jnp.ones(1), jnp.zeros(1, int))
    with pytest.raises(ValueError, match=r"input_size=\(8, 9\); choose one of \[1\]"):
        models.build(ConfigDict(config.to_dict() | dict(input_size=(8, 9))))


def test_patch_size_with_thousands_of_digits_is_refused():
    with pytest.raises(ValueError, match="unknown model"):
        dit.parse_name("DiT-S/" + "9" * 5000)
