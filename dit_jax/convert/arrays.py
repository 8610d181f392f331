"""Files of named arrays, and our parameters from exactly the arrays that a model is made of."""

import argparse
import functools
import importlib.util
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from dit_jax import models

Shape = tuple[int, ...]


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The name -> f32 array mapping in a .npz, .safetensors or .pt (.pth, .bin) file.

    Raises: OSError; ValueError for another suffix, a .pt without torch installed, a .pt that holds
      anything but tensors, or as `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}{variants(path)}.")
    if path.suffix not in READERS:
        raise ValueError(f"cannot read {path}: expected .npz, .safetensors or .pt.")
    if READERS[path.suffix] is _read_torch and importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"reading {path} needs torch, which is not installed: install torch, or save the "
            "tensors as .safetensors where it is."
        )
    found = parse(path, READERS[path.suffix])
    if others := [name for name, value in found.items() if not isinstance(value, np.ndarray)]:
        raise ValueError(f"{path} holds more than tensors: {', '.join(others)}.")
    return found


def variants(path: pathlib.Path) -> str:
    """What a message of missing weights adds if those of lower precision lie beside them."""
    for precision in ("fp16", "bf16"):
        other = path.with_suffix(f".{precision}{path.suffix}")
        if other.is_file():
            return f"; {other.name} is there: give a copy named {path.name}, which is read as f32"
    return ""


def parse(path: pathlib.Path, reader: Callable[[pathlib.Path], Any]) -> Any:
    """What the reader makes of a published file.

    Raises: OSError; ValueError that says how the file begins if the reader cannot read it.
    """
    with path.open("rb") as file:  # what the system refuses is no damage
        beginning = file.read(20)
    try:
        return reader(path)
    except (MemoryError, ImportError):
        raise
    # NumPy, zipfile, safetensors, torch and JSON each have their own for a damaged file.
    except Exception as error:
        reason = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(
            f"cannot read {path}: {type(error).__name__}: {reason}\n"
            f"Its {path.stat().st_size:,} bytes begin with {beginning!r}: it is cut short, "
            f"damaged, no {path.suffix} file, or holds more than it should.\n"
            "Download it again, and compare its size and SHA-256 with docs/weights.md."
        ) from error


def _read_npz(path):
    with np.load(path) as file:
        prefixed = [name for name in file.files if name.startswith("w/")]
        names = prefixed or file.files
        return {name.removeprefix("w/"): np.asarray(file[name], np.float32) for name in names}


def _read_safetensors(path):
    from safetensors.numpy import load_file  # JAX has taught NumPy bfloat16

    return {name: np.asarray(a, np.float32) for name, a in load_file(path).items()}


def _read_torch(path):
    import torch

    try:
        # The published training checkpoints also hold their command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Around its reason torch says how to run the file's code all the same.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition(". ")[0]
        raise pickle.UnpicklingError(
            f"it must hold tensors alone, as running a file's code is not safe: {reason}"
        ) from error
    # Training checkpoints of the published code hold {'model', 'ema', 'opt', ...}.
    tensors = contents.get("ema", contents)
    return {
        name: value.float().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in tensors.items()
    }


READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}


def to_params(
    found: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    published: Mapping[str, Mapping[str, Shape]],
    to_ours: Callable[[str, np.ndarray], np.ndarray],
) -> dict:
    """Our parameter tree, f32, from exactly the published arrays that it is made of.

    Args:
      found: published name -> array.   shapes: our path -> our shape.
      published: our path -> {name: shape} of the published array, or of every block's.
      to_ours(our path, published array): the array, its axes in our order.
    Raises: ValueError as `check`.
    """
    check(found, {name: shape for part in published.values() for name, shape in part.items()})
    params = {}
    for path, shape in shapes.items():
        arrays = [to_ours(path, np.asarray(found[name], np.float32)) for name in published[path]]
        params[path] = np.ascontiguousarray(np.stack(arrays).reshape(shape))
    return flax.traverse_util.unflatten_dict(params, sep="/")


def check(found: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> None:
    """Demands of the arrays exactly the expected names and shapes, and finite values.

    Raises: ValueError that lists missing names, unexpected names and differing shapes, or the first
      names with NaN or infinity.
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
        raise ValueError(
            "the checkpoint does not fit the model.\n"
            f"  missing ({len(missing)}): {', '.join(missing) or 'none'}\n"
            f"  unexpected ({len(unexpected)}): {', '.join(unexpected) or 'none'}\n"
            f"  wrong shape ({len(differing)}): {', '.join(differing) or 'none'}\n"
            "Check the model's sizes in the config, and that the file holds this model."
        )
    if broken := [name for name, array in found.items() if not np.isfinite(array).all()]:
        raise ValueError(
            f"{len(broken)} of the checkpoint's {len(found)} tensors hold NaN or infinity, such as "
            f"{', '.join(broken[:3])}.\n"
            "Download it again, and compare its SHA-256 with docs/weights.md; if that is right, "
            "the model itself is broken."
        )


def parameter_shapes(model_config) -> dict[str, Shape]:
    """Path -> shape of every parameter of the model, without allocating any."""
    init = functools.partial(models.init_params, models.build(model_config))
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}
