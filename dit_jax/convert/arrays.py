"""Files of named arrays, and the demand that names and shapes are exactly the model's."""

import argparse
import functools
import pathlib
import pickle
from collections.abc import Mapping

import flax.traverse_util
import jax
import numpy as np

from dit_jax import models

Shape = tuple[int, ...]


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The name -> f32 array mapping in a .npz, .safetensors or .pt (.pth) file.

    Raises: FileNotFoundError; ValueError for another suffix, a .pt without torch installed, or a
      .pt that holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}.")
    if path.suffix == ".npz":
        with np.load(path) as file:
            prefixed = {k.removeprefix("w/"): file[k] for k in file.files if k.startswith("w/")}
            return prefixed or {k: file[k] for k in file.files}
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file  # JAX has taught NumPy bfloat16

        return {name: np.asarray(a, np.float32) for name, a in load_file(path).items()}
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path)
    raise ValueError(f"cannot read {path}: expected .npz, .safetensors or .pt.")


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs torch, which is not installed: install torch, or save the "
            "tensors as .safetensors where it is."
        ) from error
    try:
        # The published training checkpoints also hold their command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and running its code is not safe: {error}"
        ) from error
    # Training checkpoints of the published code hold {'model', 'ema', 'opt', ...}.
    tensors = tensors.get("ema", tensors)
    if not_tensors := [k for k, v in tensors.items() if not isinstance(v, torch.Tensor)]:
        raise ValueError(f"{path} holds more than tensors: {', '.join(not_tensors)}.")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def check_coverage(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Demands that two name -> shape mappings are equal.

    Raises: ValueError that lists missing names, unexpected names and differing shapes.
    """
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    unexpected = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
    differing = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or differing:
        raise ValueError(
            f"{what} does not fit the model.\n"
            f"  missing ({len(missing)}): {', '.join(missing) or 'none'}\n"
            f"  unexpected ({len(unexpected)}): {', '.join(unexpected) or 'none'}\n"
            f"  wrong shape ({len(differing)}): {', '.join(differing) or 'none'}\n"
            "Check the model's sizes in the config, and that the file holds this model."
        )


def parameter_shapes(model_config) -> dict[str, Shape]:
    """Path -> shape of every parameter of the model, without allocating any."""
    init = functools.partial(models.init_params, models.build(model_config))
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}
