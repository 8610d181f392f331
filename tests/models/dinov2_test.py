"""DINOv2: its resize against Pillow, and what its class token depends on."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import models
from dit_jax.convert import parameters
from dit_jax.models import dinov2

CONFIG = ConfigDict(
    dict(name="dinov2", hidden_size=128, depth=2, num_heads=2, dtype="float32")
).lock()


@pytest.fixture(scope="module")
def params():
    """Random, so that no scale is 1 and no bias 0."""
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


def _images(shape):
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def _pillow(image, width, height):
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.stack(
        [np.asarray(PIL.Image.fromarray(x).resize((width, height), bicubic)) for x in image]
    )


@pytest.mark.parametrize(
    ("height", "width"),
    [(32, 32), (256, 256), (299, 299), (512, 512), (224, 224), (1, 1), (3, 640), (300, 100)],
)
def test_resize_is_pillow_s_to_the_bit(height, width):
    image = _images((3, height, width, 3))
    image[1] = 255 * (image[1] > 127)  # overshoots, so that clipping counts
    image[2] = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
    resized = dinov2.resize(image, 224)
    assert resized.dtype == jnp.uint8
    np.testing.assert_array_equal(resized, _pillow(_pillow(image, 224, height), 224, 224))
    if height <= width:  # else Pillow 13 may begin with the height
        np.testing.assert_array_equal(resized, _pillow(image, 224, 224))


def test_grey_is_rgb_of_equal_channels(params, features):
    grey = _images((2, 40, 48, 1))
    assert_close(features(params, grey), features(params, grey.repeat(3, -1)), 1e-5)


def test_pixels_are_normalised_channel_by_channel(params):
    """An image of one colour is patches of one vector: that of the colour's normalised value."""
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


def test_class_token_sees_the_order_of_patches_by_their_positions_alone(params, features):
    image = _images((1, 224, 224, 3))
    patches = image.reshape(16, 14, 16, 14, 3).swapaxes(1, 2).reshape(256, 14, 14, 3)
    shuffled = np.random.default_rng(2).permutation(patches).reshape(16, 16, 14, 14, 3)
    shuffled = shuffled.swapaxes(1, 2).reshape(1, 224, 224, 3)
    nowhere = params | {"pos_embed": params["pos_embed"].at[:, 1:].set(0)}
    expected = features(nowhere, image)
    assert_close(features(nowhere, shuffled), expected, 1e-5)
    moved = features(params, shuffled) - features(params, image)
    assert np.abs(moved).max() > 1e-2


def test_images_of_a_batch_do_not_mix(params, features):
    image = _images((3, 32, 32, 3))
    one = features(params, image[1:2])
    assert_close(features(params, image)[1:2], one, 1e-5)


@pytest.mark.parametrize("closed", ["ls1", "ls2"])
def test_layer_scale_gates_its_branch(params, features, closed):
    """Without attention the class token is the same for all images; without MLPs it is not."""
    blocks = params["blocks"]
    blocks = blocks | {closed: {"gamma": jnp.zeros_like(blocks[closed]["gamma"])}}
    a, b = features(params | {"blocks": blocks}, _images((2, 32, 32, 3)))
    assert np.array_equal(a, b) == (closed == "ls1")


def test_features_are_normalised(params, features):
    plain = params | {"norm": {"scale": jnp.ones(128), "bias": jnp.zeros(128)}}
    x = np.asarray(features(plain, _images((2, 32, 32, 3))))
    assert np.abs(x.mean(axis=1)).max() < 1e-5
    assert_close(x.var(axis=1), np.ones(2), 1e-4)
    # Where nothing is added to a class token of variance 1e-6, epsilon is half of the divisor.
    closed = {name: {"gamma": jnp.zeros((2, 128))} for name in ("ls1", "ls2")}
    small = jnp.tile(jnp.array([1e-3, -1e-3]), 64).reshape(1, 1, 128)
    plain |= {"blocks": params["blocks"] | closed, "cls_token": small}
    plain |= {"pos_embed": jnp.zeros_like(params["pos_embed"])}
    x = features(plain, _images((1, 32, 32, 3)))
    assert_close(x[0], small[0, 0] / np.sqrt(2e-6), 1e-4)


def test_bfloat16_rounds_activations_not_parameters_nor_features(params, features):
    model = models.build(ConfigDict(CONFIG.to_dict() | {"dtype": "bfloat16"}))
    shapes = models.param_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    image = _images((2, 32, 32, 3))
    x = jax.jit(model.apply)({"params": params}, image)["features"]
    expected = features(params, image)
    assert x.dtype == jnp.float32
    error = np.abs(x - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 5e-2


def test_products_are_full_f32_whatever_the_default(params):
    def products(dtype):
        model = models.build(ConfigDict(CONFIG.to_dict() | {"dtype": dtype}))
        with jax.default_matmul_precision("default"):
            jaxpr = jax.make_jaxpr(model.apply)({"params": params}, _images((1, 32, 32, 3)))
        lines = str(jaxpr).splitlines()
        return [line for line in lines if "precision=" in line]

    assert len(products("float32")) == 9  # patches; q, k, v, logits, values, proj; fc1, fc2
    assert all("HIGHEST" in line for line in products("float32"))
    assert not any("HIGHEST" in line for line in products("bfloat16"))


@pytest.mark.parametrize(
    "image", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 4), np.uint8)]
)
def test_other_images_are_refused(params, image):
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
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build(ConfigDict(CONFIG.to_dict() | changes))
