"""Conversion of arrays under published names to parameters, and back, by a table of both.

A table has an entry for every parameter of the model. A file must hold exactly its arrays.

Published arrays have PyTorch's layouts: a convolution is [out, in, h, w], a Linear [out, in], and
every block has arrays of its own. Here they are [h, w, in, out] and [in, out], and equal blocks are
stacked.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.traverse_util
import numpy as np

from dit_jax import models
from dit_jax.errors import UserError
from dit_jax.system import files

Shape = tuple[int, ...]
# Last part of a parameter's path -> last part of its published name, where they differ.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Entry(NamedTuple):
    """The shape of a parameter, and the published arrays that it is made from."""

    shape: Shape
    published: dict[str, Shape]  # name -> shape; one for each block if the blocks are stacked


def get_shapes(model_config) -> dict[str, Shape]:
    """Returns path -> shape of every parameter of the model, without allocating any."""
    shapes = models.param_shapes(models.build(model_config))
    return {path: s.shape for path, s in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def to_torch_name(path: str) -> str:
    """Returns PyTorch's name of a parameter: 'norm1/scale' is 'norm1.weight'."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, LEAVES.get(leaf, leaf)])


def to_diffusers_name(path: str) -> str:
    """Returns diffusers' name of a parameter of a VAE or a UNet.

    'mid_block/resnets_0/norm1/scale' is 'mid_block.resnets.0.norm1.weight'.
    """
    # A number is a module of its own, except in linear_1 and linear_2.
    path = re.sub(r"(?<!linear)_(\d+)(?=[_/])", r"/\1", path)
    return to_torch_name(re.sub(r"(/\d+)_", r"\1/", path))


def to_linear_shape(path: str, shape: Shape) -> Shape:
    """Returns PyTorch's shape of a parameter of a Linear, a norm or an embedding."""
    # In the file, one axis joins the heads, q, k and v, or the two parts of GEGLU.
    if path.endswith("/kernel"):
        return math.prod(shape[1:]), shape[0]
    return (math.prod(shape),) if path.endswith("/bias") else shape


def to_torch_shape(path: str, shape: Shape) -> Shape:
    """Returns PyTorch's shape of a parameter; a kernel of rank 4 is a convolution's."""
    if path.endswith("/kernel") and len(shape) == 4:
        return tuple(shape[axis] for axis in (3, 2, 0, 1))
    return to_linear_shape(path, shape)


def from_torch(path: str, array: np.ndarray) -> np.ndarray:
    """Returns a published array with its axes in the parameter's order."""
    return array.transpose(_axis_order(path, array.ndim))


def to_torch(path: str, array: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns a parameter, or its slice of one block, in its published shape."""
    axes = _axis_order(path, len(shape))
    array = array.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return np.ascontiguousarray(array)


def _axis_order(path, rank):
    """Returns the published array's axes in the parameter's order."""
    if not path.endswith("kernel"):
        return tuple(range(rank))
    return (2, 3, 1, 0) if rank == 4 else (1, 0)


def make_table(
    model_config,
    published_name: Callable[[str], str],
    published_shape: Callable[[str, Shape], Shape] = to_torch_shape,
) -> dict[str, Entry]:
    """Returns parameter path -> Entry.

    Args:
      published_name: parameter path -> name. If the blocks are stacked, {} is the block's number.
      published_shape: (parameter path, shape without the axis of blocks) -> published shape.
    """
    table = {}
    for path, shape in get_shapes(model_config).items():
        name = published_name(path)
        if "{}" in name:
            depth, *block_shape = shape
        else:
            depth, block_shape = 1, shape
        shape_in_file = published_shape(path, tuple(block_shape))
        table[path] = Entry(shape, {name.format(i): shape_in_file for i in range(depth)})
    return table


def list_published(table: Mapping[str, Entry]) -> dict[str, Shape]:
    """Returns name -> shape of all published arrays of a table."""
    return {name: shape for entry in table.values() for name, shape in entry.published.items()}


def to_params(
    tensors: Mapping[str, np.ndarray],
    table: Mapping[str, Entry],
    to_parameter: Callable[[str, np.ndarray], np.ndarray] = from_torch,
) -> dict:
    """Returns the parameter tree, f32, of published arrays.

    Args:
      tensors: published name -> array.
      table: result of `make_table`.
      to_parameter: (parameter path, published array) -> the array with its axes in the parameter's
        order.
    Raises: ValueError as `check`.
    """
    check(tensors, list_published(table))
    params = {}
    for path, (shape, published) in table.items():
        parts = [to_parameter(path, np.asarray(tensors[name], np.float32)) for name in published]
        # For a single array the reshape removes the stack axis again, and splits joined axes.
        params[path] = np.ascontiguousarray(np.stack(parts).reshape(shape))
    return flax.traverse_util.unflatten_dict(params, sep="/")


def check(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> None:
    """Raises unless the arrays have exactly the expected names and shapes, and finite values.

    Raises: ValueError that counts and lists missing names, unexpected names and wrong shapes, or
      the names of arrays with NaN or infinity.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in tensors.items()}
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    unexpected = [f"{name} {shape}" for name, shape in shapes.items() if name not in expected]
    wrong_shapes = [
        f"{name} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if missing or unexpected or wrong_shapes:
        raise UserError(
            "the checkpoint does not fit the model.\n"
            f"  missing ({len(missing)}): {files.list_some(missing)}\n"
            f"  unexpected ({len(unexpected)}): {files.list_some(unexpected)}\n"
            f"  wrong shape ({len(wrong_shapes)}): {files.list_some(wrong_shapes)}\n"
            "Check the model's sizes in the config, and that the file holds this model."
        )
    if not_finite := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise UserError(
            f"{len(not_finite)} of the checkpoint's {len(tensors)} tensors hold NaN or infinity, "
            f"such as {files.list_some(not_finite[:3])}.\n"
            "Download the file again, and compare its SHA-256 with docs/weights.md. If the SHA-256 "
            "is right, the model itself is broken."
        )
