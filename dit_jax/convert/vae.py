"""Converter for diffusers' AutoencoderKL."""

import collections
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import fields, parameters, weights
from dit_jax.errors import UserError
from dit_jax.system import files

# Name of an attention layer before diffusers 0.17 -> its name since then.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAX_LEVELS = 8
# Values of the other fields that a config.json may leave out.
DEFAULTS = dict(
    _class_name="AutoencoderKL",
    scaling_factor=0.18215,
    shift_factor=None,
    use_post_quant_conv=True,
    norm_num_groups=32,
)
# Field with a whole number above 0 -> its largest value.
COUNTS = dict(
    in_channels=fields.MAX_SIZE,
    latent_channels=fields.MAX_SIZE,
    layers_per_block=32,
    norm_num_groups=fields.MAX_SIZE,
)
# Field -> the values that this project's VAE supports; the first is the default.
CHOICES = dict(
    act_fn=("silu",),
    latents_mean=(None,),
    latents_std=(None,),
    mid_block_add_attention=(True, False),
    use_quant_conv=(True, False),
)
# Field -> the only block type that this project's VAE supports.
BLOCK_TYPES = dict(down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D")


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    Layers of the attention may have their names from before diffusers 0.17.
    """
    names = [_rename(name) for name in tensors]
    if duplicates := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(
            f"the checkpoint holds {files.list_some(duplicates)} under an old name too. Save it "
            "with one of the names."
        )
    tensors = dict(zip(names, tensors.values(), strict=True))
    return parameters.to_params(tensors, make_table(model_config))


def _rename(name):
    """Returns the name of an array since diffusers 0.17."""
    return re.sub(
        r"(attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}{OLD_NAMES[match[2]]}.",
        name,
    )


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays."""
    return parameters.make_table(model_config, parameters.to_diffusers_name)


def read_model_config(source: pathlib.Path) -> ConfigDict:
    """Returns `config.model` from diffusers' config.json.

    Args:
      source: the directory, or a weights file in it.
    Raises: FileNotFoundError; ValueError for a whole pipeline or a VAE of another kind, with the
      unsupported fields; as `weights.find_config` and `fields.read`.
    """
    path = weights.find_config(source, "vae")
    fields.refuse_pipeline(path.parent, "vae", "vae")
    config = fields.read(path, fields.CONFIG_DESCRIPTION.format("diffusers"))
    config = fields.complete(config, DEFAULTS, CHOICES)
    fields.check_class(path, config["_class_name"], ["AutoencoderKL"])
    fields.check_supported(path, "a VAE", config, _list_unsupported(config))
    model_config = dict(
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
    return ConfigDict(model_config)


def _list_unsupported(config):
    """Returns {field: supported values, as a text} of the fields with an unsupported value."""
    unsupported = fields.list_unsupported(config, COUNTS, CHOICES)
    channels = config.get("block_out_channels")
    if not _is_list(channels) or not all(map(fields.is_count, channels)):
        unsupported["block_out_channels"] = f"a list of up to {MAX_LEVELS} numbers above 0"
    for name, supported in BLOCK_TYPES.items():
        block_types = config.get(name)
        if not _is_list(block_types) or any(value != supported for value in block_types):
            unsupported[name] = f"a list of up to {MAX_LEVELS} times {supported}"
    if not fields.is_number(config["scaling_factor"]) or not config["scaling_factor"]:
        unsupported["scaling_factor"] = "a number other than 0"
    if config["shift_factor"] is not None and not fields.is_number(config["shift_factor"]):
        unsupported["shift_factor"] = "None, or a number"
    # Each of these fields must have the value of another field.
    if config["use_post_quant_conv"] is not config["use_quant_conv"]:
        unsupported["use_post_quant_conv"] = "the same as use_quant_conv"
    if config.get("out_channels") != config.get("in_channels"):
        unsupported["out_channels"] = "in_channels"
    return unsupported


def _is_list(value):
    return isinstance(value, list) and 0 < len(value) <= MAX_LEVELS
