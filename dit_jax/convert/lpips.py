"""Converter for LPIPS: torchvision's VGG-16, and the linear weights of LPIPS 0.1."""

import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import arrays, weights

FILES = ("vgg16-397923af.pth", "vgg.pth")  # torchvision's and LPIPS's


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns published name -> array from both files in a directory.

    Raises: FileNotFoundError; ValueError as `weights.read`.
    """
    tensors = {}
    for name in FILES:
        tensors |= weights.read(directory / name, "lpips")
    return tensors


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    VGG-16's classifier is left out.
    """
    found = {name: a for name, a in found.items() if not name.startswith("classifier.")}
    shapes = arrays.parameter_shapes(model_config)
    published = {
        path: {_published_name(path): _published_shape(shape)} for path, shape in shapes.items()
    }
    return arrays.to_params(found, shapes, published, _to_parameter)


def _published_name(path):
    """Returns the published name of a parameter.

    'features_0/kernel' is 'features.0.weight', 'lin0/kernel' is 'lin0.model.1.weight'.
    """
    module, leaf = path.split("/")
    module = module.replace("_", ".") if "_" in module else f"{module}.model.1"
    return f"{module}.{'weight' if leaf == 'kernel' else leaf}"


def _published_shape(shape):
    """Returns the published shape of a parameter."""
    if len(shape) == 2:  # LPIPS publishes its Linears as 1x1 convolutions
        return shape[1], shape[0], 1, 1
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def _to_parameter(_, array):
    """Returns one published array with its axes in the parameter's order."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
