"""VGG-16 and LPIPS from their published files: names, and the parts that are left out."""

import numpy as np
import pytest
from helpers import torch_format
from ml_collections import ConfigDict

from dit_jax import convert
from dit_jax.convert import lpips, parameters

CONFIG = ConfigDict(dict(name="lpips", dtype="float32"))


@pytest.fixture(scope="module")
def published():
    shapes = parameters.list_published(lpips.make_table(CONFIG))
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_names_are_the_published_ones(published):
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = {f"features.{i}.{leaf}" for i in convolutions for leaf in ("weight", "bias")}
    assert published.keys() == names | {f"lin{i}.model.1.weight" for i in range(5)}


def test_both_files_become_one_model_without_the_classifier(published, tmp_path):
    linear = {name: array for name, array in published.items() if name.startswith("lin")}
    vgg = {name: array for name, array in published.items() if name not in linear}
    vgg["classifier.0.bias"] = np.zeros(4096, np.float32)
    for name, tensors in zip(lpips.FILES, (vgg, linear), strict=True):
        torch_format.save(tmp_path / name, *torch_format.tensors(tensors))
    params = convert.load("lpips", lpips.read(tmp_path), CONFIG)
    kernel = params["features_2"]["kernel"]  # [h, w, in, out]
    assert kernel[0, 2, 3, 5] == published["features.2.weight"][5, 3, 0, 2]
    assert params["lin1"]["kernel"][7, 0] == published["lin1.model.1.weight"][0, 7, 0, 0]
