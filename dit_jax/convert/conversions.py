"""Conversions of published checkpoints: to parameters, and to whole workdirs.

A reader returns the whole model before anything is written.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs import default, dit_xl_2_256_published
from dit_jax import models
from dit_jax.config import keys, sizes
from dit_jax.convert import (
    adm,
    clip,
    destination,
    diffusers_dit,
    dinov2,
    dit,
    exported,
    fields,
    inception,
    lpips,
    stable_diffusion,
    unet,
    vae,
    weights,
)
from dit_jax.data import text
from dit_jax.errors import UserError, check_choice
from dit_jax.system import files
from dit_jax.workdirs import checkpoint, digests

# Stable Diffusion 1's process, for a UNet without a scheduler's config.
DEFAULT_PROCESS = stable_diffusion.Process(
    diffusion=dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    prediction="eps",
    sample=dict(sampler="ddim_level1", grid="leading"),
)
# Kind -> to_params(published name -> array, config.model).
CONVERTERS = {
    "dit": dit.to_params,  # the published PyTorch code
    "vae": vae.to_params,  # diffusers' AutoencoderKL
    "unet": unet.to_params,  # diffusers' UNet2DConditionModel
    "lpips": lpips.to_params,  # torchvision's VGG-16 and LPIPS's linear weights together
    "inception": inception.to_params,  # torch-fidelity's and pytorch-fid's copy of Inception-2015
    "dinov2": dinov2.to_params,  # the official PyTorch code
    "clip": clip.to_params,  # transformers' CLIPTextModel
}


class Converted(NamedTuple):
    """A converted model, complete for a workdir."""

    config: ConfigDict
    params: dict
    tokenizer: text.ClipTokenizer | None = None
    parts: Mapping[str, Any] = {}  # name of a subdirectory -> its Converted model


def load(kind: str, source: str | pathlib.Path | Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the parameters of a model from a published checkpoint.

    Args:
      kind: a key of CONVERTERS, which says whose arrays they are.
      source: published name -> array, or a file of such arrays, or the directory that diffusers or
        transformers wrote. A file is a .npz, whose names may have the prefix 'w/', a .safetensors,
        or torch.save's .pt, .pth, .bin or .ckpt. No code in a file is run.
      model_config: `config.model`, with the model's sizes.
    Returns: this project's parameter tree of numpy arrays, f32.
    Raises: ValueError for an unknown kind or another model's config; as `weights.read` and
      `parameters.check`.
    """
    check_choice("kind", kind, CONVERTERS)
    if model_config.name != kind:
        raise UserError(f"the config's model is a {model_config.name!r}, but {kind=}.")
    if not isinstance(source, Mapping):
        source = weights.read(pathlib.Path(source), kind)
    return CONVERTERS[kind](source, model_config)


def to_workdir(kind: str, source: pathlib.Path, workdir: pathlib.Path, **options) -> ConfigDict:
    """Converts a published checkpoint to a new workdir, and returns its config.

    Args:
      kind: a key of READERS.
      source: the file or directory that the kind's reader reads.
      options: further arguments of the reader.
    Raises: ValueError or FileNotFoundError if the files are not a supported model; ValueError or
      OSError as `destination.check`.
    """
    destination.check(workdir)
    model = READERS[kind](source, **options)
    keys.check(model.config)  # also a config given by --config
    # Filled beside the workdir, so that the workdir never has only some of its parts.
    with destination.fill(workdir) as partial:
        for name, part in model.parts.items():
            _save(partial / name, part)
        _save(partial, model)
    return model.config


def _save(workdir, model):
    checkpoint.save_params(workdir, model.config, model.params)
    if model.tokenizer:
        model.tokenizer.save(workdir / text.FILE)


