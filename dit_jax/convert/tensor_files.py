"""Reader of one file of named arrays: .npz, .safetensors, or torch.save's."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from dit_jax.convert import torch_files
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, npz_files

# Last part of the names of torch's position tables, which hold integers but are no weights.
POSITION_IDS = "position_ids"
# safetensors' names of the number types that NumPy reads.
DTYPES = {
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"),
    *("U64", "U32", "U16", "U8", "BOOL"),
}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns name -> f32 array from a .npz, .safetensors, .pt, .pth, .bin or .ckpt file.

    No code in the file is run. The arrays take at most `npz_files.max_bytes` of memory. If some
    names in a .npz begin with 'w/', only these arrays are read, without the prefix.
    Raises: as `describe`; ValueError for integer weights, as in a quantised model.
    """
    describe(path)
    tensors = _parse(path, READERS[path.suffix][1])
    # Integers of rank 0 or 1 are no weights: they count steps, for example.
    integers = [
        f"{name} ({array.dtype})"
        for name, array in tensors.items()
        if array.dtype.kind in "biu" and array.ndim > 1 and name.split(".")[-1] != POSITION_IDS
    ]
    if integers:
        raise UserError(
            f"{files.printable(path)} has weights that are no floating-point numbers: "
            f"{files.list_some(integers)}. A quantised model cannot be converted: give its file in "
            "float32, float16 or bfloat16."
        )
    for name, array in tensors.items():  # one at a time, so that few are held in two dtypes
        tensors[name] = np.asarray(array, np.float32)
    return tensors


def describe(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the arrays in a file that `read` reads, without their values.

    Raises: OSError; ValueError for another suffix, a damaged file, contents that are not arrays of
      numbers, or arrays that take more than `npz_files.max_bytes`.
    """
    shown = files.printable(path)
    if path.is_dir():
        raise UserError(f"{shown} is a directory: give the file in it.")
    if not path.is_file():
        raise MissingFileError(f"no checkpoint file at {shown}{suggest_variant(path)}.")
    if path.suffix not in READERS:
        raise UserError(f"cannot read {shown}: expected {', '.join(READERS)}.")
    shapes = _parse(path, READERS[path.suffix][0])
    if empty := [f"{name} {shape}" for name, shape in shapes.items() if 0 in shape]:
        raise UserError(f"{shown} has empty arrays: {files.list_some(empty)}.")
    # 4 bytes for each number: `read` converts all arrays to f32.
    npz_files.check_bytes(path, 4 * sum(map(math.prod, shapes.values())))
    return shapes


def suggest_variant(path: pathlib.Path) -> str:
    """Returns the end of a message about a missing file: a hint at the file in half precision.

    It is empty if there is no such file.
    """
    index = path.with_name(f"{path.name}.index.json")  # of weights in several files
    for missing in (path, index):
        for precision in ("fp16", "bf16"):
            variant = missing.with_suffix(f".{precision}{missing.suffix}")
            if variant.is_file():
                found, name = files.printable(variant.name), files.printable(missing.name)
                return f"; {found} is there: give a copy named {name}, which is read as f32"
    return ""


def _parse(path: pathlib.Path, reader: Callable[[pathlib.Path], Any]) -> Any:
    """Returns reader(path). The error for a damaged file says where to compare its SHA-256."""
    try:
        return npz_files.parse(path, reader)
    except npz_files.DamagedFileError as error:
        raise UserError(
            f"{error}\nDownload it again, and compare its size and SHA-256 with docs/weights.md."
        ) from error


def _describe_npz(path):
    arrays = _select_prefixed(npz_files.describe_npz(path))
    others = {name: array.dtype for name, array in arrays.items() if array.dtype.kind not in "biuf"}
    _check_no_others(others)
    return {name.removeprefix("w/"): array.shape for name, array in arrays.items()}


def _read_npz(path):
    arrays = npz_files.read_npz(path, _select_prefixed(npz_files.describe_npz(path)))
    return {name.removeprefix("w/"): array for name, array in arrays.items()}


def _select_prefixed(arrays):
    """Returns the arrays whose names begin with 'w/', or all arrays if there are none."""
    return {name: array for name, array in arrays.items() if name.startswith("w/")} or arrays


def _describe_safetensors(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        dtypes = {name: array.get_dtype() for name, array in arrays.items()}
        _check_no_others({name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES})
        return {name: tuple(array.get_shape()) for name, array in arrays.items()}


def _check_no_others(others):
    """Raises ValueError if `others`, {name: dtype} of arrays of no real numbers, is not empty."""
    if others:
        shown = [f"{name} ({dtype})" for name, dtype in others.items()]
        raise UserError(f"it holds more than real numbers: {files.list_some(shown)}")


# Suffix -> (reader of names and shapes, reader of arrays).
READERS = {
    ".npz": (_describe_npz, _read_npz),
    ".safetensors": (_describe_safetensors, safetensors.numpy.load_file),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (torch_files.describe, torch_files.read)),
}
