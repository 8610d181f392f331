"""Names in a file of weights: which code wrote it, and what wrappers put before every name.

The original code of latent diffusion and Stable Diffusion keeps all parts of a model in one file.
Such files are not read here: their names show what they are, and a message says what reads them.
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

# Modules of torch's wrappers, anywhere in a name: parallel, compiled, sharded, recomputed models.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Attributes of training code that hold a model, before all its names: any model, or one of a kind.
HOLDERS = ("model", "ema_model", "net", "network")
HOLDERS_BY_KIND = {
    "dit": ("dit", "transformer"),
    "vae": ("vae", "first_stage_model", "autoencoder"),
    "unet": ("unet",),
    "clip": ("text_encoder", "cond_stage_model", "transformer"),
    "dinov2": ("dinov2", "backbone"),
}
# Names of the original code; diffusers has down_blocks, mid_block and up_blocks.
WHOLE = re.compile(r"(^|\.)diffusion_model\.")
UNET = re.compile(r"(^|\.)input_blocks\.\d+\.")
VAE = re.compile(r"(^|\.)(en|de)coder\.(down|mid|up)\.")
CLIP = ("cond_stage_model.transformer.", "cond_stage_model.model.")
TWO_CLIPS = "conditioner."


def refuse(names: Collection[str], kind: str, source: pathlib.Path) -> None:
    """Refuses files of the original Stable Diffusion or latent diffusion code, by their names.

    Args: kind, of the model that is wanted.   source: the file, for messages.
    Raises: ValueError that says what the file is, and how to make diffusers' directory of it.
    """
    patterns = (WHOLE, VAE) if kind == "adm" else (WHOLE, UNET, VAE)
    examples = [next(filter(pattern.search, names), None) for pattern in patterns]
    if not any(examples):
        return
    if any(name.startswith(TWO_CLIPS) for name in names):
        what, way_out = "a Stable Diffusion XL", "Not supported; versions 1 and 2 are."
    elif any(name.startswith(CLIP) for name in names):
        what = "a Stable Diffusion, its UNet, VAE and text model in one"
        way_out = (
            f"{_by_diffusers('StableDiffusionPipeline', 'SD_DIR')}Then `convert sd SD_DIR DST` "
            "takes all, `convert unet SD_DIR/unet DST` or `convert vae SD_DIR/vae DST` a part."
        )
    elif examples[-1]:
        what = "a latent diffusion without CLIP" if examples[0] else "a VAE"
        way_out = (
            "Its VAE can be converted. " if examples[0] else ""
        ) + f"{_by_diffusers('AutoencoderKL', 'VAE_DIR')}Then `convert vae VAE_DIR DST`."
    else:
        what = "a UNet alone"
        way_out = (
            "Of Stable Diffusion's give the whole file, of which diffusers makes a directory; "
            "guided-diffusion's is for `convert adm`."
        )
    raise UserError(
        f"{files.printable(source)} has {len(names):,} names of the original code of latent "
        f"diffusion, such as {files.list_some([next(filter(None, examples))])}: {what}.\n{way_out}"
    )


def strip(
    found: Mapping[str, np.ndarray], kind: str, source: pathlib.Path
) -> dict[str, np.ndarray]:
    """The arrays without what wrappers and training code put before all names; a log line says so.

    Args: kind, of the model.   source: the file, for messages.
    Raises: ValueError where a prefix is before some names only, or two names become one.
    """
    shown, left_out = files.printable(source), []
    names = [name.split(".") for name in found]
    for wrapper in WRAPPERS:
        if any(wrapper in name for name in names):
            left_out.append(wrapper)
            names = [[part for part in name if part != wrapper] for name in names]
    holders = {*HOLDERS, *HOLDERS_BY_KIND.get(kind, ())}
    heads = collections.Counter(name[0] for name in names if name)
    while len(heads) == 1 and holders & heads.keys() and all(len(name) > 1 for name in names):
        left_out += heads
        names = [name[1:] for name in names]
        heads = collections.Counter(name[0] for name in names)
    holders.update(*HOLDERS_BY_KIND.values())
    if len(heads) > 1 and (some := [head for head in heads if head in holders]):
        counts = ", ".join(f"{heads[head]:,} with {head}." for head in some)
        raise UserError(
            f"{shown} has {len(names):,} names, {counts} before them: it holds more than one "
            "model. Save the arrays of the one that is meant by themselves."
        )
    stripped = dict(zip(map(".".join, names), found.values(), strict=True))
    if len(stripped) < len(found):
        raise UserError(
            f"{shown} has {len(found):,} names, but without {', '.join(left_out)} only "
            f"{len(stripped):,} differ: save one model's arrays by themselves."
        )
    if left_out:
        prefixes = ", ".join(f"{part}." for part in left_out)
        logger.info("%s: its names are read without the prefixes %s", shown, prefixes)
    return stripped


def _by_diffusers(name, directory):
    return (
        "In Python, where diffusers and torch are installed, make diffusers' directory of it:\n"
        f'  diffusers.{name}.from_single_file("FILE").save_pretrained("{directory}")\n'
    )
