"""Converter between the published DiT's names and this project's parameters.

The published file also has the position table, which is a constant here.
"""

import math
from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from dit_jax.config import sizes
from dit_jax.convert import parameters
from dit_jax.errors import UserError
from dit_jax.models import dit, layers

# This project's module -> the published one; {} is the block's number.
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
MAX_POSITIONS = 2**26  # numbers in a position table, which is computed in f64: 512 MiB


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The published position table must equal this project's, and is not returned.
    """
    params = parameters.to_params(tensors, make_table(model_config))
    pos_embed, table = params.pop("pos_embed"), make_position_table(model_config)
    if not np.allclose(pos_embed, table, atol=1e-5):
        difference = np.abs(pos_embed - table).max()
        raise UserError(
            f"the checkpoint's pos_embed differs from the sin-cos table by {difference:.2g}; it "
            "was trained with another position embedding."
        )
    return params


def to_published(params, model_config) -> dict[str, np.ndarray]:
    """Returns the arrays under the published names, f32. The inverse of `to_params`."""
    table = make_table(model_config)
    flat = {"pos_embed": make_position_table(model_config)}
    flat |= flax.traverse_util.flatten_dict(params, sep="/")
    published = {}
    for path, array in flat.items():
        shapes = table[path].published
        # The blocks are the first axis of a stacked array.
        parts = np.asarray(array, np.float32).reshape(len(shapes), -1)
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            published[name] = parameters.to_torch(path, part, shape)
    return published


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays, and the same of 'pos_embed'.

    Raises: ValueError as `check_block`.
    """
    check_block(model_config)

    def published_shape(path, shape):
        if path == "x_embedder/kernel":
            p = model_config.patch_size
            return shape[1], model_config.in_channels, p, p
        return parameters.to_linear_shape(path, shape)

    table = parameters.make_table(model_config, _published_name, published_shape)
    shape = (1, math.prod(_grid(model_config)), model_config.hidden_size)
    return table | {"pos_embed": parameters.Entry(shape, {"pos_embed": shape})}


def _published_name(path):
    """Returns the published name of a parameter; {} is the block's number."""
    module, _, leaf = path.rpartition("/")
    return parameters.to_torch_name(f"{MODULES[module]}/{leaf}")


def check_block(model_config) -> None:
    """Raises unless block and condition have published names, and the sizes are realistic.

    Raises: ValueError.
    """
    # Sizes may come from a stranger's file, and the table is computed before any array is compared.
    tokens = math.prod(_grid(model_config))
    if tokens * model_config.hidden_size > MAX_POSITIONS:
        raise UserError(
            f"model.input_size={model_config.input_size}, patch_size={model_config.patch_size} and "
            f"hidden_size={model_config.hidden_size} are {tokens:,} tokens, of more than "
            f"{MAX_POSITIONS:,} numbers: no DiT has as many."
        )
    for key, published in (("block", "adaLN-Zero"), ("condition", "label")):
        if model_config[key] != published:
            raise UserError(
                f"model.{key}={model_config[key]!r} has no published names or weights; only "
                f"{published!r} can be converted. Other commands read any workdir as it is."
            )


def read_sizes(tensors: Mapping[str, np.ndarray]) -> dict:
    """Returns the fields of `config.model` that published arrays determine.

    The number of heads is that of the paper's model with the same width and depth. 1000 rows of
    labels are ImageNet's classes alone. With any other number of rows, the last row is the null
    class.
    Raises: ValueError if the arrays are not a DiT's, or no paper's model has this width and depth.
    """
    ranks = {
        "x_embedder.proj.weight": 4,  # [D, C, p, p]
        "pos_embed": 3,  # [1, N, D]
        "y_embedder.embedding_table.weight": 2,  # [classes, D]
        "blocks.0.mlp.fc1.weight": 2,  # [4D, D]
        "final_layer.linear.weight": 2,  # [p*p*C or twice that, D]
    }
    # Names and ranks are checked first: the sizes below are read from the shapes.
    shapes = {name: np.shape(tensors.get(name)) for name in ranks}
    wrong = {n: shapes[n] or "missing" for n, rank in ranks.items() if len(shapes[n]) != rank}
    if wrong:
        raise UserError(
            f"the checkpoint is not a published DiT's: {wrong}. A DiT of diffusers is given as the "
            "directory that it wrote."
        )
    (hidden_size, in_channels, patch_size, _), positions, labels, mlp, output = shapes.values()
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    sizes = dict(
        input_size=patch_size * math.isqrt(positions[1]),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=len(blocks),
        mlp_ratio=mlp[0] / hidden_size,
        num_classes=NUM_CLASSES,
        learn_sigma=output[0] == 2 * patch_size**2 * in_channels,
    )
    # The table has one row more if there is a null class.
    if labels[0] == NUM_CLASSES:
        sizes["null_condition"] = False
    else:
        sizes["num_classes"] = labels[0] - 1
    # No shape depends on the number of heads.
    known_heads = {size[:2]: size[2] for size in dit.SIZES.values()}
    if (hidden_size, len(blocks)) not in known_heads:
        raise UserError(
            f"the checkpoint has {hidden_size=} and depth={len(blocks)}, and no array shows its "
            f"num_heads, which is known of {', '.join(map(str, known_heads))} alone: give --config "
            "with all its sizes."
        )
    return sizes | {"num_heads": known_heads[hidden_size, len(blocks)]}


def make_position_table(model_config) -> np.ndarray:
    """Returns the published pos_embed [1, N, D] f32, equal to the bit."""
    return layers.make_position_table(model_config.hidden_size, *_grid(model_config))[None]


def _grid(model_config):
    """Returns (rows, columns) of patches."""
    height, width, _ = sizes.input_shape(model_config)
    return height // model_config.patch_size, width // model_config.patch_size
