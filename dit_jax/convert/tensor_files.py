"""Reader of files of named arrays, and their conversion to a parameter tree.

A file must hold exactly the arrays that the model is made of.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from dit_jax import models
from dit_jax.convert import torch_files
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, npz_files

Shape = tuple[int, ...]
# The last part of the name of torch's integer position tables, which are buffers and no weights.
# Integers of rank 0 or 1 count steps and the like.
POSITIONS = "position_ids"
# safetensors' names of the number types that NumPy reads.
DTYPES = {
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"),
    *("U64", "U32", "U16", "U8", "BOOL"),
}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a .npz, .safetensors or torch.save file (.pt, .pth, .bin, .ckpt): name -> f32 array.

    No code in the file is run. The arrays take at most `npz_files.most_bytes` of memory. If some
    names in a .npz begin with 'w/', only these arrays are read, without the prefix.
    Raises: as `describe`; ValueError for integer weights, as in a quantised model.
    """
    describe(path)
    tensors = _parse(path, READERS[path.suffix][1])
    integer_dtypes = {
        n: a.dtype for n, a in tensors.items() if a.dtype.kind in "biu" and a.ndim > 1
    }
    integers = [
        f"{n} ({t})" for n, t in integer_dtypes.items() if n.rpartition(".")[2] != POSITIONS
    ]
    if integers:
        raise UserError(
            f"{files.printable(path)} has weights that are no floating-point numbers: "
            f"{files.list_some(integers)}. Those of a quantised model cannot be converted: give "
            "the file in float32, float16 or bfloat16."
        )
    for name, array in tensors.items():  # one at a time, so that few are held in two dtypes
        tensors[name] = np.asarray(array, np.float32)
    return tensors


def describe(path: pathlib.Path) -> dict[str, Shape]:
    """Returns name -> shape of the arrays in a file that `read` reads, without their values.

    Raises: OSError; ValueError for another suffix, a damaged file, contents that are not arrays of
      numbers, or arrays that take more than `npz_files.most_bytes`.
    """
    shown = files.printable(path)
    if path.is_dir():
        raise UserError(f"{shown} is a directory: give the file in it.")
    if not path.is_file():
        raise MissingFileError(f"no checkpoint file at {shown}{variants(path)}.")
    if path.suffix not in READERS:
        raise UserError(f"cannot read {shown}: expected {', '.join(READERS)}.")
    shapes = _parse(path, READERS[path.suffix][0])
    if empty := [f"{name} {shape}" for name, shape in shapes.items() if 0 in shape]:
        raise UserError(f"{shown} has arrays without any number: {files.list_some(empty)}.")
    # 4 bytes for each number: `read` converts all arrays to f32.
    npz_files.check_bytes(path, 4 * sum(map(math.prod, shapes.values())))
    return shapes


def variants(path: pathlib.Path) -> str:
    """Returns the end of a message about missing weights: a hint at lower-precision files."""
    for precision in ("fp16", "bf16"):
        other = path.with_suffix(f".{precision}{path.suffix}")
        if other.is_file():
            names = files.printable(other.name), files.printable(path.name)
            return f"; {names[0]} is there: give a copy named {names[1]}, which is read as f32"
    return ""


def _parse(path: pathlib.Path, reader: Callable[[pathlib.Path], Any]) -> Any:
    """Returns reader(path); the error for a damaged file tells where to compare its digest."""
    try:
        return npz_files.parse(path, reader)
    except npz_files.DamagedFileError as error:
        raise UserError(
            f"{error}\nDownload it again, and compare its size and SHA-256 with docs/weights.md."
        ) from error


def _describe_npz(path):
    described = npz_files.describe_npz(path)
    named = {name: described[name] for name in _npz_names(described)}
    _refuse({n: str(a.dtype) for n, a in named.items() if a.dtype.kind not in "biuf"})
    return {name.removeprefix("w/"): array.shape for name, array in named.items()}


def _read_npz(path):
    names = _npz_names(npz_files.describe_npz(path))
    return {n.removeprefix("w/"): array for n, array in npz_files.read_npz(path, names).items()}


def _npz_names(described):
    """Returns the names that begin with 'w/', or all names if none does."""
    return [name for name in described if name.startswith("w/")] or list(described)


def _describe_safetensors(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
        _refuse({name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES})
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def _describe_torch(path):
    return {name: tensor.shape for name, tensor in torch_files.describe(path).items()}


def _refuse(others):
    """Raises ValueError if `others`, {name: dtype} of arrays that are not numbers, has any."""
    if others:
        kinds = [f"{name} ({dtype})" for name, dtype in others.items()]
        raise UserError(f"it holds more than real numbers: {files.list_some(kinds)}")


_TORCH = _describe_torch, torch_files.read
# Suffix -> (reader of names and shapes, reader of arrays).
READERS = {
    ".npz": (_describe_npz, _read_npz),
    ".safetensors": (_describe_safetensors, safetensors.numpy.load_file),
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".bin": _TORCH,
    ".ckpt": _TORCH,
}


def to_params(
    found: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    published: Mapping[str, Mapping[str, Shape]],
    to_parameter: Callable[[str, np.ndarray], np.ndarray],
) -> dict:
    """Returns the parameter tree, f32, made of exactly these published arrays.

    Args:
      found: published name -> array.
      shapes: parameter path -> shape.
      published: parameter path -> {published name: shape}, with one name per block if it is
        stacked.
      to_parameter: (parameter path, published array) -> the array with its axes in the parameter's
        order.
    Raises: ValueError as `check`.
    """
    check(found, {name: shape for part in published.values() for name, shape in part.items()})
    params = {}
    for path, shape in shapes.items():
        parts = [
            to_parameter(path, np.asarray(found[name], np.float32)) for name in published[path]
        ]
        # Blocks are stacked. For a single array the reshape removes the stack axis again.
        params[path] = np.ascontiguousarray(np.stack(parts).reshape(shape))
    return flax.traverse_util.unflatten_dict(params, sep="/")


def check(found: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> None:
    """Raises unless the arrays have exactly the expected names and shapes, and finite values.

    Raises: ValueError with the number and the first of missing names, unexpected names and wrong
      shapes, or of the names with NaN or infinity.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in found.items()}
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    unexpected = [f"{name} {shape}" for name, shape in shapes.items() if name not in expected]
    differing = [
        f"{name} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if missing or unexpected or differing:
        raise UserError(
            "the checkpoint does not fit the model.\n"
            f"  missing ({len(missing)}): {files.list_some(missing)}\n"
            f"  unexpected ({len(unexpected)}): {files.list_some(unexpected)}\n"
            f"  wrong shape ({len(differing)}): {files.list_some(differing)}\n"
            "Check the model's sizes in the config, and that the file holds this model."
        )
    if broken := [name for name, array in found.items() if not np.isfinite(array).all()]:
        raise UserError(
            f"{len(broken)} of the checkpoint's {len(found)} tensors hold NaN or infinity, such as "
            f"{files.list_some(broken[:3])}.\n"
            "Download it again, and compare its SHA-256 with docs/weights.md; if that is right, "
            "the model itself is broken."
        )


def parameter_shapes(model_config) -> dict[str, Shape]:
    """Returns path -> shape of every parameter of the model, without allocating any."""
    init = functools.partial(models.init_params, models.build(model_config))
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}
