"""Published checkpoints to our parameters: one rename table per format, exact coverage."""

import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import clip, dinov2, dit, inception, lpips, unet, vae, weights
from dit_jax.errors import UserError

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
    """Parameters of the model `model_config` from a published checkpoint.

    Args:
      kind: the reference format: 'dit' (the published PyTorch code's), 'vae' (diffusers'
        AutoencoderKL), 'unet' (diffusers' UNet2DConditionModel), 'lpips' (torchvision's VGG-16 and
        LPIPS's linear weights together), 'inception' (torch-fidelity's and pytorch-fid's copy of
        Inception-2015), 'dinov2' (the official PyTorch code's), 'clip' (transformers'
        CLIPTextModel).
      source: a mapping of published names to arrays; a file of them: .npz (names may carry the
        prefix 'w/'), .safetensors, or torch.save's .pt, .pth, .bin or .ckpt, of which nothing is
        run; or, of what diffusers and transformers write, the directory.
    Returns:
      Our parameter tree of numpy arrays, f32.
    Raises: ValueError for an unknown kind, another model's config, an unknown file type, a damaged
      file, missing or unexpected names or shapes, with the first of each, and values that are not
      finite; FileNotFoundError; OSError.
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
