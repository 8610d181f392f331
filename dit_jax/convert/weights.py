"""Weights of one model: a file, or the directory that diffusers or transformers wrote."""

import os
import pathlib

import numpy as np

from dit_jax.convert import array_names, fields, tensor_files
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
# Kind that may be a directory -> (library that writes it, possible file names of the weights). The
# first file name is preferred.
WRITERS = {
    "dit": ("diffusers", DIFFUSERS),
    "vae": ("diffusers", DIFFUSERS),
    "unet": ("diffusers", DIFFUSERS),
    "clip": ("transformers", TRANSFORMERS),
    "dinov2": ("transformers", TRANSFORMERS),
}
MAX_NAME_LENGTH = 200  # characters of a file name; systems allow 255 bytes


def read(source: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """Returns name -> f32 array, without prefixes that all names share.

    Args:
      source: a file, or the directory that diffusers or transformers wrote. The weights in a
        directory are one or several files, of safetensors or torch.
      kind: a key of `conversions.CONVERTERS`, or 'adm'.
    Raises: OSError; ValueError as `tensor_files.read`, `array_names.refuse_original_code` and
      `array_names.strip_prefixes`, or if an index names a file outside of its directory.
    """
    paths = _list_files(source, kind)
    # Names are read before the arrays: a file of the original code may have many GB.
    names = [name for path in paths for name in tensor_files.describe(path)]
    array_names.refuse_original_code(names, kind, source)
    tensors = {}
    for path in paths:
        tensors_in_file = tensor_files.read(path)
        if duplicates := [name for name in tensors_in_file if name in tensors]:
            raise UserError(
                f"{files.printable(path)} and another file of its index both hold "
                f"{files.list_some(duplicates)}. Remove them from one of the files."
            )
        tensors |= tensors_in_file
    return array_names.strip_prefixes(tensors, kind, source)


def find_config(source: pathlib.Path, kind: str) -> pathlib.Path:
    """Returns the path of config.json beside the weights, whether it exists or not.

    Raises: as `array_names.refuse_original_code` for a single file of the original code, since no
      config.json belongs to it.
    """
    if not source.is_dir():
        array_names.refuse_original_code(tensor_files.describe(source), kind, source)
        source = source.parent
    return source / "config.json"


def _list_files(source, kind):
    """Returns the files that hold the weights at `source`."""
    if not source.is_dir() or kind not in WRITERS:
        return [source]
    writer, file_names = WRITERS[kind]
    for file_name in file_names:
        if (index := source / f"{file_name}.index.json").is_file():
            return _list_shards(index)
        if (source / file_name).is_file():
            return [source / file_name]
    hints = (tensor_files.suggest_variant(source / file_name) for file_name in file_names)
    hint = next(filter(None, hints), "")
    raise MissingFileError(
        f"no {' or '.join(file_names)} in {files.printable(source)}, where {writer} writes weights"
        f"{hint}."
    )


def _list_shards(index):
    """Returns the files that an index names, after checking that they are in its directory."""
    shown = files.printable(index)
    weight_map = fields.read(index, "the index of files that hold weights").get("weight_map")
    file_names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not file_names or not all(isinstance(name, str) for name in file_names):
        raise UserError(f"{shown} has no weight_map of names to files: download it again.")
    suffix = pathlib.Path(index.name.removesuffix(".index.json")).suffix
    shards = []
    for name in dict.fromkeys(file_names):
        path = index.parent / name
        # An index from a stranger must not lead to files elsewhere.
        is_plain = len(name) <= MAX_NAME_LENGTH and path.name == name == files.printable(name)
        if not is_plain or path.suffix != suffix or not _is_inside(path, index.parent):
            raise UserError(
                f"{shown} names {fields.show(name)}, but may only name {suffix} files in its own "
                "directory that are no links to other directories. If the index is yours, copy the "
                "file there."
            )
        shards.append(path)
    return shards


def _is_inside(path, directory):
    """Returns whether a file is in the directory, or in the cache of Hugging Face's hub.

    In the cache, the files of a model are links to files in its subdirectory blobs/.
    """
    real = pathlib.Path(os.path.realpath(path))
    is_cached = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return is_cached or real.parent == pathlib.Path(os.path.realpath(directory))
