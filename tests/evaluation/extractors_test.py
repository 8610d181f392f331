"""Extractors by name: their features on any mesh, and the message for missing weights."""

import jax
import numpy as np
import pytest
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import sharding
from dit_jax.evaluation import extractors


def test_features_of_pixels_are_in_minus_one_to_one():
    image = np.array([[[[0], [255]], [[51], [102]]]], np.uint8)
    extractor = extractors.load("pixels")
    features = extractor.apply(extractor.params, image)["features"]
    assert_close(features, [[-1, 1, -0.6, -0.2]], 1e-6)
    assert extractor.identity == {"name": "pixels", "dtype": "float32", "digest": ""}
    with pytest.raises(ValueError, match=r"at most 4096 values, but these have 12288\. Use"):
        jax.eval_shape(extractor.apply, {}, np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="pixels has no weights and is float32"):
        extractors.load("pixels", dtype="bfloat16")


def test_features_do_not_depend_on_the_number_of_devices(toy_extractor):
    image = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)

    def extract(num_devices):
        config = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
        mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
        extracted = toy_extractor.compile(mesh)(sharding.put_batch(mesh, {"image": image})["image"])
        assert all(array.is_fully_replicated for array in extracted.values())
        return extracted

    on_one, on_eight = extract(1), extract(8)
    assert on_one.keys() == {"features", "spatial", "probabilities"}
    for kind in on_one:
        assert_close(on_eight[kind], on_one[kind], 1e-5)


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_message_for_missing_weights_has_the_commands(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        extractors.load(name, tmp_path / "none")
    lines = str(error.value).splitlines()
    assert lines[1].strip().startswith("curl -LO https://")
    file = lines[1].rpartition("/")[2]
    assert lines[2].strip() == f"python -m dit_jax.convert {name} {file} {tmp_path / 'none'}"


def test_unknown_extractor_is_refused():
    with pytest.raises(ValueError, match="unknown extractor='vgg'; choose one of inception"):
        extractors.load("vgg")