def read_sd(source: pathlib.Path) -> Converted:
    """Reads diffusers' directory of a whole Stable Diffusion: UNet, VAE and text encoder."""
    stable_diffusion.check_parts(source)
    scheduler = source / "scheduler" / stable_diffusion.SCHEDULER
    process = stable_diffusion.read_process(scheduler)
    # All configs are compared before the weights are read, which takes longer.
    config = _make_unet_config(source / "unet", process)
    vae_config = vae.read_model_config(source / "vae")
    clip_config = clip.read_model_config(source / "text_encoder")
    stable_diffusion.check_fit(source, config.model, vae_config, clip_config)
    parts = {
        "vae": read_vae(source / "vae"),
        "text_encoder": read_clip(source / "text_encoder"),
    }
    # The files name no dataset: `data.name` stays empty until the user sets it.
    config.data.update(
        source="folder",
        name="",
        eval_split="",
        image_size=sizes.scale(config.model.input_size, models.build(vae_config).factor),
        image_channels=vae_config.image_channels,
        caption_feature="text",
    )
    # The paths are relative, so that the workdir can be moved together with its parts.
    config.latents.update(
        source="images",
        moments="",
        vae="vae",
        scale=(vae_config.scale,),
        shift=(vae_config.shift,),
    )
    digest = digests.digest(parts["text_encoder"].params)
    config.text.update(encoder="text_encoder", encoder_digest=digest)
    return Converted(config, load("unet", source / "unet", config.model), parts=parts)


def read_dit(source: pathlib.Path, config: ConfigDict | None = None) -> Converted:
    """Reads a DiT.

    Args:
      source: a file with the published names, or diffusers' directory.
      config: has the model's sizes. None selects the config that `exported.write` wrote into the
        file, or else the published model's config with the sizes of `source`.
    """
    if source.is_dir():
        return _read_diffusers_dit(source, config)
    tensors, saved = weights.read(source, "dit"), exported.read_config(source)
    if config is None:
        config = saved or _make_dit_config(dit.infer_sizes(tensors))
    # Weights are valid only with the process and the objective that they were trained with.
    elif saved and any(config[name] != saved[name] for name in ("diffusion", "objective")):
        raise UserError(
            f"{files.printable(source)} was exported with diffusion="
            f"{fields.show(saved.diffusion.to_dict())} and objective="
            f"{fields.show(saved.objective.to_dict())}, but --config has other values. Leave out "
            "--config."
        )
    return Converted(config, load("dit", tensors, config.model))


def _read_diffusers_dit(directory, config):
    model_sizes = diffusers_dit.read_sizes(directory)
    tensors = weights.read(directory, "dit")
    if config is None:
        config = _make_dit_config(model_sizes)
    # No shape depends on the number of heads, so the arrays do not show a wrong one.
    elif model_sizes["num_heads"] != config.model.num_heads:
        raise UserError(
            f"{files.printable(directory)} has {model_sizes['num_heads']} heads, but --config has "
            f"model.num_heads={config.model.num_heads}. Correct it, or leave out --config."
        )
    tensors = diffusers_dit.to_published(tensors, config.model)
    return Converted(config, load("dit", tensors, config.model))


def _make_dit_config(model_sizes):
    """Returns the published DiT's config with these model sizes."""
    config = dit_xl_2_256_published.get_config()
    config.model.update(model_sizes)
    config.data.image_size = sizes.scale(config.model.input_size, 8)
    return config


def read_vae(source: pathlib.Path) -> Converted:
    """Reads diffusers' AutoencoderKL: its directory, or the weights with config.json beside."""
    return _read_network("vae", source, vae.read_model_config(source))


def _read_network(kind, source, model_config):
    """Returns a network that predicts no noise: its config has the section `model` only."""
    return Converted(ConfigDict({"model": model_config}), load(kind, source, model_config))


def read_unet(source: pathlib.Path) -> Converted:
    """Reads diffusers' UNet2DConditionModel.

    The process is read from scheduler/ beside the UNet's directory, or else it is DEFAULT_PROCESS.
    Args:
      source: the directory, or a weights file with config.json beside it.
    """
    # Resolved before its parent is taken, since the parent of '.' is '.' itself.
    pipeline = weights.find_config(source, "unet").parent.resolve().parent
    scheduler = pipeline / "scheduler" / stable_diffusion.SCHEDULER
    process = DEFAULT_PROCESS
    if scheduler.is_file():
        process = stable_diffusion.read_process(scheduler)
    config = _make_unet_config(source, process)
    return Converted(config, load("unet", source, config.model))


