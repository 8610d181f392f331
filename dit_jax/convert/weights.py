"""Weights of one model: a file, or the directory that diffusers or transformers wrote."""

import os
import pathlib

import numpy as np

from dit_jax.convert import array_names, fields, tensor_files
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
# Kind that may be a directory -> (who writes it, possible names of the weights, the preferred one
# first).
WRITERS = {
    "dit": ("diffusers", DIFFUSERS),
    "vae": ("diffusers", DIFFUSERS),
    "unet": ("diffusers", DIFFUSERS),
    "clip": ("transformers", TRANSFORMERS),
    "dinov2": ("transformers", TRANSFORMERS),
}
MAX_NAME = 200  # characters of a file name; systems allow 255 bytes


def read(source: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """Reads the weights at `source`: name -> f32 array, without prefixes that all names share.

    Args:
      source: a file, or the directory that diffusers or transformers wrote. The weights in a
        directory are one or several files, of safetensors or torch.
      kind: a key of `conversions.FORMATS`, or 'adm'.
    Raises: OSError; ValueError as `tensor_files.read`, `array_names.refuse_original_code` and
      `array_names.strip_prefixes`, or if an index names a file outside of its directory.
    """
    paths = _find(source, kind)
    # Names are read before the arrays: a file of the original code may have many GB.
    names = [name for path in paths for name in tensor_files.describe(path)]
    array_names.refuse_original_code(names, kind, source)
    tensors = {}
    for path in paths:
        part = tensor_files.read(path)
        if duplicates := [name for name in part if name in tensors]:
            raise UserError(
                f"{files.printable(path)} and another file of its index both hold "
                f"{files.list_some(duplicates)}: remove it from one."
            )
        tensors |= part
    return array_names.strip_prefixes(tensors, kind, source)


def find_config(source: pathlib.Path, kind: str) -> pathlib.Path:
    """Returns the path of config.json beside the weights, whether it is there or not.

    Raises: for a file as `array_names.refuse_original_code`; such a file has no config.json.
    """
    if not source.is_dir():
        array_names.refuse_original_code(tensor_files.describe(source), kind, source)
        source = source.parent
    return source / "config.json"


def _find(source, kind):
    """Returns the files that hold the weights at `source`."""
    if not source.is_dir() or kind not in WRITERS:
        return [source]
    writer, names = WRITERS[kind]
    for name in names:
        if (index := source / f"{name}.index.json").is_file():
            return _list_shards(index)
        if (source / name).is_file():
            return [source / name]
    hints = (tensor_files.suggest_variant(source / name) for name in names)
    raise MissingFileError(
        f"no {' or '.join(names)} in {files.printable(source)}, where {writer} writes weights"
        f"{next(filter(None, hints), '')}."
    )


def _list_shards(index):
    """Returns the files that an index names, all of which must be in its directory."""
    shown = files.printable(index)
    by_name = fields.read(index, "the index of files that hold weights").get("weight_map")
    names = list(by_name.values()) if isinstance(by_name, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{shown} has no weight_map of names to files: download it again.")
    suffix = pathlib.Path(index.name.removesuffix(".index.json")).suffix
    shards = []
    for name in dict.fromkeys(names):
        path = index.parent / name
        # An index from a stranger must not lead to files elsewhere.
        is_name = len(name) <= MAX_NAME and path.name == name == files.printable(name)
        if not is_name or path.suffix != suffix or not _is_inside(path, index.parent):
            raise UserError(
                f"{shown} names the file {fields.show(name)}: each must be a {suffix} beside it, "
                "and no link to another place. If it is yours, copy the file there."
            )
        shards.append(path)
    return shards


def _is_inside(path, directory):
    """Returns whether a file is in the directory, or in the cache of Hugging Face's hub.

    The cache has links in a model's directory to files in its directory blobs/.
    """
    real = pathlib.Path(os.path.realpath(path))
    is_cached = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return is_cached or real.parent == pathlib.Path(os.path.realpath(directory))
