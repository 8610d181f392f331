"""Command that converts a published checkpoint to a workdir, or exports a workdir's DiT.

  python -m dit_jax.convert sd SRC DST
  python -m dit_jax.convert dit SRC DST [--config FILE]
  python -m dit_jax.convert vae SRC DST
  python -m dit_jax.convert unet SRC DST
  python -m dit_jax.convert adm SRC DST [--config FILE [--new_attention_order]]
  python -m dit_jax.convert lpips SRC DST
  python -m dit_jax.convert inception SRC DST
  python -m dit_jax.convert dinov2 SRC DST
  python -m dit_jax.convert clip SRC DST [--skip_layers N]
  python -m dit_jax.convert dit-export WORKDIR DST.safetensors [--step N] [--raw]

SRC depends on the command:
  sd          the directory of a whole Stable Diffusion that diffusers wrote; it becomes one workdir
  dit         a .npz, .safetensors or .pt file with the published names, or diffusers' directory
  vae, unet   the directory that diffusers wrote
  adm         guided-diffusion's .pt file
  lpips       a directory with vgg16-397923af.pth and vgg.pth
  inception   a .npz, .safetensors or .pt file with the names of torch-fidelity and pytorch-fid
  dinov2      the official file, or the directory that transformers wrote
  clip        the directory that transformers wrote, such as a Stable Diffusion's text_encoder/; the
              tokenizer's files are in it or in ../tokenizer/

Without --config, a DiT gets the published model's config with the checkpoint's sizes. DST must be
empty or not exist yet. A conversion that fails or is killed does not create it: run it again.
"""

import json
import pathlib

import flax.traverse_util
import jax
import safetensors.numpy
from absl import flags
from ml_collections import ConfigDict

from configs import default, dit_xl_2_256_published
from dit_jax import cli, models, workdirs
from dit_jax.config import ranges, sizes
from dit_jax.convert import (
    adm,
    arrays,
    clip,
    destination,
    diffusers_dit,
    dinov2,
    dit,
    exported,
    fields,
    formats,
    lpips,
    stable_diffusion,
    unet,
    vae,
    weights,
)
from dit_jax.data import text
from dit_jax.errors import UserError, UserFileError
from dit_jax.system import files
from dit_jax.workdirs import checkpoint, digests

FLAGS = flags.FLAGS
# Stable Diffusion 1's process, prediction and sampler, for a UNet without a scheduler's config.
PROCESS = (
    dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "eps",
    dict(sampler="ddim_level1", grid="leading"),
)
# Command -> the flags that it takes.
COMMANDS = {
    "sd": (),
    "dit": ("config",),
    "vae": (),
    "unet": (),
    "adm": ("config", "new_attention_order"),
    "lpips": (),
    "inception": (),
    "dinov2": (),
    "clip": ("skip_layers",),
    "dit-export": ("step", "raw"),
}


