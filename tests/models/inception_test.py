"""Inception-2015's resize and outputs; tests/parity has it beside torch-fidelity's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import published_files
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert, models
from dit_jax.models import inception

CONFIG = ConfigDict(dict(name="inception", dtype="float32"))


@pytest.fixture(scope="module")
def published():
    return published_files.make_inception(CONFIG)


@pytest.fixture(scope="module")
def params(published):
    return convert.load("inception", published, CONFIG)


@pytest.fixture(scope="module")
def extract(params):
    """extract(image): (the outputs, what every branch1x1 has before its ReLU, by block)."""
    model = models.build(CONFIG)

    @jax.jit
    def apply(image):
        outputs, state = model.apply(
            {"params": params},
            image,
            capture_intermediates=lambda module, _: module.name == "branch1x1",
            mutable=["intermediates"],
        )
        captured = state["intermediates"]
        return outputs, {block: captured[block]["branch1x1"]["__call__"][0] for block in captured}

    return apply


@pytest.fixture(scope="module")
def images():
    """[2, 40, 52, 3]: noise, and the same in grey."""
    colour = np.random.default_rng(1).integers(0, 256, (40, 52, 3), np.uint8)
    return np.stack([colour, colour[..., :1].repeat(3, -1)])


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 13), (13, 13, 13), (30, 17, 8)])
def test_resize_takes_pixel_i_from_i_times_the_ratio(height, width, size):
    x = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    expected = np.zeros((2, size, size, 3))
    for i in range(size):
        for j in range(size):
            y, z = i * height / size, j * width / size
            rows = [int(y), min(int(y) + 1, height - 1)]
            columns = [int(z), min(int(z) + 1, width - 1)]
            for row, a in zip(rows, (1 - y % 1, y % 1), strict=True):
                for column, b in zip(columns, (1 - z % 1, z % 1), strict=True):
                    expected[:, i, j] += a * b * x[:, row, column]
    actual = jax.jit(lambda x: inception.resize_bilinear_tf1(x, size))(x)
    assert_close(actual, expected, 1e-6)
    if (height, width) == (size, size):
        np.testing.assert_array_equal(actual, x)


def test_outputs_are_the_blocks_and_the_classifier_s(extract, images, published):
    outputs, branches = extract(images)
    features, probabilities = (np.asarray(outputs[k]) for k in ("features", "probabilities"))
    assert features.shape == (2, 2048)
    assert {a.dtype for a in outputs.values()} == {jnp.dtype("float32")}
    branch = np.maximum(branches["Mixed_6d"], 0)
    assert branch.shape == (2, 17, 17, 192)
    spatial = np.asarray(outputs["spatial"])
    np.testing.assert_array_equal(spatial, branch[..., :7].reshape(2, 2023))
    assert spatial[0, (3 * 17 + 5) * 7 + 2] == branch[0, 3, 5, 2]  # channels last, rows first
    assert len(np.unique(spatial)) > 1000
    # The classifier's bias of 1 in the file makes no difference.
    logits = features.astype(np.float64) @ published["fc.weight"].T
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert_close(np.log(probabilities), np.log(expected), 1e-5)
    assert 2 / 1008 < expected.max() < 0.5


def test_grey_images_are_those_of_three_equal_channels(extract, images):
    outputs, _ = extract(images)
    grey, _ = extract(np.stack([images[1, ..., :1]] * 2))
    for name, array in outputs.items():
        assert_close(grey[name][0], array[1], 1e-5)
        assert np.abs(array[0] - array[1]).max() > 1e-2 * array.max()


def test_pools_leave_the_padding_out_and_the_last_one_is_a_maximum():
    x = jnp.full((1, 4, 4, 1), -1.0).at[0, 0, 0, 0].set(8.0)
    average = inception._pool(x, "Mixed_7b", halves=False)
    assert_close(average[0, 0, 0], [(8 - 3) / 4], 1e-7)
    assert_close(average[0, 0, 1], [(8 - 5) / 6], 1e-7)
    assert_close(average[0, 3, 3], [-1], 1e-7)
    largest = inception._pool(x, "Mixed_7c", halves=False)
    assert (largest[0, 1, 1, 0], largest[0, 2, 2, 0]) == (8, -1)
    assert inception._pool(x, "Mixed_6a", halves=True).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", {"HIGHEST"}), ("bfloat16", {"DEFAULT"})]
)
def test_products_of_f32_are_full_whatever_the_caller_s_default(dtype, expected):
    model = models.build(ConfigDict(dict(name="inception", dtype=dtype)))
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(lambda: model.init(jax.random.key(0), *model.example_inputs()))()
    products = [
        equation
        for equation in jaxpr.jaxpr.eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert len(products) == 95
    actual = {str(p.name) for e in products for p in e.params["precision"] or ()}
    assert actual == expected


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"\(1, 8, 8, 3\) and dtype float32; .* uint8"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"image has shape \(1, 8, 8, 4\) and dtype uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"image has shape \(8, 8, 3\) and dtype uint8"),
    ],
)
def test_other_images_are_refused(params, image, message):
    with pytest.raises(ValueError, match=message):
        models.build(CONFIG).apply({"params": params}, image)
