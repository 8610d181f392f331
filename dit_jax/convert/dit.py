"""The published DiT's parameters: its names, Linear weights [out, in], one entry per block."""

import math
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import arrays
from dit_jax.models import layers

# Our module -> the published one; {} is the block's number.
MODULES = {
    "x_embedder": "x_embedder.proj",
    "t_embedder/mlp_0": "t_embedder.mlp.0",
    "t_embedder/mlp_2": "t_embedder.mlp.2",
    "y_embedder": "y_embedder.embedding_table",
    "blocks/adaLN_modulation": "blocks.{}.adaLN_modulation.1",
    "blocks/attn/qkv": "blocks.{}.attn.qkv",
    "blocks/attn/proj": "blocks.{}.attn.proj",
    "blocks/mlp/fc1": "blocks.{}.mlp.fc1",
    "blocks/mlp/fc2": "blocks.{}.mlp.fc2",
    "final_layer/adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_layer/linear": "final_layer.linear",
}
LEAVES = {"kernel": "weight", "embedding": "weight", "bias": "bias"}


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Our parameters from the published names; see `convert.load`.

    The published position table is a constant here: it must equal ours and is not returned.
    """
    shapes = arrays.parameter_shapes(model_config)
    published = {path: _published(path, shape, model_config) for path, shape in shapes.items()}
    table = layers.sincos_position_table(
        model_config.hidden_size, model_config.input_size // model_config.patch_size
    )[None]
    shapes["pos_embed"] = table.shape
    published["pos_embed"] = {"pos_embed": table.shape}
    params = arrays.to_params(found, shapes, published, _to_ours)
    pos_embed = params.pop("pos_embed")
    if not np.allclose(pos_embed, table, atol=1e-5):
        difference = np.abs(pos_embed - table).max()
        raise ValueError(
            f"the checkpoint's pos_embed differs from the sin-cos table by {difference:.2g}; it "
            "was trained with another position embedding."
        )
    return params


def _published(path, shape, model_config):
    """{name: shape} of the published array behind one of our parameters, or of every block's."""
    module, _, leaf = path.rpartition("/")
    name = f"{MODULES[module]}.{LEAVES[leaf]}"
    depth = shape[0] if "{}" in name else 1
    shape = shape[1:] if "{}" in name else shape
    if path == "x_embedder/kernel":
        p = model_config.patch_size
        shape = (shape[1], model_config.in_channels, p, p)
    elif leaf == "kernel":
        shape = (math.prod(shape[1:]), shape[0])
    elif leaf == "bias":
        shape = (math.prod(shape),)
    return {name.format(i): shape for i in range(depth)}


def _to_ours(path, array):
    """One published array, laid out as ours up to a reshape."""
    if path == "x_embedder/kernel":
        return array.transpose(2, 3, 1, 0)  # [D, C, p, p] -> [p, p, C, D]
    return array.T if path.endswith("kernel") else array
