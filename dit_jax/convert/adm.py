"""Converter for ADM's UNets, whose arrays have guided-diffusion's names.

A published array holds q, k and v together. Published names number the entries of input_blocks and
output_blocks. An entry is the first convolution, a downsampling layer, or a residual block with the
attention after it. An upsampling layer is the last part of the preceding entry.
"""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import parameters
from dit_jax.errors import UserError
from dit_jax.models import unet_presets

# Preset of a published checkpoint -> its noise schedule, and its order of q, k and v (`to_params`).
CHECKPOINTS = {
    "adm-imagenet64": dict(schedule="cosine", new_attention_order=True),
    "adm-imagenet256": dict(schedule="linear", new_attention_order=False),
}
# Layers of a residual block: this project's name -> the published name.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Layers of an attention block: this project's name -> the published name. The published projections
# are 1D convolutions with kernels [out, in, 1].
PROJECTIONS = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out_0": "proj_out"}
ATTENTION = {"group_norm": "norm", **PROJECTIONS}
# Modules outside of the blocks: this project's name -> the published name.
OUTSIDE_BLOCKS = {
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
    """Returns the model's parameters from the published names; see `convert.load`.

    Args:
      new_attention_order: whether the rows of the array of q, k and v are ordered [3, H, D/H]
        instead of [H, 3, D/H]. The shape is the same, so the file does not show the order.
    Raises: ValueError as `make_table` and `parameters.to_params`.
    """

    def to_parameter(path, array):
        layer = path.split("/")[-2]
        if PROJECTIONS.get(layer) == "qkv":
            part = "qkv".index(layer[-1])
            array = _select_rows(array, part, model_config, new_attention_order)
        if layer in PROJECTIONS and path.endswith("/kernel"):
            array = array[:, :, 0]
        return parameters.from_torch(path, array)

    return parameters.to_params(tensors, make_table(model_config), to_parameter)


def _select_rows(array, part, model_config, new_attention_order):
    """Returns the rows of q (part 0), k (part 1) or v (part 2), sorted by head."""
    width = len(array) // 3
    head_dim = model_config.head_dim or width // model_config.num_heads
    row_shape = (3, -1, head_dim) if new_attention_order else (-1, 3, head_dim)
    split_rows = array.reshape(*row_shape, *array.shape[1:])
    part_axis = 0 if new_attention_order else 1
    return split_rows.take(part, axis=part_axis).reshape(width, *array.shape[1:])


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays; q, k and v have the same array.

    Raises: ValueError if the model has transformer blocks.
    """
    if model_config.transformer_depth:
        raise UserError(
            f"model.transformer_depth={model_config.transformer_depth}: ADM's UNet has no "
            "transformer blocks. Set it to 0, or convert a UNet of diffusers with `convert unet`."
        )
    modules = _list_modules(model_config)
    return parameters.make_table(
        model_config, lambda path: _published_name(path, modules), _published_shape
    )


def _list_modules(model_config):
    """Returns {this project's module: published module} of blocks, and of layers outside of them.

    The model may lack some of them, such as attention at some levels.
    """
    num_levels, num_blocks = len(model_config.channel_mult), model_config.blocks_per_level
    modules = OUTSIDE_BLOCKS | {
        "mid_block/resnets_0": "middle_block.0",
        "mid_block/attentions_0": "middle_block.1",
        "mid_block/resnets_1": "middle_block.2",
    }
    for level in range(num_levels):
        # Each level has num_blocks + 1 entries in input_blocks and as many in output_blocks.
        first_output = level * (num_blocks + 1)
        first_input = 1 + first_output  # entry 0 is conv_in
        down, up = f"down_blocks_{level}", f"up_blocks_{level}"
        for i in range(num_blocks):
            modules[f"{down}_resnets_{i}"] = f"input_blocks.{first_input + i}.0"
            modules[f"{down}_attentions_{i}"] = f"input_blocks.{first_input + i}.1"
        modules[f"{down}_downsamplers_0"] = f"input_blocks.{first_input + num_blocks}.0"
        for i in range(num_blocks + 1):
            modules[f"{up}_resnets_{i}"] = f"output_blocks.{first_output + i}.0"
            modules[f"{up}_attentions_{i}"] = f"output_blocks.{first_output + i}.1"
        # An upsampling layer comes after the residual block and, if there is one, the attention.
        position = 2 if num_levels - 1 - level in model_config.attention_levels else 1
        modules[f"{up}_upsamplers_0"] = f"output_blocks.{first_output + num_blocks}.{position}"
    return modules


def _published_name(path, modules):
    """Returns the published name of a parameter, or of q, k and v together."""
    module, _, leaf = path.rpartition("/")
    if module in modules:
        return parameters.to_torch_name(f"{modules[module]}/{leaf}")
    block, _, layer = module.rpartition("/")
    if layer == "conv" and "down" in block:  # a downsampling layer without a residual block
        layer = "op"
    layer = (RESNET | ATTENTION).get(layer, layer)
    return parameters.to_torch_name(f"{modules[block]}/{layer}/{leaf}")


def _published_shape(path, shape):
    """Returns the published shape of a parameter, or of q, k and v together."""
    layer, leaf = path.split("/")[-2:]
    shape = parameters.to_torch_shape(path, shape)
    if PROJECTIONS.get(layer) == "qkv":
        shape = (3 * shape[0], *shape[1:])
    return (*shape, 1) if layer in PROJECTIONS and leaf == "kernel" else shape


def match_preset(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the preset in CHECKPOINTS whose model has exactly these arrays.

    Raises: ValueError if there is no such preset.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in tensors.items()}
    for name in CHECKPOINTS:
        if shapes == parameters.list_published(make_table(get_model_config(name))):
            return name
    raise UserError(
        f"the checkpoint's {len(tensors)} arrays match none of {', '.join(CHECKPOINTS)}. Give a "
        "--config with the model's sizes."
    )


def get_model_config(name: str) -> ConfigDict:
    """Returns `config.model` of a preset."""
    runtime = dict(dtype="float32", attention="auto", remat="none")
    return ConfigDict(dict(name="unet", **unet_presets.get(name), **runtime))
