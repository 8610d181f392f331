"""Writes a published checkpoint as a workdir that the other commands read, and a DiT back.

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

SRC is the directory that diffusers wrote (`dit`, `vae`, `unet`; `sd`: a whole Stable Diffusion, of
which one workdir comes), guided-diffusion's .pt (`adm`), a .npz, .safetensors or .pt file of the
published names (`dit`; `inception`: torch-fidelity's or pytorch-fid's), a directory with
vgg16-397923af.pth and vgg.pth (`lpips`), or the official file or the directory that transformers
wrote (`dinov2`). Of `clip` it is the directory that transformers wrote, such as a Stable
Diffusion's text_encoder/, with the tokenizer's files in it or in ../tokenizer/. A DiT without
--config gets the published one's, with the sizes of the checkpoint. DST is a directory that is not
there yet, or empty: a conversion that fails or is killed does not make it, so run it again.
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
# Stable Diffusion 1's, of a UNet alone.
PROCESS = (
    dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "eps",
    dict(sampler="ddim_level1", grid="leading"),
)
# Of each command, its own flags.
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
    """Writes diffusers' Stable Diffusion in the directory `source`, and returns its config.

    The new workdir is the UNet's; vae/ and text_encoder/ in it are workdirs of their own.
    Raises: ValueError or FileNotFoundError for files that are not this model's, before anything is
      written; ValueError or OSError as `destination.check`.
    """
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

    factor = models.build(vae_config.model).factor
    config.data.update(
        source="folder",
        name="",  # none was given
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
    with destination.fill(workdir) as new:
        checkpoint.save_params(new / "vae", vae_config, vae_params)
        checkpoint.save_params(new / "text_encoder", clip_config, clip_params)
        tokenizer.save(new / "text_encoder" / text.FILE)
        checkpoint.save_params(new, config, params)
    return config


def convert_vae(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes diffusers' AutoencoderKL at `source` to a new workdir, and returns its config.

    Args: source, the directory, or the weights in it; config.json must lie beside them.
    Raises: ValueError or FileNotFoundError for files that are not this VAE's; ValueError or OSError
      as `destination.check`.
    """
    destination.check(workdir)
    weights.refuse_layout(source, "vae")
    config = ConfigDict({"model": vae.read_config(weights.directory(source) / "config.json")})
    _save(workdir, config, formats.load("vae", source, config.model))
    return config


def _save(workdir, config, params):
    ranges.check(config)  # also one that --config names
    with destination.fill(workdir) as new:
        checkpoint.save_params(new, config, params)


