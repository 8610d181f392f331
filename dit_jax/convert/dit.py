"""Converter for DiT, whose arrays have the names of the published PyTorch code.

A published file also has the position table, which is a constant here.
"""

import math
from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from dit_jax.config import sizes
from dit_jax.convert import parameters
from dit_jax.errors import UserError
from dit_jax.models import dit, layers

# This project's module -> the published module; {} is the block's number.
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
NUM_CLASSES = 1000  # ImageNet's classes, in all published models
MAX_TABLE_SIZE = 2**26  # numbers in a position table; in f64, as it is computed, 512 MiB


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    Raises: as `parameters.to_params`; ValueError if the published position table is not the one of
      this project.
    """
    params = parameters.to_params(tensors, make_table(model_config))
    pos_embed, expected = params.pop("pos_embed"), make_position_table(model_config)
    if not np.allclose(pos_embed, expected, atol=1e-5):
        difference = np.abs(pos_embed - expected).max()
        raise UserError(
            f"the checkpoint's pos_embed differs from the sin-cos table by {difference:.2g}. A "
            "model with another position embedding cannot be converted."
        )
    return params


def to_published(params, model_config) -> dict[str, np.ndarray]:
    """Returns published name -> f32 array from the parameters: the inverse of `to_params`."""
    table = make_table(model_config)
    arrays = {"pos_embed": make_position_table(model_config)}
    arrays |= flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for path, array in arrays.items():
        shapes = table[path].published
        # The first axis of a stacked array is the block. Any other array is taken as one block.
        blocks = np.asarray(array, np.float32).reshape(len(shapes), -1)
        for (name, shape), block in zip(shapes.items(), blocks, strict=True):
            tensors[name] = parameters.to_torch(path, block, shape)
    return tensors


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays, with 'pos_embed' among the parameters.

    Raises: ValueError as `check_model`.
    """
    check_model(model_config)

    def published_shape(path, shape):
        if path == "x_embedder/kernel":
            p = model_config.patch_size
            return shape[1], model_config.in_channels, p, p
        return parameters.to_linear_shape(path, shape)

    table = parameters.make_table(model_config, _published_name, published_shape)
    shape = (1, math.prod(_patch_grid(model_config)), model_config.hidden_size)
    return table | {"pos_embed": parameters.Entry(shape, {"pos_embed": shape})}


def _published_name(path):
    """Returns the published name of a parameter; {} is the block's number."""
    module, _, leaf = path.rpartition("/")
    return parameters.to_torch_name(f"{MODULES[module]}/{leaf}")


def check_model(model_config) -> None:
    """Raises ValueError unless the model has published names and realistic sizes."""
    # Sizes may come from a stranger's file, and the table is computed before any array is compared.
    num_tokens = math.prod(_patch_grid(model_config))
    if num_tokens * model_config.hidden_size > MAX_TABLE_SIZE:
        raise UserError(
            f"model.input_size={model_config.input_size} and patch_size={model_config.patch_size} "
            f"are {num_tokens:,} tokens. With hidden_size={model_config.hidden_size}, their "
            f"position table has more than {MAX_TABLE_SIZE:,} numbers. Correct the sizes."
        )
    for key, published in (("block", "adaLN-Zero"), ("condition", "label")):
        if model_config[key] != published:
            raise UserError(
                f"model.{key}={model_config[key]!r} has no published names or weights. Only "
                f"{published!r} can be converted. Other commands read any workdir as it is."
            )


def infer_sizes(tensors: Mapping[str, np.ndarray]) -> dict:
    """Returns the fields of `config.model` that published arrays determine.

    No shape depends on the number of heads, so it is taken from the paper's model of the same width
    and depth. A label table with 1000 rows has ImageNet's classes and no null class. In a table
    with any other number of rows, the last row is the null class.
    Raises: ValueError if the arrays are not a DiT's, or no model in the paper has this width and
      depth.
    """
    ranks = {
        "x_embedder.proj.weight": 4,  # [D, C, p, p]
        "pos_embed": 3,  # [1, N, D]
        "y_embedder.embedding_table.weight": 2,  # [classes, D]
        "blocks.0.mlp.fc1.weight": 2,  # [4D, D]
        "final_layer.linear.weight": 2,  # [p*p*C or twice that, D]
    }
    # The sizes below are read from these shapes, so their ranks are checked first.
    shapes = {name: np.shape(tensors.get(name)) for name in ranks}
    wrong = {name: shapes[name] or "missing" for name in ranks if len(shapes[name]) != ranks[name]}
    if wrong:
        raise UserError(
            f"the checkpoint is not a published DiT: {wrong}. To convert a DiT of diffusers, give "
            "the directory that diffusers wrote."
        )
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    num_labels = shapes["y_embedder.embedding_table.weight"][0]
    output_size = shapes["final_layer.linear.weight"][0]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    known_heads = {(width, num_blocks): heads for width, num_blocks, heads in dit.SIZES.values()}
    if (hidden_size, depth) not in known_heads:
        raise UserError(
            f"the checkpoint has {hidden_size=} and {depth=}, but num_heads is only known for "
            f"{', '.join(map(str, known_heads))}, and no array shows it. Give --config with all "
            "sizes."
        )
    model_sizes = dict(
        input_size=patch_size * math.isqrt(shapes["pos_embed"][1]),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=known_heads[hidden_size, depth],
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / hidden_size,
        learn_sigma=output_size == 2 * patch_size**2 * in_channels,
    )
    if num_labels == NUM_CLASSES:
        return model_sizes | dict(num_classes=NUM_CLASSES, null_condition=False)
    return model_sizes | dict(num_classes=num_labels - 1)


def make_position_table(model_config) -> np.ndarray:
    """Returns the published pos_embed [1, N, D] f32, equal to the bit."""
    return layers.make_position_table(model_config.hidden_size, *_patch_grid(model_config))[None]


def _patch_grid(model_config):
    """Returns (rows, columns) of patches."""
    height, width, _ = sizes.input_shape(model_config)
    return height // model_config.patch_size, width // model_config.patch_size
