"""Converter for diffusers' AutoencoderKL: names, layouts and sizes.

The published convolutions are [out, in, h, w].
"""

import collections
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import arrays, fields
from dit_jax.errors import UserError
from dit_jax.system import files

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# The attention's layers in files from before diffusers 0.17 -> their names since then.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MOST_LEVELS = 8
# Field -> whether a value is valid. A config must have these fields, unless DEFAULTS has them.
CHECKS = dict(
    act_fn=lambda value: isinstance(value, str),
    block_out_channels=lambda value: _is_list(value, fields.is_count),
    down_block_types=lambda value: _is_list(value, lambda name: isinstance(name, str)),
    in_channels=fields.is_count,
    latent_channels=fields.is_count,
    layers_per_block=lambda value: fields.is_count(value, 32),
    mid_block_add_attention=lambda value: type(value) is bool,
    norm_num_groups=fields.is_count,
    out_channels=fields.is_count,
    scaling_factor=lambda value: fields.is_number(value) and value != 0,
    shift_factor=lambda value: value is None or fields.is_number(value),
    up_block_types=lambda value: _is_list(value, lambda name: isinstance(name, str)),
    use_post_quant_conv=lambda value: type(value) is bool,
    use_quant_conv=lambda value: type(value) is bool,
)
# Values of the fields that a config.json may leave out.
DEFAULTS = dict(
    _class_name="AutoencoderKL",
    scaling_factor=0.18215,
    shift_factor=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
    norm_num_groups=32,
    latents_mean=None,
    latents_std=None,
)
# Field -> the only value that this project's VAE supports.
FIXED = dict(
    act_fn="silu",
    down_block_types="DownEncoderBlock2D",
    up_block_types="UpDecoderBlock2D",
    latents_mean=None,
    latents_std=None,
)


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The attention may have its names from before diffusers 0.17.
    """
    new_names = collections.Counter(map(_new_name, found))
    if duplicates := [name for name, count in new_names.items() if count > 1]:
        raise UserError(
            f"the checkpoint holds {files.list_some(duplicates)} under an old name too."
        )
    found = {_new_name(name): array for name, array in found.items()}
    shapes = arrays.parameter_shapes(model_config)
    published = {
        path: {_published_name(path): _published_shape(shape)} for path, shape in shapes.items()
    }
    return arrays.to_params(found, shapes, published, _to_parameter)


def read_config(path: pathlib.Path) -> ConfigDict:
    """Returns `config.model` from diffusers' config.json.

    Raises: FileNotFoundError; ValueError for a whole pipeline or a VAE of another kind, with the
      unsupported fields; as `fields.read`.
    """
    fields.refuse_pipeline(path.parent, "vae")
    what = "the config.json that diffusers writes beside the weights"
    config, shown = DEFAULTS | fields.read(path, what), files.printable(path)
    if config["_class_name"] != "AutoencoderKL":
        raise UserError(
            f"{shown} describes diffusers' {fields.show(config['_class_name'])}, but only an "
            "AutoencoderKL can be converted; docs/weights.md lists some."
        )
    # Types are checked first: values of wrong types mean a damaged file, not another VAE.
    wrong = {
        name: config.get(name) for name, check in CHECKS.items() if not check(config.get(name))
    }
    if wrong:
        raise UserError(
            f"{shown} has {fields.show(wrong)}: it must be the config.json that diffusers wrote "
            "beside the weights of an AutoencoderKL; docs/weights.md lists some."
        )
    # Values that are valid, but that this VAE does not support.
    other = {name: config[name] for name, value in FIXED.items() if _kinds(config[name]) != {value}}
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        other["use_post_quant_conv"] = config["use_post_quant_conv"]
    if config["in_channels"] != config["out_channels"]:
        other["out_channels"] = config["out_channels"]
    if other:
        raise UserError(f"{shown} describes a VAE of another kind: {fields.show(other)}.")
    return ConfigDict(
        dict(
            name="vae",
            image_channels=config["in_channels"],
            latent_channels=config["latent_channels"],
            block_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            norm_groups=config["norm_num_groups"],
            use_quant_conv=config["use_quant_conv"],
            mid_attention=config["mid_block_add_attention"],
            scale=config["scaling_factor"],
            shift=config["shift_factor"] or 0.0,
            dtype="float32",
            remat=False,
        )
    )


def _is_list(value, check):
    """Returns whether a value is a list of 1 to MOST_LEVELS items that pass the check."""
    return isinstance(value, list) and 0 < len(value) <= MOST_LEVELS and all(map(check, value))


def _kinds(value):
    """Returns the set of the different values of a list, as strings, or of the one value."""
    if isinstance(value, list):
        return set(map(str, value))
    return {value if isinstance(value, str) else None if value is None else repr(value)}


def _new_name(name):
    """Returns an array's name since diffusers 0.17."""
    return re.sub(
        r"(attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}{OLD_NAMES[match[2]]}.",
        name,
    )


def _published_name(path):
    """Returns the published name of a parameter.

    'mid_block/resnets_0/norm1/scale' is 'mid_block.resnets.0.norm1.weight'.
    """
    module, _, leaf = path.rpartition("/")
    module = re.sub(r"_(\d+)(?=[_/]|$)", r".\1", module)  # a number is a module of its own
    module = re.sub(r"(\.\d+)_", r"\1.", module)
    return f"{module.replace('/', '.')}.{LEAVES[leaf]}"


def _published_shape(shape):
    """Returns the published shape of a parameter."""
    return tuple(shape[i] for i in _AXES[len(shape)])


def _to_parameter(_, array):
    """Returns one published array with its axes in the parameter's order."""
    return array.transpose(np.argsort(_AXES[array.ndim]))


# Rank -> the order in which the published array has the axes of the parameter: a kernel [h, w, in,
# out] is published as [out, in, h, w], and [in, out] as [out, in].
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
