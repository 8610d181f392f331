"""Loader of published checkpoints in all formats.

Each format is one table of names, which must cover a file exactly.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import clip, dinov2, dit, inception, lpips, unet, vae, weights
from dit_jax.errors import UserError

# Format -> to_params(published name -> array, config.model).
FORMATS = {
    "dit": dit.to_params,
    "vae": vae.to_params,
    "unet": unet.to_params,
    "lpips": lpips.to_params,
    "inception": inception.to_params,
    "dinov2": dinov2.to_params,
    "clip": clip.to_params,
}


def load(kind: str, source: str | pathlib.Path | Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the parameters of the model `model_config` from a published checkpoint.

    Args:
      kind: the format: 'dit' (the published PyTorch code), 'vae' (diffusers' AutoencoderKL), 'unet'
        (diffusers' UNet2DConditionModel), 'lpips' (torchvision's VGG-16 and LPIPS's linear weights
        together), 'inception' (torch-fidelity's and pytorch-fid's copy of Inception-2015), 'dinov2'
        (the official PyTorch code) or 'clip' (transformers' CLIPTextModel).
      source: published name -> array, or a file of such arrays, or the directory that diffusers or
        transformers wrote. A file is a .npz, whose names may have the prefix 'w/', a .safetensors,
        or torch.save's .pt, .pth, .bin or .ckpt. No code in a file is run.
    Returns: this project's parameter tree of numpy arrays, f32.
    Raises: ValueError for an unknown kind, another model's config, an unknown file type or a
      damaged file; ValueError with the first of missing or unexpected names or wrong shapes, or for
      values that are not finite; FileNotFoundError; OSError.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format {kind!r}; known: {', '.join(FORMATS)}.")
    if model_config.name != kind:
        raise UserError(
            f"the config's model is a {model_config.name!r}, but {kind!r} is asked for."
        )
    if not isinstance(source, Mapping):
        source = weights.read(pathlib.Path(source), kind)
    return FORMATS[kind](source, model_config)
