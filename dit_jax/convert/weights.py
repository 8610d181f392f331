"""Weights of one model: a file, or the directory that diffusers or transformers wrote."""

import os
import pathlib

import numpy as np

from dit_jax.convert import arrays, fields, layouts
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
MOST_NAME = 200  # characters of a file name; systems allow 255 bytes


def read(source: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """Reads the weights at `source`: name -> f32 array, without prefixes that all names share.

    Args:
      source: a file, or the directory that diffusers or transformers wrote. The weights in a
        directory are one or several files, of safetensors or torch.
      kind: a key of `formats.FORMATS`, or 'adm'.
    Raises: OSError; ValueError as `arrays.read`, `layouts.refuse` and `layouts.strip`, or if an
      index names a file outside of its directory.
    """
    paths = find(source, kind)
    # Names are read before the arrays: a file of the original code may have many GB.
    layouts.refuse([name for path in paths for name in arrays.describe(path)], kind, source)
    tensors = {}
    for path in paths:
        part = arrays.read(path)
        if duplicates := [name for name in part if name in tensors]:
            raise UserError(
                f"{files.printable(path)} and another file of its index both hold "
                f"{files.list_some(duplicates)}: remove it from one."
            )
        tensors |= part
    return layouts.strip(tensors, kind, source)


def refuse_layout(source: pathlib.Path, kind: str) -> None:
    """Raises if a file holds a whole model of the original code, judged by its names.

    A directory passes.
    Raises: as `arrays.describe` and `layouts.refuse`.
    """
    if not source.is_dir():
        layouts.refuse(arrays.describe(source), kind, source)


def directory(source: pathlib.Path) -> pathlib.Path:
    """Returns the directory of the weights: `source`, or its parent if it is a file."""
    return source if source.is_dir() else source.parent


def find(source: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Returns the files that hold the weights at `source`.

    Raises: as `read`.
    """
    if not source.is_dir() or kind not in WRITERS:
        return [source]
    writer, names = WRITERS[kind]
    for name in names:
        if (index := source / f"{name}.index.json").is_file():
            return _shards(index)
        if (source / name).is_file():
            return [source / name]
    raise MissingFileError(
        f"no {' or '.join(names)} in {files.printable(source)}, where {writer} writes weights"
        f"{_variants(source, names)}."
    )


def _variants(source, names):
    """Returns the end of a message: a hint at weights of lower precision in the directory."""
    for name in names:
        if variant := arrays.variants(source / name):
            return variant
        # If the weights are several files, their index has the precision in its name.
        for precision in ("fp16", "bf16"):
            other = f"{name}.index.{precision}.json"
            if (source / other).is_file():
                return f"; {other} is there: give a copy named {name}.index.json"
    return ""


def _shards(index):
    """Returns the files that an index names. All must be in its directory.

    Raises: ValueError for an index without names, or a name that is no file beside it.
    """
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
        is_name = len(name) <= MOST_NAME and path.name == name == files.printable(name)
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
