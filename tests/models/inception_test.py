"""Inception-2015's resize, outputs and import; tests/parity compares it with torch-fidelity's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert, models, sharding
from dit_jax.convert import inception as published_inception
from dit_jax.models import inception
from dit_jax.workdirs import checkpoint

CONFIG = ConfigDict(dict(name="inception", dtype="float32"))


@pytest.fixture(scope="module")
def published():
    """Random arrays by their published names, scaled so that activations neither fade nor grow."""
    rng, arrays = np.random.default_rng(0), {"fc.bias": np.ones(1008, np.float32)}
    for name, shape in published_inception.list_published(CONFIG).items():
        normal = rng.standard_normal(shape, np.float32)
        if name.endswith(("bn.weight", "running_var")):
            arrays[name] = 0.5 + rng.random(shape, np.float32)
        elif name.endswith("conv.weight"):
            arrays[name] = normal * np.float32(2 / np.prod(shape[1:])) ** 0.5
        else:
            arrays[name] = (0.002 if name == "fc.weight" else 0.3) * normal
    return arrays


@pytest.fixture(scope="module")
def params(published):
    return convert.load("inception", published, CONFIG)


@pytest.fixture(scope="module")
def extract(params):
    """extract(image) -> (outputs, {block: output of its branch1x1 before the ReLU})."""
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
    """Two images [2, 40, 52, 3]: noise in colour, and its red channel in grey."""
    colour = np.random.default_rng(1).integers(0, 256, (40, 52, 3), np.uint8)
    return np.stack([colour, colour[..., :1].repeat(3, -1)])


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 13), (13, 13, 13), (30, 17, 8)])
def test_resize_samples_pixel_i_at_i_times_the_ratio(height, width, size):
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


def test_outputs_come_from_mixed_6d_and_the_classifier(extract, images, published):
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
    # These logits leave out fc.bias, which is 1 for all classes here.
    logits = features.astype(np.float64) @ published["fc.weight"].T
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert_close(np.log(probabilities), np.log(expected), 1e-5)
    assert 2 / 1008 < expected.max() < 0.5


def test_grey_images_equal_rgb_images_with_three_equal_channels(extract, images):
    outputs, _ = extract(images)
    grey, _ = extract(np.stack([images[1, ..., :1]] * 2))
    for name, array in outputs.items():
        assert_close(grey[name][0], array[1], 1e-5)
        assert np.abs(array[0] - array[1]).max() > 1e-2 * array.max()


def test_average_pools_ignore_padding_and_mixed_7c_takes_the_maximum():
    x = jnp.full((1, 4, 4, 1), -1.0).at[0, 0, 0, 0].set(8.0)
    average = inception._pool(x, "Mixed_7b", halves=False)
    assert_close(average[0, 0, 0], [(8 - 3) / 4], 1e-7)
    assert_close(average[0, 0, 1], [(8 - 5) / 6], 1e-7)
    assert_close(average[0, 3, 3], [-1], 1e-7)
    maximum = inception._pool(x, "Mixed_7c", halves=False)
    assert (maximum[0, 1, 1, 0], maximum[0, 2, 2, 0]) == (8, -1)
    assert inception._pool(x, "Mixed_6a", halves=True).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", {"HIGHEST"}), ("bfloat16", {"DEFAULT"})]
)
def test_f32_products_are_full_precision_under_any_default(dtype, expected):
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
def test_images_with_a_wrong_shape_or_dtype_are_refused(params, image, message):
    with pytest.raises(ValueError, match=message):
        models.build(CONFIG).apply({"params": params}, image)


def test_batch_norm_is_folded_into_the_preceding_convolution(params, published):
    x = np.random.default_rng(0).standard_normal((100, 64))
    weight, bias, mean, variance = (
        published[f"Conv2d_3b_1x1.bn.{leaf}"].astype(np.float64)[None]
        for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    convolved = x @ published["Conv2d_3b_1x1.conv.weight"][:, :, 0, 0].T.astype(np.float64)
    expected = weight * (convolved - mean) / np.sqrt(variance + 1e-3) + bias
    kernel, shift = (params["Conv2d_3b_1x1"][leaf] for leaf in ("kernel", "bias"))
    assert_close(x @ kernel[0, 0] + shift[None], expected, 1e-6)


def test_published_names_equal_the_file_s(published):
    assert len(published) == 94 * 5 + 2
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5d.branch_pool.bn.running_var": (64,),
        "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert published[name].shape == shape


def test_missing_and_unexpected_arrays_are_refused(published):
    arrays = dict(published)
    del arrays["fc.bias"], arrays["Mixed_5b.branch1x1.bn.running_mean"]  # fc.bias is not needed
    arrays["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)  # torchvision's Inception v3 has it
    arrays["fc.weight"] = np.zeros((1000, 2048), np.float32)
    with pytest.raises(ValueError, match=r"missing \(1\): Mixed_5b\.branch1x1") as error:
        convert.load("inception", arrays, CONFIG)
    assert "unexpected (1): AuxLogits.fc.bias (1000,)" in str(error.value)
    assert "fc.weight (1000, 2048) instead of (1008, 2048)" in str(error.value)


@pytest.mark.slow
def test_convert_command_writes_a_workdir(published, params, tmp_path, run_command):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    safetensors.numpy.save_file(published | counters, tmp_path / "weights.safetensors")
    workdir = tmp_path / "inception"
    output = run_command("convert", "inception", tmp_path / "weights.safetensors", workdir)
    assert output == f'{workdir}: {{"dtype": "float32", "name": "inception"}}\n'
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    model, restored = checkpoint.load_model(workdir, mesh, "bfloat16", "inception")
    assert model == inception.Inception("bfloat16")
    jax.tree.map(np.testing.assert_array_equal, restored, params)