def convert_sd(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Converts diffusers' Stable Diffusion at `source` to a new workdir, and returns its config.

    The workdir holds the UNet. Its subdirectories vae/ and text_encoder/ are workdirs too.
    Args:
      source: the directory of the whole pipeline.
    Raises: ValueError or FileNotFoundError if the files are not a supported model, before anything
      is written; ValueError or OSError as `destination.check`.
    """
    # Everything is read and checked before anything is written.
    destination.check(workdir)
    stable_diffusion.check_parts(source)
    scheduler = source / "scheduler" / stable_diffusion.SCHEDULER
    config, params = _read_unet(source / "unet", stable_diffusion.read_process(scheduler))
    vae_config = ConfigDict({"model": vae.read_config(source / "vae" / "config.json")})
    clip_config = ConfigDict({"model": clip.read_config(source / "text_encoder")})
    parts = config.model, vae_config.model, clip_config.model
    stable_diffusion.check_fit(source, *parts)
    vae_params = formats.load("vae", source / "vae", vae_config.model)
    clip_params = formats.load("clip", clip.read(source / "text_encoder"), clip_config.model)
    tokenizer = clip.read_tokenizer(source / "text_encoder", clip_config.model)

    # The files name no dataset: `data.name` stays empty until the user sets it. The paths are
    # relative, so that the workdir can be moved together with its parts.
    factor = models.build(vae_config.model).factor
    config.data.update(
        source="folder",
        name="",
        eval_split="",
        image_size=sizes.scale(config.model.input_size, factor),
        image_channels=vae_config.model.image_channels,
        caption_feature="text",
    )
    config.latents.update(
        source="images",
        moments="",
        vae="vae",
        scale=(vae_config.model.scale,),
        shift=(vae_config.model.shift,),
    )
    config.text.update(encoder="text_encoder", encoder_digest=digests.digest(clip_params))
    # The workdir appears with all three parts, or not at all.
    with destination.fill(workdir) as new:
        checkpoint.save_params(new / "vae", vae_config, vae_params)
        checkpoint.save_params(new / "text_encoder", clip_config, clip_params)
        tokenizer.save(new / "text_encoder" / text.FILE)
        checkpoint.save_params(new, config, params)
    return config


def convert_vae(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Converts diffusers' AutoencoderKL at `source` to a new workdir, and returns its config.

    Args:
      source: the directory, or a weights file with config.json beside it.
    Raises: ValueError or FileNotFoundError if the files are not this VAE's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    weights.refuse_layout(source, "vae")
    config = ConfigDict({"model": vae.read_config(weights.directory(source) / "config.json")})
    _save(workdir, config, formats.load("vae", source, config.model))
    return config


def _save(workdir, config, params):
    """Checks the config, then writes it with the parameters to a new workdir."""
    ranges.check(config)  # also a config given by --config
    with destination.fill(workdir) as new:
        checkpoint.save_params(new, config, params)


def convert_unet(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Converts diffusers' UNet2DConditionModel at `source` to a workdir, and returns its config.

    The process is read from scheduler/ beside the UNet's directory. Without that directory it is
    Stable Diffusion 1's, with prediction eps.
    Args:
      source: the directory, or a weights file with config.json beside it.
    Raises: ValueError or FileNotFoundError if the files are not this UNet's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    weights.refuse_layout(source, "unet")
    directory = weights.directory(source)
    # Resolved first, since the parent of '.' is '.' itself.
    scheduler = directory.resolve().parent / "scheduler" / stable_diffusion.SCHEDULER
    process = stable_diffusion.read_process(scheduler) if scheduler.is_file() else PROCESS
    config, params = _read_unet(source, process)
    _save(workdir, config, params)
    return config


def _read_unet(source, process):
    """Returns (config, parameters) of a UNet of latents.

    Args:
      source: the directory, or a weights file in it.
      process: as `stable_diffusion.read_process` returns it.
    """
    config = _default_config(unet.read_config(weights.directory(source) / "config.json"))
    params = formats.load("unet", source, config.model)
    diffusion, prediction, sample = process
    config.diffusion.update(diffusion)
    config.objective.prediction = prediction
    config.latents.update(source="moments", scale=(0.18215,), shift=(0.0,))
    config.sample.update(steps=50, cfg_scale=7.5, **sample)  # settings of the published samples
    return config, params


def convert_adm(
    source: pathlib.Path,
    workdir: pathlib.Path,
    config: ConfigDict | None = None,
    new_attention_order: bool = False,
) -> ConfigDict:
    """Converts ADM's UNet in the file `source` to a new workdir, and returns its config.

    Args:
      config: has the model's sizes. None selects the published model with exactly these arrays.
      new_attention_order: as for `adm.to_params`; without a config the published value replaces it.
    Raises: ValueError or FileNotFoundError if the file is not this model's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    tensors = weights.read(source, "adm")
    if config is None:
        name = adm.preset(tensors)
        published = adm.PUBLISHED[name]
        new_attention_order = published["new_attention_order"]
        config = _default_config(adm.model_config(name))
        config.diffusion.schedule = published["schedule"]
        config.latents.source = "pixels"
        # guided-diffusion clips x_0 in every step by default.
        config.sample.update(sampler="ddpm", steps=250, cfg_scale=1.0, clip_x_0=True)
    elif config.model.name != "unet":
        raise UserError(f"--config has a {config.model.name!r}; ADM's model is a 'unet'.")
    _save(workdir, config, adm.to_params(tensors, config.model, new_attention_order))
    return config


def _default_config(model):
    """Returns configs/default.py with this noise predictor and an image size that fits it.

    A model conditioned on a context is taken for one of latents, whose images are 8 times as large.
    Any other model is taken for one of pixels.
    """
    config = default.get_config()
    with config.unlocked():
        config.model = model
    factor = 8 if model.condition == "context" else 1
    config.data.image_size = sizes.scale(model.input_size, factor)
    return config


def convert_lpips(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Converts VGG-16 and LPIPS's weights at `source` to a new workdir, and returns its config.

    Args:
      source: the directory of both files.
    Raises: ValueError or FileNotFoundError if the files are not these weights; ValueError or
      OSError as `destination.check`.
    """
    destination.check(workdir)
    config = ConfigDict({"model": {"name": "lpips", "dtype": "float32"}})
    _save(workdir, config, formats.load("lpips", lpips.read(source), config.model))
    return config


def convert_inception(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Converts Inception-2015 in the file `source` to a new workdir, and returns its config.

    Raises: FileNotFoundError; ValueError as `weights.read`, or for another model's arrays;
      ValueError or OSError as `destination.check`.
    """
    destination.check(workdir)
    config = ConfigDict({"model": {"name": "inception", "dtype": "float32"}})
    _save(workdir, config, formats.load("inception", source, config.model))
    return config


def convert_dinov2(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Converts DINOv2 at `source` to a new workdir, and returns its config.

    Args:
      source: a file with the official names, or the directory that transformers wrote.
    Raises: ValueError or FileNotFoundError if the files are not this model's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    tensors = dinov2.read(source)
    config = ConfigDict({"model": dinov2.read_sizes(tensors)})
    _save(workdir, config, formats.load("dinov2", tensors, config.model))
    return config


def convert_clip(source: pathlib.Path, workdir: pathlib.Path, skip_layers: int = 0) -> ConfigDict:
    """Converts CLIP's text transformer at `source` to a new workdir, and returns its config.

    The workdir also gets the tokenizer, for `text.load_tokenizer`.
    Args:
      source: the directory that transformers wrote, or a weights file in it.
      skip_layers: how many of the last layers to leave out. Stable Diffusion 2 was trained on
        OpenCLIP-H without 1; its own directories have left it out already.
    Raises: ValueError or FileNotFoundError if the files are not this model's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    weights.refuse_layout(source, "clip")
    config = ConfigDict({"model": clip.read_config(source, skip_layers)})
    tokenizer = clip.read_tokenizer(source, config.model)
    params = formats.load("clip", clip.read(source, skip_layers), config.model)
    with destination.fill(workdir) as new:
        checkpoint.save_params(new, config, params)
        tokenizer.save(new / text.FILE)
    return config


def convert_dit(
    source: pathlib.Path, workdir: pathlib.Path, config: ConfigDict | None = None
) -> ConfigDict:
    """Converts the DiT at `source` to a new workdir, and returns its config.

    Args:
      source: a file with the published names, or diffusers' directory.
      config: has the model's sizes. None selects the config that `export_dit` wrote into the file,
        or else the published model's config with the sizes of `source`.
    Raises: ValueError or FileNotFoundError if the files are not this DiT's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    is_diffusers, shown = source.is_dir(), files.printable(source)
    model_sizes = diffusers_dit.read_sizes(source) if is_diffusers else {}
    tensors, saved = weights.read(source, "dit"), exported.read(source)
    if config is None:
        config = saved or _published_config(model_sizes or dit.read_sizes(tensors))
    # Weights are valid only with the process and the objective that they were trained with.
    elif saved and any(config[name] != saved[name] for name in ("diffusion", "objective")):
        raise UserError(
            f"{shown} was exported with diffusion={fields.show(saved.diffusion.to_dict())}, "
            f"objective={fields.show(saved.objective.to_dict())}, and --config has others: leave "
            "it out."
        )
    elif is_diffusers and model_sizes["num_heads"] != config.model.num_heads:
        raise UserError(  # no shape depends on the number of heads
            f"{shown} has {model_sizes['num_heads']} heads, but the config's model.num_heads is "
            f"{config.model.num_heads}."
        )
    if is_diffusers:
        tensors = diffusers_dit.to_published(tensors, config.model)
    _save(workdir, config, formats.load("dit", tensors, config.model))
    return config


def _published_config(model_sizes):
    """Returns the published DiT's config with these model sizes."""
    config = dit_xl_2_256_published.get_config()
    config.model.update(model_sizes)
    config.data.image_size = sizes.scale(config.model.input_size, 8)
    return config


def export_dit(
    workdir: pathlib.Path, out: pathlib.Path, step: int | None = None, raw: bool = False
) -> int:
    """Writes a workdir's DiT, f32, under the published names, and returns its step.

    The file's metadata hold the run's config without its paths.
    Args:
      out: a .safetensors file.
      step: None selects the newest.
      raw: whether to export the trained parameters instead of their EMA.
    Raises: ValueError if the workdir has another model or block, or `out` another suffix;
      FileNotFoundError or OSError as `checkpoint.restore_params`; OSError if the file cannot be
      written.
    """
    cli.check_out(out, (".safetensors",), "DST=")
    config = workdirs.load_config(workdir)
    if config.model.name != "dit":
        raise UserError(f"{workdir} holds a {config.model.name!r}, not a 'dit'.")
    workdirs.check_draws_images(workdir, config)
    dit.check_block(config.model)  # before reading the parameters, which takes longer
    config.model.attention = "auto"  # this machine may lack the run's kind of device
    device_sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        path: jax.ShapeDtypeStruct(shape, "float32", sharding=device_sharding)
        for path, shape in arrays.parameter_shapes(config.model).items()
    }
    shapes = flax.traverse_util.unflatten_dict(shapes, sep="/")
    params, step = checkpoint.restore_params(workdir, shapes, step, raw)
    metadata = {exported.KEY: exported.to_json(config)}
    contents = safetensors.numpy.save(dit.to_published(params, config.model), metadata)
    try:
        files.replace(out, lambda file: file.write(contents))
    except OSError as error:
        raise UserFileError(f"cannot write {out}: {error}") from error
    return step


def main(words):
    if len(words) != 3 or words[0] not in COMMANDS:
        raise UserError(f"say which of {', '.join(COMMANDS)}, then SRC and DST, not {words}.")
    command, source, target = words
    source, target = files.to_path(source, "SRC"), files.to_path(target, "DST")
    # absl defines all flags for all commands, so another command's flag would be ignored silently.
    for name in {name for names in COMMANDS.values() for name in names} - {*COMMANDS[command]}:
        if FLAGS[name].present:
            raise UserError(f"`convert {command}` takes no --{name}.")
    if command == "dit-export":
        print(f"{target}: step {export_dit(source, target, FLAGS.step, FLAGS.raw)}")
        return
    if command == "dit":
        config = convert_dit(source, target, FLAGS.config)
    elif command == "clip":
        config = convert_clip(source, target, FLAGS.skip_layers)
    elif command == "adm":
        if FLAGS.new_attention_order and FLAGS.config is None:
            raise UserError(
                "--new_attention_order is of a --config; of published models it is known."
            )
        config = convert_adm(source, target, FLAGS.config, FLAGS.new_attention_order)
    else:
        convert_model = {
            "sd": convert_sd,
            "vae": convert_vae,
            "unet": convert_unet,
            "lpips": convert_lpips,
            "inception": convert_inception,
            "dinov2": convert_dinov2,
        }[command]
        config = convert_model(source, target)
    print(f"{target}: {json.dumps(config.model.to_dict())}")


if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_integer("step", None, "dit-export: the checkpoint; the newest by default.", 0)
    flags.DEFINE_integer("skip_layers", 0, "clip: how many of the last layers to leave out.", 0)
    flags.DEFINE_bool("new_attention_order", False, "adm: rows of q, k, v are not by head.")
    flags.DEFINE_bool("raw", False, "dit-export: the trained parameters instead of their EMA.")
    cli.run(main, "KIND SRC DST")
