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

    No code in the file is run. The arrays take at most `npz_files.max_bytes` of memory. If some
    names in a .npz begin with 'w/', only these arrays are read, without the prefix.
    Raises: as `describe`; ValueError for integer weights, as in a quantised model.
    """
    describe(path)
    tensors = _parse(path, READERS[path.suffix][1])
    integers = [
        f"{name} ({array.dtype})"
        for name, array in tensors.items()
        if array.dtype.kind in "biu" and array.ndim > 1 and name.rpartition(".")[2] != POSITIONS
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
        raise UserError(f"{shown} has arrays without any number: {files.list_some(empty)}.")
    # 4 bytes for each number: `read` converts all arrays to f32.
    npz_files.check_bytes(path, 4 * sum(map(math.prod, shapes.values())))
    return shapes


def suggest_variant(path: pathlib.Path) -> str:
    """Returns the end of a message about missing weights: a hint at lower-precision files."""
    index = path.with_name(f"{path.name}.index.json")  # of weights in several files
    for plain in (path, index):
        for precision in ("fp16", "bf16"):
            other = plain.with_suffix(f".{precision}{plain.suffix}")
            if other.is_file():
                names = files.printable(other.name), files.printable(plain.name)
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
    arrays = _select(npz_files.describe_npz(path))
    _refuse({n: str(a.dtype) for n, a in arrays.items() if a.dtype.kind not in "biuf"})
    return {name.removeprefix("w/"): array.shape for name, array in arrays.items()}


def _read_npz(path):
    arrays = npz_files.read_npz(path, _select(npz_files.describe_npz(path)))
    return {name.removeprefix("w/"): array for name, array in arrays.items()}


def _select(arrays):
    """Returns the arrays whose names begin with 'w/', or all if none does."""
    return {n: a for n, a in arrays.items() if n.startswith("w/")} or arrays


def _describe_safetensors(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
        _refuse({name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES})
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def _refuse(dtypes):
    """Raises ValueError if there are any: {name: dtype} of arrays that are not numbers."""
    if dtypes:
        shown = [f"{name} ({dtype})" for name, dtype in dtypes.items()]
        raise UserError(f"it holds more than real numbers: {files.list_some(shown)}")


# Suffix -> (reader of names and shapes, reader of arrays).
READERS = {
    ".npz": (_describe_npz, _read_npz),
    ".safetensors": (_describe_safetensors, safetensors.numpy.load_file),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (torch_files.describe, torch_files.read)),
}
