"""DINOv2: its resize against Pillow, properties of its features, and its import from files."""

import functools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert, models, sharding
from dit_jax.convert import parameters
from dit_jax.models import dinov2
from dit_jax.workdirs import checkpoint

CONFIG = ConfigDict(
    dict(name="dinov2", hidden_size=128, depth=2, num_heads=2, dtype="float32")
).lock()


@pytest.fixture(scope="module")
def params():
    """Random parameters, among which no scale is 1 and no bias is 0."""
    shapes = parameters.get_shapes(CONFIG)
    rng = np.random.default_rng(0)
    flat = {
        path: (0.1 if path.endswith("kernel") else 0.5) * rng.standard_normal(shape, np.float32)
        for path, shape in shapes.items()
    }
    return jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(flat, sep="/"))


@pytest.fixture(scope="module")
def features():
    """features(params, image [B, H, W, C]) -> [B, D]."""
    model = models.build(CONFIG)
    return jax.jit(lambda params, image: model.apply({"params": params}, image)["features"])


def _draw_images(shape):
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def _resize_with_pillow(image, width, height):
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.stack(
        [np.asarray(PIL.Image.fromarray(x).resize((width, height), bicubic)) for x in image]
    )


@pytest.mark.parametrize(
    ("height", "width"),
    [(32, 32), (256, 256), (299, 299), (512, 512), (224, 224), (1, 1), (3, 640), (300, 100)],
)
def test_resize_equals_pillow_s_bit_for_bit(height, width):
    image = _draw_images((3, height, width, 3))
    image[1] = 255 * (image[1] > 127)  # the resize overshoots, and must clip
    image[2] = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
    resized = dinov2.resize(image, 224)
    assert resized.dtype == jnp.uint8
    width_first = _resize_with_pillow(_resize_with_pillow(image, 224, height), 224, 224)
    np.testing.assert_array_equal(resized, width_first)
    if height <= width:  # otherwise Pillow 13 may begin with the height
        np.testing.assert_array_equal(resized, _resize_with_pillow(image, 224, 224))


def test_grey_images_equal_rgb_images_with_three_equal_channels(params, features):
    grey = _draw_images((2, 40, 48, 1))
    assert_close(features(params, grey), features(params, grey.repeat(3, -1)), 1e-5)


