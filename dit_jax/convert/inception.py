"""Converter for Inception-2015 from the PyTorch copy of TensorFlow's weights.

torch-fidelity and pytorch-fid publish the same file, each under its own name. Its batch norms only
scale and shift the sums of a convolution. Here they are folded into the kernel and a bias, in f64.
The module then has convolutions only, and an accelerator applies bias and ReLU as it writes the
sums. The outputs equal a convolution followed by a batch norm, within rounding.
"""

from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from dit_jax.convert import arrays

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
EPSILON = 1e-3  # added to the variance


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The classifier's bias and the counters of the batch norms are left out, if the file has them.
    """
    found = {
        name: array
        for name, array in found.items()
        if name != "fc.bias" and not name.endswith(".bn.num_batches_tracked")
    }
    shapes = arrays.parameter_shapes(model_config)
    # One entry per kernel: the biases have no array of their own in the file.
    modules = {path.rpartition("/")[0]: shape for path, shape in shapes.items() if len(shape) > 1}
    arrays.check(found, _published_shapes(modules))
    params = {}
    for module in modules:
        name = module.replace("/", ".")
        if module == "fc":
            params["fc/kernel"] = np.ascontiguousarray(found["fc.weight"].T, np.float32)
        else:
            norm = (found[f"{name}.bn.{leaf}"] for leaf in BATCH_NORM)
            kernel, bias = _fold(found[f"{name}.conv.weight"], *norm)
            params |= {f"{module}/kernel": kernel, f"{module}/bias": bias}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _published_shapes(modules):
    """Returns name -> shape of every array in the file, from this project's kernel shapes."""
    expected = {}
    for module, shape in modules.items():
        name, width = module.replace("/", "."), shape[-1]
        if module == "fc":
            expected["fc.weight"] = shape[::-1]
        else:
            expected[f"{name}.conv.weight"] = (width, shape[2], *shape[:2])
            expected |= {f"{name}.bn.{leaf}": (width,) for leaf in BATCH_NORM}
    return expected


def _fold(kernel, weight, bias, mean, variance):
    """Returns (kernel [H, W, in, out], bias [out]) with the batch norm folded in."""
    scale = weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
    kernel = kernel.transpose(2, 3, 1, 0) * scale.reshape(1, 1, 1, -1)
    return np.ascontiguousarray(kernel, np.float32), np.float32(bias - mean * scale)