def convert_unet(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes diffusers' UNet2DConditionModel at `source` to a new workdir, and returns its config.

    Its process is that of ../scheduler/ beside it, else Stable Diffusion 1's, with predicted eps.
    Args: source, the directory, or the weights in it; config.json must lie beside them.
    Raises: ValueError or FileNotFoundError for files that are not this UNet's; ValueError or
      OSError as `destination.check`.
    """
    destination.check(workdir)
    weights.refuse_layout(source, "unet")
    directory = weights.directory(source)
    scheduler = directory.resolve().parent / "scheduler" / stable_diffusion.SCHEDULER
    found = stable_diffusion.read_process(scheduler) if scheduler.is_file() else PROCESS
    config, params = _read_unet(source, found)
    _save(workdir, config, params)
    return config


def _read_unet(source, process):
    """(config, parameters) of a UNet of latents, with what `read_process` tells."""
    config = _default_config(unet.read_config(weights.directory(source) / "config.json"))
    params = formats.load("unet", source, config.model)
    diffusion, prediction, sample = process
    config.diffusion.update(diffusion)
    config.objective.prediction = prediction
    config.latents.update(source="moments", scale=(0.18215,), shift=(0.0,))
    config.sample.update(steps=50, cfg_scale=7.5, **sample)  # as published samples were drawn
    return config, params


def convert_adm(
    source: pathlib.Path,
    workdir: pathlib.Path,
    config: ConfigDict | None = None,
    new_attention_order: bool = False,
) -> ConfigDict:
    """Writes ADM's UNet in the file `source` to a new workdir, and returns its config.

    Args: config, with the model's sizes; None is that of the published model which has these
      arrays.   new_attention_order: of a model with a config, as `adm.to_params`.
    Raises: ValueError or FileNotFoundError for files that are not this model's; ValueError or
      OSError as `destination.check`.
    """
    destination.check(workdir)
    found = weights.read(source, "adm")
    if config is None:
        name = adm.preset(found)
        published = adm.PUBLISHED[name]
        new_attention_order = published["new_attention_order"]
        config = _default_config(adm.model_config(name))
        config.diffusion.schedule = published["schedule"]
        config.latents.source = "pixels"
        config.sample.update(sampler="ddpm", steps=250, cfg_scale=1.0, clip_x_0=True)
    elif config.model.name != "unet":
        raise UserError(f"--config has a {config.model.name!r}; ADM's model is a 'unet'.")
    _save(workdir, config, adm.to_params(found, config.model, new_attention_order))
    return config


def _default_config(model):
    """configs/default.py with another noise predictor, of images 8 times as large as latents."""
    config = default.get_config()
    with config.unlocked():
        config.model = model
    factor = 8 if model.condition == "context" else 1
    config.data.image_size = sizes.scale(model.input_size, factor)
    return config


def convert_lpips(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes VGG-16 and LPIPS's weights in the directory `source` to a new workdir."""
    destination.check(workdir)
    config = ConfigDict({"model": {"name": "lpips", "dtype": "float32"}})
    _save(workdir, config, formats.load("lpips", lpips.read(source), config.model))
    return config


def convert_inception(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes Inception-2015 in the file `source` to a new workdir, and returns its config.

    Raises: FileNotFoundError; ValueError as `weights.read`, or for another model's arrays;
      ValueError or OSError as `destination.check`.
    """
    destination.check(workdir)
    config = ConfigDict({"model": {"name": "inception", "dtype": "float32"}})
    _save(workdir, config, formats.load("inception", source, config.model))
    return config


def convert_dinov2(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes DINOv2 at `source` to a new workdir, and returns its config.

    Args: source, a file of the official names, or the directory that transformers wrote.
    Raises: ValueError or FileNotFoundError for files that are not this model's.
    """
    destination.check(workdir)
    found = dinov2.read(source)
    config = ConfigDict({"model": dinov2.read_sizes(found)})
    _save(workdir, config, formats.load("dinov2", found, config.model))
    return config


def convert_clip(source: pathlib.Path, workdir: pathlib.Path, skip_layers: int = 0) -> ConfigDict:
    """Writes CLIP's text transformer at `source` to a new workdir, and returns its config.

    The workdir also gets the tokenizer, for `text.load_tokenizer`.
    Args: source, the directory that transformers wrote.   skip_layers: how many of the last layers
      to leave out; Stable Diffusion 2 is trained on OpenCLIP-H without 1, and its folders have it
      left out already.
    Raises: ValueError or FileNotFoundError for files that are not this model's.
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
    """Writes the DiT at `source` to a new workdir, and returns its config.

    Args: source, a file of the published names, or the directory of diffusers'.   config: with the
      model's sizes; None is the one that `export_dit` wrote into the file, else the published
      model's with the sizes that `source` tells.
    Raises: ValueError or FileNotFoundError for files that are not this DiT's.
    """
    destination.check(workdir)
    is_diffusers, shown = source.is_dir(), files.printable(source)
    sizes = diffusers_dit.read_sizes(source) if is_diffusers else {}
    found, own = weights.read(source, "dit"), exported.read(source)
    if config is None:
        config = own or _published_config(sizes or dit.read_sizes(found))
    elif own and any(config[name] != own[name] for name in ("diffusion", "objective")):
        raise UserError(
            f"{shown} was exported with diffusion={fields.show(own.diffusion.to_dict())}, "
            f"objective={fields.show(own.objective.to_dict())}, and --config has others: leave it "
            "out."
        )
    elif is_diffusers and sizes["num_heads"] != config.model.num_heads:
        raise UserError(  # no array's shape tells
            f"{shown} has {sizes['num_heads']} heads, but the config's model.num_heads is "
            f"{config.model.num_heads}."
        )
    if is_diffusers:
        found = diffusers_dit.to_published(found, config.model)
    _save(workdir, config, formats.load("dit", found, config.model))
    return config


def _published_config(model_sizes):
    config = dit_xl_2_256_published.get_config()
    config.model.update(model_sizes)
    config.data.image_size = sizes.scale(config.model.input_size, 8)
    return config


def export_dit(
    workdir: pathlib.Path, out: pathlib.Path, step: int | None = None, raw: bool = False
) -> int:
    """Writes a workdir's DiT, f32, under the published names, and returns its step.

    The file's metadata hold the run's config without its paths.
    Args: out, a .safetensors file.   step: None is the newest.   raw: the trained parameters
      instead of their EMA.
    Raises: ValueError for a workdir of another model, block or suffix; FileNotFoundError or
      OSError as `checkpoint.restore_params`; OSError if the file cannot be written.
    """
    cli.check_out(out, (".safetensors",), "DST=")
    config = workdirs.load_config(workdir)
    if config.model.name != "dit":
        raise UserError(f"{workdir} holds a {config.model.name!r}, not a 'dit'.")
    workdirs.check_draws(workdir, config)
    dit.check_block(config.model)  # before parameters are read
    config.model.attention = "auto"  # the run's device need not be here
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        path: jax.ShapeDtypeStruct(shape, "float32", sharding=place)
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
