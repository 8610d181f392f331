"""Names of the arrays in weight files: the code that wrote a file, and prefixes of all names.

The original code of latent diffusion and Stable Diffusion keeps all parts of a model in one file.
Such files are not read here. They are recognised by the names of their arrays, and a message says
how to convert them with diffusers first.
"""

import collections
import logging
import pathlib
import re
from collections.abc import Collection, Mapping

import numpy as np

from dit_jax.errors import UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

# Parts of a name that torch's wrappers insert at any position: parallel, compiled and sharded
# models, and models with recomputed activations.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# First parts of all names of a model: the attribute of training code that held it, for a model of
# any kind and of one kind.
ATTRIBUTES = ("model", "ema_model", "net", "network")
ATTRIBUTES_BY_KIND = {
    "dit": ("dit", "transformer"),
    "vae": ("vae", "first_stage_model", "autoencoder"),
    "unet": ("unet",),
    "clip": ("text_encoder", "cond_stage_model", "transformer"),
    "dinov2": ("dinov2", "backbone"),
}
# Names in files of the original code. diffusers has down_blocks, mid_block and up_blocks instead.
UNET_OF_WHOLE_MODEL = re.compile(r"(^|\.)diffusion_model\.")
UNET = re.compile(r"(^|\.)input_blocks\.\d+\.")
VAE = re.compile(r"(^|\.)(en|de)coder\.(down|mid|up)\.")
CLIP_PREFIXES = ("cond_stage_model.transformer.", "cond_stage_model.model.")
TWO_CLIPS_PREFIX = "conditioner."


def refuse_original_code(names: Collection[str], kind: str, source: pathlib.Path) -> None:
    """Raises if a file is from the original code of Stable Diffusion or latent diffusion.

    Args:
      names: names of the arrays in the file.
      kind: kind of model that the command needs.
      source: the file, for messages.
    Raises: ValueError that says what the file is, and how to make diffusers' directory from it.
    """
    whole, unet, vae = (
        next(filter(pattern.search, names), None) for pattern in (UNET_OF_WHOLE_MODEL, UNET, VAE)
    )
    if kind == "adm":  # ADM's own names match UNET too
        unet = None
    example = whole or unet or vae
    if example is None:
        return
    # The most complete model is tested first, since its names match the later patterns too.
    if any(name.startswith(TWO_CLIPS_PREFIX) for name in names):
        model = "a Stable Diffusion XL"
        way_out = "It is not supported. Stable Diffusion 1 and 2 are."
    elif any(name.startswith(CLIP_PREFIXES) for name in names):
        model = "a Stable Diffusion, its UNet, VAE and text model in one"
        way_out = (
            f"{_suggest_diffusers('StableDiffusionPipeline', 'SD_DIR')}Then run `convert sd SD_DIR "
            "DST` for all of it, `convert unet SD_DIR/unet DST` for the UNet, or `convert vae "
            "SD_DIR/vae DST` for the VAE."
        )
    elif vae:
        model = "a latent diffusion without CLIP" if whole else "a VAE"
        way_out = (
            f"{_suggest_diffusers('AutoencoderKL', 'VAE_DIR')}Then run `convert vae VAE_DIR DST`."
        )
    else:
        model = "a UNet alone"
        way_out = (
            "If it is guided-diffusion's, run `convert adm`. If it is Stable Diffusion's, give the "
            "file of the whole model."
        )
    raise UserError(
        f"{files.printable(source)} has {len(names):,} names of the original code of latent "
        f"diffusion, such as {files.list_some([example])}: {model}.\n{way_out}"
    )


def _suggest_diffusers(class_name, directory):
    """Returns the part of a message that shows how diffusers makes its directory from the file."""
    return (
        "In Python, where diffusers and torch are installed, make diffusers' directory from it:\n"
        f'  diffusers.{class_name}.from_single_file("FILE").save_pretrained("{directory}")\n'
    )


def strip_prefixes(
    tensors: Mapping[str, np.ndarray], kind: str, source: pathlib.Path
) -> dict[str, np.ndarray]:
    """Returns the arrays without prefixes that wrappers and training code add to all names.

    The prefixes that are removed are logged.
    Args:
      tensors: name -> array.
      kind: kind of the model.
      source: the file, for messages.
    Raises: ValueError if only some names have a prefix, or two names become equal.
    """
    shown = files.printable(source)
    names = [name.split(".") for name in tensors]
    removed = [wrapper for wrapper in WRAPPERS if any(wrapper in parts for parts in names)]
    names = [[part for part in parts if part not in removed] for parts in names]
    attributes = {*ATTRIBUTES, *ATTRIBUTES_BY_KIND.get(kind, ())}
    # Attributes may be nested, as in ema_model.model. An attribute is a prefix only if every name
    # begins with it.
    counts = collections.Counter(parts[0] for parts in names if parts)
    while (
        len(counts) == 1 and attributes & counts.keys() and all(len(parts) > 1 for parts in names)
    ):
        removed += counts
        names = [parts[1:] for parts in names]
        counts = collections.Counter(parts[0] for parts in names)
    # An attribute of any kind before some of the names means that the file holds several models.
    attributes.update(*ATTRIBUTES_BY_KIND.values())
    models = [f"{counts[first]:,} with {first}." for first in counts if first in attributes]
    if len(counts) > 1 and models:
        raise UserError(
            f"{shown} has {len(names):,} names, {', '.join(models)} before them: it holds more "
            "than one model. Save the arrays of the model to convert in a file of their own."
        )
    stripped = dict(zip(map(".".join, names), tensors.values(), strict=True))
    if len(stripped) < len(tensors):
        raise UserError(
            f"{shown} has {len(tensors):,} names, but without {', '.join(removed)} only "
            f"{len(stripped):,} differ. Save the arrays of one model in a file of their own."
        )
    if removed:
        prefixes = ", ".join(f"{part}." for part in removed)
        logger.info("%s: its names are read without the prefixes %s", shown, prefixes)
    return stripped
