"""Inception-2015 from its published file: names, and the folding of batch norms."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import published_files
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert
from dit_jax.models import inception

CONFIG = ConfigDict(dict(name="inception", dtype="float32"))


@pytest.fixture(scope="module")
def published():
    return published_files.make_inception(CONFIG)


@pytest.fixture(scope="module")
def params(published):
    return convert.load("inception", published, CONFIG)


def test_batch_norm_is_folded_into_the_convolution_before_it(params, published):
    x = np.random.default_rng(0).standard_normal((100, 64))
    weight, bias, mean, variance = (
        published[f"Conv2d_3b_1x1.bn.{leaf}"].astype(np.float64)[None]
        for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    outputs = x @ published["Conv2d_3b_1x1.conv.weight"][:, :, 0, 0].T.astype(np.float64)
    expected = weight * (outputs - mean) / np.sqrt(variance + 1e-3) + bias
    kernel, shift = (params["Conv2d_3b_1x1"][leaf] for leaf in ("kernel", "bias"))
    assert_close(x @ kernel[0, 0] + shift[None], expected, 1e-6)


def test_names_and_shapes_are_the_published_ones(published):
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
    tensors = dict(published)
    del tensors["fc.bias"], tensors["Mixed_5b.branch1x1.bn.running_mean"]
    tensors["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)  # torchvision's Inception v3 has it
    tensors["fc.weight"] = np.zeros((1000, 2048), np.float32)
    with pytest.raises(ValueError, match=r"missing \(1\): Mixed_5b\.branch1x1") as error:
        convert.load("inception", tensors, CONFIG)
    assert "unexpected (1): AuxLogits.fc.bias (1000,)" in str(error.value)
    assert "fc.weight (1000, 2048) instead of (1008, 2048)" in str(error.value)


@pytest.mark.slow
def test_command_writes_a_workdir(published, params, tmp_path, run_command):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    safetensors.numpy.save_file(published | counters, tmp_path / "weights.safetensors")
    workdir = tmp_path / "inception"
    output = run_command("convert", "inception", tmp_path / "weights.safetensors", workdir)
    assert output == f'{workdir}: {{"dtype": "float32", "name": "inception"}}\n'
    model, restored = published_files.restore(workdir, "inception", "bfloat16")
    assert model == inception.Inception("bfloat16")
    jax.tree.map(np.testing.assert_array_equal, restored, params)
