"""Weights of one model in a file, or in a directory as diffusers and transformers write it."""

import os
import pathlib

import numpy as np

from dit_jax.convert import arrays, fields, layouts
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
# Of each kind that may be a directory: who writes it, and the names of the weights, the first of
# which is preferred.
WRITERS = {
    "dit": ("diffusers", DIFFUSERS),
    "vae": ("diffusers", DIFFUSERS),
    "unet": ("diffusers", DIFFUSERS),
    "clip": ("transformers", TRANSFORMERS),
    "dinov2": ("transformers", TRANSFORMERS),
}
MOST_NAME = 200  # characters of a file's name; systems take 255 bytes


def read(source: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """Reads the weights at `source`: name -> f32 array, without prefixes that all names share.

    Args: source, a file, or the directory that diffusers or transformers wrote, with the weights in
      one file or several, as safetensors or torch's.   kind: of `convert.FORMATS`, or 'adm'.
    Raises: OSError; ValueError as `arrays.read`, `layouts.refuse` and `layouts.strip`, and for an
      index that names what is not in its directory.
    """
    paths = find(source, kind)
    layouts.refuse([name for path in paths for name in arrays.describe(path)], kind, source)
    found = {}
    for path in paths:
        part = arrays.read(path)
        if twice := [name for name in part if name in found]:
            raise UserError(
                f"{files.printable(path)} and another file of its index both hold "
                f"{files.list_some(twice)}: remove it from one."
            )
        found |= part
    return layouts.strip(found, kind, source)


def refuse_layout(source: pathlib.Path, kind: str) -> None:
    """Demands that a file is no whole model of other code, by its names; directories pass.

    Raises: as `arrays.describe` and `layouts.refuse`.
    """
    if not source.is_dir():
        layouts.refuse(arrays.describe(source), kind, source)


def directory(source: pathlib.Path) -> pathlib.Path:
    """The directory of the files beside the weights: `source`, or the one that it lies in."""
    return source if source.is_dir() else source.parent


def find(source: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """The files that hold the weights at `source`.   Raises: as `read`."""
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
    """What lies there in lower precision."""
    for name in names:
        if variant := arrays.variants(source / name):
            return variant
        for precision in ("fp16", "bf16"):
            other = f"{name}.index.{precision}.json"
            if (source / other).is_file():
                return f"; {other} is there: give a copy named {name}.index.json"
    return ""


def _shards(index):
    """The files that an index names, all of them in its directory."""
    shown = files.printable(index)
    by_name = fields.read(index, "the index of files that hold weights").get("weight_map")
    names = list(by_name.values()) if isinstance(by_name, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{shown} has no weight_map of names to files: download it again.")
    suffix = pathlib.Path(index.name.removesuffix(".index.json")).suffix
    shards = []
    for name in dict.fromkeys(names):
        path = index.parent / name
        is_name = len(name) <= MOST_NAME and path.name == name == files.printable(name)
        if not is_name or path.suffix != suffix or not _is_inside(path, index.parent):
            raise UserError(
                f"{shown} names the file {fields.show(name)}: each must be a {suffix} beside it, "
                "and no link to another place. If it is yours, copy the file there."
            )
        shards.append(path)
    return shards


def _is_inside(path, directory):
    """Whether a file is in the directory, or where the cache of Hugging Face's hub keeps it."""
    real = pathlib.Path(os.path.realpath(path))
    is_cached = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return is_cached or real.parent == pathlib.Path(os.path.realpath(directory))