def test_pixels_are_normalised_channel_by_channel(params):
    """An image of one colour has patches that are all embedded as one known vector."""
    colour = np.array([10, 200, 90], np.uint8)
    image = np.broadcast_to(colour, (1, 8, 8, 3))
    apply = functools.partial(
        models.build(CONFIG).apply,
        capture_intermediates=lambda module, _: module.name == "patch_embed",
    )
    _, state = jax.jit(apply)({"params": params}, image)
    patches = state["intermediates"]["patch_embed"]["__call__"][0]
    x = (colour / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    embed = jax.tree.map(np.asarray, params["patch_embed"])
    expected = np.tile(x, 14 * 14) @ embed["kernel"].astype(np.float64) + embed["bias"]
    assert_close(patches[0], np.tile(expected, (256, 1)), 1e-5)


def test_patch_order_matters_through_position_embeddings_alone(params, features):
    image = _draw_images((1, 224, 224, 3))
    patches = image.reshape(16, 14, 16, 14, 3).swapaxes(1, 2).reshape(256, 14, 14, 3)
    shuffled = np.random.default_rng(2).permutation(patches).reshape(16, 16, 14, 14, 3)
    shuffled = shuffled.swapaxes(1, 2).reshape(1, 224, 224, 3)
    without_positions = params | {"pos_embed": params["pos_embed"].at[:, 1:].set(0)}
    expected = features(without_positions, image)
    assert_close(features(without_positions, shuffled), expected, 1e-5)
    difference = features(params, shuffled) - features(params, image)
    assert np.abs(difference).max() > 1e-2


def test_features_do_not_depend_on_other_images_of_the_batch(params, features):
    image = _draw_images((3, 32, 32, 3))
    expected = features(params, image[1:2])
    assert_close(features(params, image)[1:2], expected, 1e-5)


@pytest.mark.parametrize("layer_scale", ["ls1", "ls2"])
def test_layer_scale_gates_its_branch(params, features, layer_scale):
    """Without attention the class token is the same for all images; without MLPs it is not."""
    blocks = params["blocks"]
    blocks = blocks | {layer_scale: {"gamma": jnp.zeros_like(blocks[layer_scale]["gamma"])}}
    a, b = features(params | {"blocks": blocks}, _draw_images((2, 32, 32, 3)))
    assert np.array_equal(a, b) == (layer_scale == "ls1")


def test_features_are_normalised_with_the_published_epsilon(params, features):
    params = params | {"norm": {"scale": jnp.ones(128), "bias": jnp.zeros(128)}}
    x = np.asarray(features(params, _draw_images((2, 32, 32, 3))))
    assert np.abs(x.mean(axis=1)).max() < 1e-5
    assert_close(x.var(axis=1), np.ones(2), 1e-4)
    # Nothing is added to a class token with variance 1e-6, which equals epsilon.
    zero_scales = {name: {"gamma": jnp.zeros((2, 128))} for name in ("ls1", "ls2")}
    cls_token = jnp.tile(jnp.array([1e-3, -1e-3]), 64).reshape(1, 1, 128)
    params |= {"blocks": params["blocks"] | zero_scales, "cls_token": cls_token}
    params |= {"pos_embed": jnp.zeros_like(params["pos_embed"])}
    x = features(params, _draw_images((1, 32, 32, 3)))
    assert_close(x[0], cls_token[0, 0] / np.sqrt(2e-6), 1e-4)


def test_bfloat16_rounds_activations_but_neither_parameters_nor_features(params, features):
    model = models.build(ConfigDict(CONFIG.to_dict() | {"dtype": "bfloat16"}))
    shapes = models.param_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    image = _draw_images((2, 32, 32, 3))
    x = jax.jit(model.apply)({"params": params}, image)["features"]
    expected = features(params, image)
    assert x.dtype == jnp.float32
    error = np.abs(x - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 5e-2


def test_f32_products_are_full_precision_under_any_default(params):
    def list_products(dtype):
        model = models.build(ConfigDict(CONFIG.to_dict() | {"dtype": dtype}))
        with jax.default_matmul_precision("default"):
            jaxpr = jax.make_jaxpr(model.apply)({"params": params}, _draw_images((1, 32, 32, 3)))
        lines = str(jaxpr).splitlines()
        return [line for line in lines if "precision=" in line]

    assert len(list_products("float32")) == 9  # patches; q, k, v, logits, values, proj; fc1, fc2
    assert all("HIGHEST" in line for line in list_products("float32"))
    assert not any("HIGHEST" in line for line in list_products("bfloat16"))


@pytest.mark.parametrize(
    "image", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 4), np.uint8)]
)
def test_images_with_a_wrong_dtype_or_channel_count_are_refused(params, image):
    with pytest.raises(ValueError, match=r"\(1, 8, 8, .\) and dtype (float32|uint8); DINOv2 takes"):
        models.build(CONFIG).apply({"params": params}, image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide hidden_size=128"),
        ({"num_heads": 0}, "num_heads=0 must divide hidden_size=128"),
        ({"dtype": "float16"}, "unknown dtype='float16'"),
    ],
)
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build(ConfigDict(CONFIG.to_dict() | changes))


