"""Converter for Inception-2015, whose arrays have the names of its copy in PyTorch.

torch-fidelity and pytorch-fid publish the same file. A batch norm in it only scales and shifts the
outputs of a convolution. Here it is folded into the kernel and a bias, in f64, and the outputs are
the same within rounding. The module then has convolutions only, and an accelerator can apply the
bias and ReLU while it writes the outputs.
"""

from collections.abc import Mapping

import numpy as np

from dit_jax.convert import parameters

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
EPSILON = 1e-3  # added to the variance of a batch norm


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The bias of the classifier and the counters of the batch norms are left out.
    """
    tensors = {
        name: array
        for name, array in tensors.items()
        if name != "fc.bias" and not name.endswith(".bn.num_batches_tracked")
    }
    parameters.check(tensors, list_published(model_config))
    # The folded arrays keep the names of the convolution's kernel and the batch norm's bias.
    for conv in [name for name in tensors if name.endswith(".conv.weight")]:
        norm = conv.replace(".conv.weight", ".bn")
        weight, bias, mean, variance = (tensors.pop(f"{norm}.{leaf}") for leaf in BATCH_NORM)
        scale = weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
        tensors[conv] = tensors[conv] * scale.reshape(-1, 1, 1, 1)
        tensors[f"{norm}.bias"] = bias - mean * scale
    return parameters.to_params(tensors, make_table(model_config))


def list_published(model_config) -> dict[str, parameters.Shape]:
    """Returns name -> shape of every array in the file that the parameters depend on."""
    shapes = parameters.list_published(make_table(model_config))
    for name in [name for name in shapes if name.endswith(".bn.bias")]:
        shapes |= {name.removesuffix("bias") + leaf: shapes[name] for leaf in BATCH_NORM}
    return shapes


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> arrays after folding, under their published names."""
    return parameters.make_table(model_config, _published_name)


def _published_name(path):
    """Returns the published name of a parameter."""
    if not path.startswith("fc/"):
        path = path.replace("/kernel", "/conv/kernel").replace("/bias", "/bn/bias")
    return parameters.to_torch_name(path)
