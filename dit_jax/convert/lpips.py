"""Parameters of LPIPS: VGG-16 as torchvision publishes it, and the linear weights of LPIPS 0.1."""

import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import arrays, weights

FILES = ("vgg16-397923af.pth", "vgg.pth")  # torchvision's, LPIPS's


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The published names and arrays of both files in a directory.

    Raises: FileNotFoundError; ValueError as `weights.read`.
    """
    found = {}
    for name in FILES:
        found |= weights.read(directory / name, "lpips")
    return found


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Our parameters from the published names; see `convert.load`. The classifier is left out."""
    found = {name: a for name, a in found.items() if not name.startswith("classifier.")}
    shapes = arrays.parameter_shapes(model_config)
    published = {
        path: {_published_name(path): _published_shape(shape)} for path, shape in shapes.items()
    }
    return arrays.to_params(found, shapes, published, _to_ours)


def _published_name(path):
    """'features_0/kernel' is 'features.0.weight', 'lin0/kernel' is 'lin0.model.1.weight'."""
    module, leaf = path.split("/")
    module = module.replace("_", ".") if "_" in module else f"{module}.model.1"
    return f"{module}.{'weight' if leaf == 'kernel' else leaf}"


def _published_shape(shape):
    if len(shape) == 2:  # Linears are 1x1 convolutions there
        return shape[1], shape[0], 1, 1
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def _to_ours(_, array):
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