def _make_unet_config(source, process):
    """Returns the config of a UNet of latents with this process."""
    config = _make_config(unet.read_model_config(source))
    config.diffusion.update(process.diffusion)
    config.objective.prediction = process.prediction
    config.latents.update(source="moments", scale=(0.18215,), shift=(0.0,))
    # The steps and the scale of the published samples.
    config.sample.update(steps=50, cfg_scale=7.5, **process.sample)
    return config


def _make_config(model_config):
    """Returns configs/default.py with this noise predictor and an image size that fits it."""
    config = default.get_config()
    with config.unlocked():
        config.model = model_config
    # The input of a model conditioned on a context is assumed to be latents, of any other pixels.
    factor = 8 if model_config.condition == "context" else 1
    config.data.image_size = sizes.scale(model_config.input_size, factor)
    return config


def read_adm(
    source: pathlib.Path, config: ConfigDict | None = None, new_attention_order: bool = False
) -> Converted:
    """Reads a file with ADM's UNet.

    Args:
      config: has the model's sizes. None selects the published model with exactly these arrays.
      new_attention_order: as for `adm.to_params`. The order of a published model is known.
    """
    if new_attention_order and config is None:
        raise UserError("--new_attention_order needs --config. Leave it out for published models.")
    tensors = weights.read(source, "adm")
    if config is None:
        name = adm.match_preset(tensors)
        published = adm.CHECKPOINTS[name]
        new_attention_order = published["new_attention_order"]
        config = _make_config(adm.get_model_config(name))
        config.diffusion.schedule = published["schedule"]
        config.latents.source = "pixels"
        # guided-diffusion clips x_0 in every step by default.
        config.sample.update(sampler="ddpm", steps=250, cfg_scale=1.0, clip_x_0=True)
    elif config.model.name != "unet":
        raise UserError(f"--config has model.name={config.model.name!r}, but ADM is a 'unet'.")
    return Converted(config, adm.to_params(tensors, config.model, new_attention_order))


def read_lpips(source: pathlib.Path) -> Converted:
    """Reads a directory with the weights of VGG-16 and LPIPS."""
    model_config = ConfigDict({"name": "lpips", "dtype": "float32"})
    return _read_network("lpips", lpips.read(source), model_config)


def read_inception(source: pathlib.Path) -> Converted:
    """Reads a file with Inception-2015."""
    model_config = ConfigDict({"name": "inception", "dtype": "float32"})
    return _read_network("inception", source, model_config)


def read_dinov2(source: pathlib.Path) -> Converted:
    """Reads DINOv2: a file with the official names, or transformers' directory."""
    tensors = dinov2.read(source)
    return _read_network("dinov2", tensors, dinov2.infer_model_config(tensors))


def read_clip(source: pathlib.Path, skip_layers: int = 0) -> Converted:
    """Reads CLIP's text transformer, with its tokenizer.

    Args:
      source: the directory that transformers wrote, or a weights file in it.
      skip_layers: number of last layers to leave out. Stable Diffusion 2 was trained on OpenCLIP-H
        without the last layer, which its own directories do not have.
    """
    model_config = clip.read_model_config(source, skip_layers)
    tokenizer = clip.read_tokenizer(source, model_config)
    model = _read_network("clip", clip.read(source, skip_layers), model_config)
    return model._replace(tokenizer=tokenizer)


# Kind -> its reader: (source, options) -> Converted.
READERS = {
    "sd": read_sd,
    "dit": read_dit,
    "vae": read_vae,
    "unet": read_unet,
    "adm": read_adm,
    "lpips": read_lpips,
    "inception": read_inception,
    "dinov2": read_dinov2,
    "clip": read_clip,
}
