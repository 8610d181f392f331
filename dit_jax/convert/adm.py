"""Converter for ADM's published UNets, with guided-diffusion's names.

The published q, k and v are one array. Names count the entries of input_blocks and output_blocks.
An entry is the first convolution, a residual block with the attention after it, or a downsampling
layer. An upsampling layer belongs to the entry before it, at its end.
"""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import parameters
from dit_jax.errors import UserError
from dit_jax.models import unet_presets

# Preset -> noise schedule, and whether rows of q, k, v are [3, H, D/H] instead of [H, 3, D/H].
PUBLISHED = {
    "adm-imagenet64": dict(schedule="cosine", new_attention_order=True),
    "adm-imagenet256": dict(schedule="linear", new_attention_order=False),
}
# This project's layer of a residual block -> guided-diffusion's.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# The same for an attention block. Its projections are convolutions over a sequence, [out, in, 1].
PROJECTIONS = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out_0": "proj_out"}
ATTENTION = {"group_norm": "norm", **PROJECTIONS}
# This project's module outside of the blocks -> guided-diffusion's.
OUTSIDE = {
    "time_embedding/linear_1": "time_embed.0",
    "time_embedding/linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def to_params(
    tensors: Mapping[str, np.ndarray], model_config, new_attention_order: bool = False
) -> dict:
    """Returns the model's parameters from arrays under the published names.

    Args:
      tensors: published name -> array.
      new_attention_order: whether rows of q, k, v are [3, H, D/H] instead of [H, 3, D/H]. Both
        orders have the same shapes, so the file does not show it.
    Raises: ValueError for a model with transformer blocks; as `parameters.check`.
    """

    def to_parameter(path, array):
        layer = path.split("/")[-2]
        if PROJECTIONS.get(layer) == "qkv":
            array = _select_rows(array, "qkv".index(layer[-1]), model_config, new_attention_order)
        if layer in PROJECTIONS and path.endswith("/kernel"):
            array = array[:, :, 0]
        return parameters.from_torch(path, array)

    return parameters.to_params(tensors, make_table(model_config), to_parameter)


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays; q, k and v have the same one.

    Raises: ValueError for a model with transformer blocks.
    """
    if model_config.transformer_depth:
        raise UserError(
            f"model.transformer_depth={model_config.transformer_depth}: ADM's UNet has none, 0; "
            "one of diffusers is converted with `convert unet`."
        )
    modules = _list_modules(model_config)
    return parameters.make_table(
        model_config, lambda path: _published_name(path, modules), _published_shape
    )


def match_preset(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the name in PUBLISHED of the model with exactly these arrays.

    Raises: ValueError if there is none.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in tensors.items()}
    for name in PUBLISHED:
        if shapes == parameters.list_published(make_table(get_config(name))):
            return name
    raise UserError(
        f"the checkpoint's {len(tensors)} arrays are of none of {', '.join(PUBLISHED)}: give "
        "--config with the model's sizes."
    )


def get_config(name: str) -> ConfigDict:
    """Returns `config.model` of a preset."""
    fields = dict(name="unet", **unet_presets.get(name))
    return ConfigDict(fields | dict(dtype="float32", attention="auto", remat="none"))


def _list_modules(model_config):
    """Returns {this project's module: guided-diffusion's}, of blocks without their layers."""
    levels, blocks = len(model_config.channel_mult), model_config.blocks_per_level
    modules = OUTSIDE | {
        "mid_block/resnets_0": "middle_block.0",
        "mid_block/attentions_0": "middle_block.1",
        "mid_block/resnets_1": "middle_block.2",
    }
    for i in range(levels):
        first = i * (blocks + 1)  # both ways have as many entries in each level
        # Entry 0 of input_blocks is conv_in, so the first block is entry 1.
        for j in range(blocks):
            modules[f"down_blocks_{i}_resnets_{j}"] = f"input_blocks.{1 + first + j}.0"
            modules[f"down_blocks_{i}_attentions_{j}"] = f"input_blocks.{1 + first + j}.1"
        modules[f"down_blocks_{i}_downsamplers_0"] = f"input_blocks.{1 + first + blocks}.0"
        for j in range(blocks + 1):
            modules[f"up_blocks_{i}_resnets_{j}"] = f"output_blocks.{first + j}.0"
            modules[f"up_blocks_{i}_attentions_{j}"] = f"output_blocks.{first + j}.1"
        # An upsampling layer comes after the attention of its entry, if that has one.
        attended = levels - 1 - i in model_config.attention_levels
        modules[f"up_blocks_{i}_upsamplers_0"] = f"output_blocks.{first + blocks}.{1 + attended}"
    return modules


def _published_name(path, modules):
    """Returns the name of the array that one parameter is taken from."""
    module, _, leaf = path.rpartition("/")
    if module in modules:
        return parameters.to_torch_name(f"{modules[module]}/{leaf}")
    block, _, layer = module.rpartition("/")
    if layer == "conv" and "down" in block:  # a downsampling layer without residual block
        layer = "op"
    layer = (RESNET | ATTENTION).get(layer, layer)
    return parameters.to_torch_name(f"{modules[block]}/{layer}/{leaf}")


def _published_shape(path, shape):
    """Returns the shape of the array that one parameter is taken from."""
    layer, leaf = path.split("/")[-2:]
    shape = parameters.to_torch_shape(path, shape)
    # q, k and v are one array, so each of the three parameters expects all of its rows.
    if PROJECTIONS.get(layer) == "qkv":
        shape = (3 * shape[0], *shape[1:])
    return (*shape, 1) if layer in PROJECTIONS and leaf == "kernel" else shape


def _select_rows(array, part, model_config, new_attention_order):
    """Returns the rows of q, k or v (part 0, 1 or 2), sorted by head."""
    size = len(array) // 3
    head_dim = model_config.head_dim or size // model_config.num_heads
    axes = (3, -1, head_dim) if new_attention_order else (-1, 3, head_dim)
    rows = array.reshape(*axes, *array.shape[1:])
    return rows.take(part, axis=axes.index(3)).reshape(size, *array.shape[1:])
