"""Converter for LPIPS: torchvision's VGG-16, and the linear weights of LPIPS 0.1."""

import pathlib
import re
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import parameters, weights

FILES = ("vgg16-397923af.pth", "vgg.pth")  # from torchvision, and from LPIPS


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The classifier of VGG-16 is left out.
    """
    convolutions = {
        name: array for name, array in tensors.items() if not name.startswith("classifier.")
    }
    return parameters.to_params(convolutions, make_table(model_config))


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays."""
    return parameters.make_table(model_config, _published_name, _published_shape)


def _published_name(path):
    """Returns the published name of a parameter.

    'features_0/kernel' is 'features.0.weight', 'lin0/kernel' is 'lin0.model.1.weight'.
    """
    path = re.sub(r"^lin\d", r"\g<0>/model/1", path)
    return parameters.to_torch_name(path.replace("_", "/"))


def _published_shape(path, shape):
    """Returns the published shape of a parameter."""
    shape = parameters.to_torch_shape(path, shape)
    # Linears are published as convolutions of 1x1.
    return (*shape, 1, 1) if len(shape) == 2 else shape


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns published name -> array from both FILES in a directory.

    Raises: FileNotFoundError; ValueError as `weights.read`.
    """
    tensors = {}
    for name in FILES:
        tensors |= weights.read(directory / name, "lpips")
    return tensors
