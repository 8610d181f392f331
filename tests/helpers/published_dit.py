"""Fixtures of a tiny DiT that the published PyTorch code made; a pytest plugin."""

import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax import convert, models

REFERENCE = pathlib.Path(__file__).parents[1] / "goldens" / "dit_tiny_reference.npz"


@pytest.fixture(scope="session")
def golden():
    """Loads the inputs, weights (w/...) and outputs of the published DiT, images as NHWC."""
    with np.load(REFERENCE) as file:
        arrays = {name: file[name] for name in file.files}
    return {
        name: np.moveaxis(array, -3, -1) if array.ndim >= 4 and name[:2] != "w/" else array
        for name, array in arrays.items()
    }


@pytest.fixture(scope="session")
def golden_model_config():
    return ConfigDict(
        dict(
            name="dit",
            input_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=48,
            depth=3,
            num_heads=4,
            mlp_ratio=4.0,
            block="adaLN-Zero",
            condition="label",
            num_classes=7,
            null_condition=True,
            context_size=0,
            text_vocab_size=4096,
            text_length=32,
            text_depth=2,
            text_num_heads=4,
            learn_sigma=True,
            dtype="float32",
            attention="auto",
            remat="none",
            scan_unroll=False,
        )
    )


@pytest.fixture(scope="session")
def golden_params(golden_model_config):
    return convert.load("dit", REFERENCE, golden_model_config)


@pytest.fixture
def published(golden):
    """Returns {name: array} of the published model's parameters."""
    return {name[2:]: array for name, array in golden.items() if name[:2] == "w/"}


@pytest.fixture(scope="session")
def golden_predict(golden_model_config, golden_params):
    """predict(x_t, network_time, y) returns the output of the published model."""
    model = models.build(golden_model_config)
    return jax.jit(lambda x_t, t, y: model.apply({"params": golden_params}, x_t, t, y))
