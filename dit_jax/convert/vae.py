"""Parameters and sizes of diffusers' AutoencoderKL: its names, convolutions [out, in, h, w]."""

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
# Of the attention, in files written before diffusers 0.17.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MOST_LEVELS = 8
# What all their configs say, or the defaults below, and whether a value is one.
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
# What some leave out.
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
# What this VAE computes, and no other.
FIXED = dict(
    act_fn="silu",
    down_block_types="DownEncoderBlock2D",
    up_block_types="UpDecoderBlock2D",
    latents_mean=None,
    latents_std=None,
)


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Our parameters from the published names, of new or old attention; see `convert.load`."""
    new_names = collections.Counter(map(_new_name, found))
    if twice := [name for name, count in new_names.items() if count > 1]:
        raise UserError(f"the checkpoint holds {files.list_some(twice)} under an old name too.")
    found = {_new_name(name): array for name, array in found.items()}
    shapes = arrays.parameter_shapes(model_config)
    published = {
        path: {_published_name(path): _published_shape(shape)} for path, shape in shapes.items()
    }
    return arrays.to_params(found, shapes, published, _to_ours)


def read_config(path: pathlib.Path) -> ConfigDict:
    """`config.model` from diffusers' config.json.

    Raises: FileNotFoundError; ValueError for a whole pipeline or a VAE of another kind, with what
      is not supported, or as `fields.read`.
    """
    fields.refuse_pipeline(path.parent, "vae")
    what = "the config.json that diffusers writes beside the weights"
    theirs, shown = DEFAULTS | fields.read(path, what), files.printable(path)
    if theirs["_class_name"] != "AutoencoderKL":
        raise UserError(
            f"{shown} describes diffusers' {fields.show(theirs['_class_name'])}, but only an "
            "AutoencoderKL can be converted; docs/weights.md lists some."
        )
    wrong = {
        name: theirs.get(name) for name, check in CHECKS.items() if not check(theirs.get(name))
    }
    if wrong:
        raise UserError(
            f"{shown} has {fields.show(wrong)}: it must be the config.json that diffusers wrote "
            "beside the weights of an AutoencoderKL; docs/weights.md lists some."
        )
    other = {name: theirs[name] for name, value in FIXED.items() if _kinds(theirs[name]) != {value}}
    if theirs["use_quant_conv"] != theirs["use_post_quant_conv"]:
        other["use_post_quant_conv"] = theirs["use_post_quant_conv"]
    if theirs["in_channels"] != theirs["out_channels"]:
        other["out_channels"] = theirs["out_channels"]
    if other:
        raise UserError(f"{shown} describes a VAE of another kind: {fields.show(other)}.")
    return ConfigDict(
        dict(
            name="vae",
            image_channels=theirs["in_channels"],
            latent_channels=theirs["latent_channels"],
            block_channels=tuple(theirs["block_out_channels"]),
            layers_per_block=theirs["layers_per_block"],
            norm_groups=theirs["norm_num_groups"],
            use_quant_conv=theirs["use_quant_conv"],
            mid_attention=theirs["mid_block_add_attention"],
            scale=theirs["scaling_factor"],
            shift=theirs["shift_factor"] or 0.0,
            dtype="float32",
            remat=False,
        )
    )


def _is_list(value, check):
    return isinstance(value, list) and 0 < len(value) <= MOST_LEVELS and all(map(check, value))


def _kinds(value):
    """The different values of a list, as text, or the one value."""
    if isinstance(value, list):
        return set(map(str, value))
    return {value if isinstance(value, str) else None if value is None else repr(value)}


def _new_name(name):
    return re.sub(
        r"(attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}{OLD_NAMES[match[2]]}.",
        name,
    )


def _published_name(path):
    """'mid_block/resnets_0/norm1/scale' is 'mid_block.resnets.0.norm1.weight'."""
    module, _, leaf = path.rpartition("/")
    module = re.sub(r"_(\d+)(?=[_/]|$)", r".\1", module)  # numbers are modules of their own
    module = re.sub(r"(\.\d+)_", r"\1.", module)
    return f"{module.replace('/', '.')}.{LEAVES[leaf]}"


def _published_shape(shape):
    return tuple(shape[i] for i in _AXES[len(shape)])


def _to_ours(_, array):
    return array.transpose(np.argsort(_AXES[array.ndim]))


# Theirs from ours, by rank: convolutions [h, w, in, out] -> [out, in, h, w]; Linear [in, out].
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
