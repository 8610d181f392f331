"""Converter for Inception-2015 from the PyTorch copy of TensorFlow's weights.

torch-fidelity and pytorch-fid publish the same file, each under its own name. Its batch norms only
scale and shift the sums of a convolution. Here they are folded into the kernel and a bias, in f64.
The module then has convolutions only, and an accelerator applies bias and ReLU as it writes the
sums. The outputs equal a convolution followed by a batch norm, within rounding.
"""

from collections.abc import Mapping

import numpy as np

from dit_jax.convert import parameters

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
EPSILON = 1e-3  # added to the variance


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The classifier's bias and the counters of the batch norms are left out, if the file has them.
    """
    tensors = {
        name: array
        for name, array in tensors.items()
        if name != "fc.bias" and not name.endswith(".bn.num_batches_tracked")
    }
    parameters.check(tensors, list_published(model_config))
    # The folded kernel and bias take the place of the convolution's and the batch norm's.
    for conv in [name for name in tensors if name.endswith(".conv.weight")]:
        norm = conv.replace(".conv.weight", ".bn")
        weight, bias, mean, variance = (tensors.pop(f"{norm}.{leaf}") for leaf in BATCH_NORM)
        scale = weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
        tensors[conv] = tensors[conv] * scale.reshape(-1, 1, 1, 1)
        tensors[f"{norm}.bias"] = bias - mean * scale
    return parameters.to_params(tensors, _make_table(model_config))


def list_published(model_config) -> dict[str, parameters.Shape]:
    """Returns name -> shape of every array in the file that has a part in the parameters."""
    shapes = parameters.list_published(_make_table(model_config))
    for name in [name for name in shapes if name.endswith(".bn.bias")]:
        shapes |= {name.removesuffix("bias") + leaf: shapes[name] for leaf in BATCH_NORM}
    return shapes


def _make_table(model_config):
    """Returns parameter path -> published arrays; a bias is the batch norm's."""

    def published_name(path):
        if not path.startswith("fc/"):
            path = path.replace("/kernel", "/conv/kernel").replace("/bias", "/bn/bias")
        return parameters.to_torch_name(path)

    return parameters.make_table(model_config, published_name)
