"""Converter for ADM's published UNets, with guided-diffusion's names.

The published q, k and v are one array. Names count the entries of input_blocks and output_blocks.
An entry is the first convolution, a residual block with the attention after it, or a downsampling
layer. An upsampling layer belongs to the entry before it, at its end.
"""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import arrays
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
# The same for an attention block.
ATTENTION = {
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out_0": "proj_out",
}
# This project's module outside of the blocks -> guided-diffusion's.
OUTSIDE = {
    "time_embedding/linear_1": "time_embed.0",
    "time_embedding/linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def to_params(
    found: Mapping[str, np.ndarray], model_config, new_attention_order: bool = False
) -> dict:
    """Returns the model's parameters from arrays under the published names.

    Args:
      found: published name -> array.
      new_attention_order: whether rows of q, k, v are [3, H, D/H] instead of [H, 3, D/H]. Both
        orders have the same shapes, so the file does not show it.
    Raises: ValueError for a model with transformer blocks; as `arrays.check`.
    """
    published = published_shapes(model_config)

    def to_parameter(path, array):
        part = path.split("/")[-2]
        if part in ("to_q", "to_k", "to_v"):
            array = _part(array, "qkv".index(part[-1]), model_config, new_attention_order)
        if path.endswith("/kernel"):
            # Attention's projections are convolutions over a sequence, [out, in, 1].
            array = array[:, :, 0] if array.ndim == 3 else array
            return array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        return array

    return arrays.to_params(found, arrays.parameter_shapes(model_config), published, to_parameter)


def published_shapes(model_config) -> dict[str, dict[str, arrays.Shape]]:
    """Returns parameter path -> {published name: shape}; q, k and v have the same entry.

    Raises: ValueError for a model with transformer blocks.
    """
    if model_config.transformer_depth:
        raise UserError(
            f"model.transformer_depth={model_config.transformer_depth}: ADM's UNet has none, 0; "
            "one of diffusers is converted with `convert unet`."
        )
    modules = _modules(model_config)
    return {
        path: _published(path, shape, modules)
        for path, shape in arrays.parameter_shapes(model_config).items()
    }


def preset(found: Mapping[str, np.ndarray]) -> str:
    """Returns the name in PUBLISHED of the model with exactly these arrays.

    Raises: ValueError if there is none.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in found.items()}
    for name in PUBLISHED:
        published = published_shapes(model_config(name)).values()
        if shapes == {n: shape for part in published for n, shape in part.items()}:
            return name
    raise UserError(
        f"the checkpoint's {len(found)} arrays are of none of {', '.join(PUBLISHED)}: give "
        "--config with the model's sizes."
    )


def model_config(name: str) -> ConfigDict:
    """Returns `config.model` of a preset."""
    fields = dict(name="unet", **unet_presets.get(name))
    return ConfigDict(fields | dict(dtype="float32", attention="auto", remat="none"))


def _modules(model_config):
    """Returns {this project's module: guided-diffusion's}.

    The keys are the modules outside of the blocks, and the blocks themselves without their layers.
    """
    levels, blocks = len(model_config.channel_mult), model_config.blocks_per_level
    modules, entry = dict(OUTSIDE), 1
    # Entry 0 of input_blocks is conv_in, so the first block is entry 1.
    for i in range(levels):
        for j in range(blocks):
            modules[f"down_blocks_{i}_resnets_{j}"] = f"input_blocks.{entry}.0"
            modules[f"down_blocks_{i}_attentions_{j}"] = f"input_blocks.{entry}.1"
            entry += 1
        if i < levels - 1:
            modules[f"down_blocks_{i}_downsamplers_0"] = f"input_blocks.{entry}.0"
            entry += 1
    modules["mid_block/resnets_0"] = "middle_block.0"
    modules["mid_block/attentions_0"] = "middle_block.1"
    modules["mid_block/resnets_1"] = "middle_block.2"
    entry = 0
    for i in range(levels):
        for j in range(blocks + 1):
            modules[f"up_blocks_{i}_resnets_{j}"] = f"output_blocks.{entry}.0"
            modules[f"up_blocks_{i}_attentions_{j}"] = f"output_blocks.{entry}.1"
            entry += 1
        # An upsampling layer comes after the attention of its entry, if that has one.
        attended = levels - 1 - i in model_config.attention_levels
        modules[f"up_blocks_{i}_upsamplers_0"] = f"output_blocks.{entry - 1}.{1 + attended}"
    return modules


def _published(path, shape, modules):
    """Returns {published name: shape} of the array that one parameter is taken from."""
    module, _, leaf = path.rpartition("/")
    if module in modules:
        name = modules[module]
    else:
        block, _, layer = module.rpartition("/")
        if layer == "conv":  # a resampling layer without residual block
            layer = "op" if "down" in block else "conv"
        name = f"{modules[block]}.{(RESNET | ATTENTION).get(layer, layer)}"
    if leaf == "kernel":
        shape = (*shape[:-3:-1], *shape[:-2])  # [h, w, in, out] -> [out, in, h, w]
    # q, k and v are one array, so each of the three parameters expects all of its rows.
    if name.endswith(".qkv"):
        shape = (3 * shape[0], *shape[1:])
    if leaf == "kernel" and name.endswith((".qkv", ".proj_out")):
        shape = (*shape, 1)
    return {f"{name}.{LEAVES[leaf]}": shape}


def _part(array, part, model_config, new_attention_order):
    """Returns the rows of q, k or v (part 0, 1 or 2), sorted by head."""
    size = len(array) // 3
    head_dim = model_config.head_dim or size // model_config.num_heads
    axes = (3, -1, head_dim) if new_attention_order else (-1, 3, head_dim)
    rows = array.reshape(*axes, *array.shape[1:])
    return rows.take(part, axis=axes.index(3)).reshape(size, *array.shape[1:])
