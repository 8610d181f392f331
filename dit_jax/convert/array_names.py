"""Names of the arrays in weight files: who wrote a file, and which prefixes all names share.

The original code of latent diffusion and Stable Diffusion keeps all parts of a model in one file.
Such files are not read here. They are recognised by their names, and a message says how to convert
them first.
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

# Modules of torch's wrappers, anywhere in a name: parallel, compiled and sharded models, and models
# with recomputed activations.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Attributes of training code that hold a model, and so begin all its names. First for any model,
# then for one kind.
HOLDERS = ("model", "ema_model", "net", "network")
HOLDERS_BY_KIND = {
    "dit": ("dit", "transformer"),
    "vae": ("vae", "first_stage_model", "autoencoder"),
    "unet": ("unet",),
    "clip": ("text_encoder", "cond_stage_model", "transformer"),
    "dinov2": ("dinov2", "backbone"),
}
# Names in files of the original code. diffusers has down_blocks, mid_block and up_blocks instead.
WHOLE = re.compile(r"(^|\.)diffusion_model\.")
UNET = re.compile(r"(^|\.)input_blocks\.\d+\.")
VAE = re.compile(r"(^|\.)(en|de)coder\.(down|mid|up)\.")
CLIP = ("cond_stage_model.transformer.", "cond_stage_model.model.")
TWO_CLIPS = "conditioner."


def refuse_original_code(names: Collection[str], kind: str, source: pathlib.Path) -> None:
    """Raises if a file is from the original code of Stable Diffusion or latent diffusion.

    Args:
      names: of the arrays in the file.
      kind: of the model that the command needs.
      source: the file, for messages.
    Raises: ValueError that says what the file is, and how to make diffusers' directory from it.
    """
    whole, unet, vae = (next(filter(pattern.search, names), None) for pattern in (WHOLE, UNET, VAE))
    if kind == "adm":  # its own names match UNET too
        unet = None
    if not (whole or unet or vae):
        return
    # The most complete model is tested first, since its names match the later patterns too.
    if any(name.startswith(TWO_CLIPS) for name in names):
        model, way_out = "a Stable Diffusion XL", "Not supported; versions 1 and 2 are."
    elif any(name.startswith(CLIP) for name in names):
        model = "a Stable Diffusion, its UNet, VAE and text model in one"
        way_out = (
            f"{_by_diffusers('StableDiffusionPipeline', 'SD_DIR')}Then `convert sd SD_DIR DST` "
            "takes all, `convert unet SD_DIR/unet DST` or `convert vae SD_DIR/vae DST` a part."
        )
    elif vae:
        model = "a latent diffusion without CLIP" if whole else "a VAE"
        way_out = (
            f"{_by_diffusers('AutoencoderKL', 'VAE_DIR')}Then `convert vae VAE_DIR DST` takes the "
            "VAE."
        )
    else:
        model = "a UNet alone"
        way_out = (
            "Of Stable Diffusion's give the whole file, of which diffusers makes a directory; "
            "guided-diffusion's is for `convert adm`."
        )
    raise UserError(
        f"{files.printable(source)} has {len(names):,} names of the original code of latent "
        f"diffusion, such as {files.list_some([whole or unet or vae])}: {model}.\n{way_out}"
    )


def _by_diffusers(name, directory):
    """Returns the part of a message that shows how diffusers makes its directory from the file."""
    return (
        "In Python, where diffusers and torch are installed, make diffusers' directory of it:\n"
        f'  diffusers.{name}.from_single_file("FILE").save_pretrained("{directory}")\n'
    )


def strip_prefixes(
    tensors: Mapping[str, np.ndarray], kind: str, source: pathlib.Path
) -> dict[str, np.ndarray]:
    """Returns the arrays without the prefixes that all their names share, and logs the prefixes.

    Such prefixes come from wrappers and training code.
    Args:
      tensors: name -> array.
      kind: of the model.
      source: the file, for messages.
    Raises: ValueError if only some names have a prefix, or two names become equal.
    """
    shown = files.printable(source)
    names = [name.split(".") for name in tensors]
    removed = [wrapper for wrapper in WRAPPERS if any(wrapper in name for name in names)]
    names = [[part for part in name if part not in removed] for name in names]
    holders = {*HOLDERS, *HOLDERS_BY_KIND.get(kind, ())}
    # Holders may be nested, as in ema_model.model. One is a prefix only if every name begins with
    # it.
    heads = collections.Counter(name[0] for name in names if name)
    while len(heads) == 1 and holders & heads.keys() and all(len(name) > 1 for name in names):
        removed += heads
        names = [name[1:] for name in names]
        heads = collections.Counter(name[0] for name in names)
    # A holder of any kind before some of the names means that the file holds several models.
    holders.update(*HOLDERS_BY_KIND.values())
    if len(heads) > 1 and (held := [head for head in heads if head in holders]):
        counts = ", ".join(f"{heads[head]:,} with {head}." for head in held)
        raise UserError(
            f"{shown} has {len(names):,} names, {counts} before them: it holds more than one "
            "model. Save the arrays of the one that is meant by themselves."
        )
    stripped = dict(zip(map(".".join, names), tensors.values(), strict=True))
    if len(stripped) < len(tensors):
        raise UserError(
            f"{shown} has {len(tensors):,} names, but without {', '.join(removed)} only "
            f"{len(stripped):,} differ: save one model's arrays by themselves."
        )
    if removed:
        prefixes = ", ".join(f"{part}." for part in removed)
        logger.info("%s: its names are read without the prefixes %s", shown, prefixes)
    return stripped