# Shapes of one block's arrays in the official file, for D = 128.
BLOCK = {
    "norm1.weight": (128,),
    "norm1.bias": (128,),
    "attn.qkv.weight": (384, 128),
    "attn.qkv.bias": (384,),
    "attn.proj.weight": (128, 128),
    "attn.proj.bias": (128,),
    "ls1.gamma": (128,),
    "norm2.weight": (128,),
    "norm2.bias": (128,),
    "mlp.fc1.weight": (512, 128),
    "mlp.fc1.bias": (512,),
    "mlp.fc2.weight": (128, 512),
    "mlp.fc2.bias": (128,),
    "ls2.gamma": (128,),
}
OFFICIAL = {
    "cls_token": (1, 1, 128),
    "pos_embed": (1, 1370, 128),
    "mask_token": (1, 128),
    "patch_embed.proj.weight": (128, 3, 14, 14),
    "patch_embed.proj.bias": (128,),
    **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()},
    "norm.weight": (128,),
    "norm.bias": (128,),
}


@pytest.fixture
def official():
    """Random arrays under the names of the official file."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in OFFICIAL.items()}


def test_official_file_becomes_a_workdir(official, run_command, tmp_path):
    safetensors.numpy.save_file(official, tmp_path / "dinov2.safetensors")
    out = run_command("convert", "dinov2", tmp_path / "dinov2.safetensors", tmp_path / "workdir")
    assert out == f"{tmp_path / 'workdir'}: {json.dumps(CONFIG.to_dict())}\n"
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    _, params = checkpoint.load_model(tmp_path / "workdir", mesh, "float32", "dinov2")
    kernel = params["patch_embed"]["kernel"]  # [14*14*3, D]
    assert kernel[(5 * 14 + 7) * 3 + 2, 9] == official["patch_embed.proj.weight"][9, 2, 5, 7]
    qkv = params["blocks"]["attn"]["qkv"]["kernel"]  # [L, D, 3, heads, head size]
    assert qkv.shape == (2, 128, 3, 2, 64)
    assert qkv[1, 5, 2, 1, 7] == official["blocks.1.attn.qkv.weight"][2 * 128 + 64 + 7, 5]
    np.testing.assert_array_equal(
        params["blocks"]["ls2"]["gamma"][1], official["blocks.1.ls2.gamma"]
    )
    np.testing.assert_array_equal(params["pos_embed"][:, 0], official["pos_embed"][:, 0])


def _write_transformers(official, directory, **changes):
    """Writes the arrays and a config as transformers does, and returns the directory."""
    renamed = {}
    for name, array in official.items():
        block = f"encoder.layer.{name.split('.')[1]}" if name.startswith("blocks.") else ""
        leaf = name.rpartition(".")[2]
        if "attn.qkv" in name:
            query_key_value = zip(("query", "key", "value"), np.split(array, 3), strict=True)
            for part, part_array in query_key_value:
                renamed[f"{block}.attention.attention.{part}.{leaf}"] = part_array
            continue
        for official_name, transformers_name in {
            "cls_token": "embeddings.cls_token",
            "mask_token": "embeddings.mask_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "blocks.": "encoder.layer.",
            "attn.proj": "attention.output.dense",
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
        }.items():
            name = name.replace(official_name, transformers_name)
        renamed[name if block else name.replace("norm.", "layernorm.")] = array
    config = dict(
        hidden_act="gelu",
        hidden_size=128,
        layer_norm_eps=1e-6,
        mlp_ratio=4,
        model_type="dinov2",
        num_attention_heads=2,
        patch_size=14,
        use_swiglu_ffn=False,
    )
    directory.mkdir()
    renamed = {name: np.ascontiguousarray(a) for name, a in renamed.items()}
    safetensors.numpy.save_file(renamed, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def test_transformers_directory_is_read_as_the_official_arrays(official, tmp_path):
    actual = convert.dinov2.read(_write_transformers(official, tmp_path / "hf"))
    assert actual.keys() == official.keys()
    for name, array in official.items():
        np.testing.assert_array_equal(actual[name], array)


def test_error_for_unexpected_arrays_of_transformers_lists_their_names(official, tmp_path):
    official["head.weight"] = np.zeros((10, 128), np.float32)
    with pytest.raises(ValueError, match=r"unexpected \(1\): head.weight \(10, 128\)"):
        convert.to_workdir(
            "dinov2", _write_transformers(official, tmp_path / "hf"), tmp_path / "workdir"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "dinov2_with_registers"},
            "model_type='dinov2_with_registers'; supported: di",
        ),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05; supported: 1e-06"),
        ({"num_attention_heads": 4}, r"hidden_size=128; supported: num_attention_heads \* 64, 256"),
    ],
)
def test_unsupported_models_of_transformers_are_refused(official, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert.to_workdir(
            "dinov2",
            _write_transformers(official, tmp_path / "hf", **changes),
            tmp_path / "workdir",
        )


def test_transformers_directory_without_config_is_refused(official, tmp_path):
    directory = _write_transformers(official, tmp_path / "hf")
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*config.json: it must be .* that trans"):
        convert.to_workdir("dinov2", directory, tmp_path / "workdir")
    with pytest.raises(ValueError, match="transformers' model is given as the directory"):
        convert.to_workdir("dinov2", directory / "model.safetensors", tmp_path / "workdir")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("register_tokens", (1, 4, 128), r"register_tokens \(1, 4, 128\), but this model has none"),
        ("patch_embed.proj.weight", (128, 3, 16, 16), "patches of 16x16 pixels, DINOv2 of 14x14"),
        ("patch_embed.proj.weight", (96, 3, 14, 14), "hidden_size=96, not a multiple of the head"),
        ("patch_embed.proj.weight", (128,), r"has shape \(128,\), not \[D, 3, 14, 14\]"),
        ("blocks.0.mlp.w12.weight", (512, 128), "a gated MLP, as ViT-g's"),
        ("pos_embed", (1, 1371, 128), r"pos_embed \(1, 1371, 128\) instead of \(1, 257, 128\)"),
        ("head.weight", (10, 128), r"unexpected \(1\): head.weight"),
        ("blocks.2.norm1.bias", (128,), r"missing \(13\): blocks.2.attn.proj.bias \(128,\)"),
    ],
)
def test_files_of_unsupported_models_are_refused(official, name, shape, message, tmp_path):
    official[name] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "dinov2.npz", **official)
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dinov2", tmp_path / "dinov2.npz", tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_positions_are_interpolated_with_the_official_offset():
    """At fraction s between two points of a ramp, this cubic is off by s (1 - s) (1 - 2 s) / 2."""
    ramp = np.zeros((1, 1 + 37 * 37, 2), np.float32)
    ramp[0, 1:] = np.stack(np.divmod(np.arange(37 * 37), 37), axis=-1)  # row, column
    ramp[0, 0] = 7
    positions = convert.dinov2.interpolate_positions(ramp, 16)
    assert positions.dtype == np.float32
    np.testing.assert_array_equal(positions[:, 0], 7)
    sampled_at = (np.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5  # away from the border
    s = sampled_at % 1
    expected = sampled_at + s * (1 - s) * (1 - 2 * s) / 2
    grid = positions[0, 1:].reshape(16, 16, 2)[1:15, 1:15]
    assert_close(grid[..., 0], np.tile(expected[:, None], (1, 14)), 1e-6)
    assert_close(grid[..., 1], np.tile(expected[None], (14, 1)), 1e-6)
    constant = np.full((1, 1 + 37 * 37, 2), 3, np.float32)  # shows that the border is repeated
    positions = convert.dinov2.interpolate_positions(constant, 16)
    assert_close(positions, np.full_like(positions, 3), 1e-6)


def test_positions_for_224_px_are_not_interpolated():
    positions = np.random.default_rng(0).standard_normal((1, 257, 8), np.float32)
    np.testing.assert_array_equal(convert.dinov2.interpolate_positions(positions, 16), positions)
