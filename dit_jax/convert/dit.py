"""Converter between the published DiT's names and this project's parameters.

The published Linear weights are [out, in], and every block has arrays of its own. Here kernels are
[in, out], and all blocks are stacked.
"""

import math
from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from dit_jax.config import sizes
from dit_jax.convert import arrays
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
LEAVES = {"kernel": "weight", "embedding": "weight", "bias": "bias"}
NUM_CLASSES = 1000  # ImageNet's classes, in all published models
MOST_POSITIONS = 2**26  # numbers in a position table, which is computed in f64: 512 MiB


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The published file also holds the position table, which is a constant here. The two must be
    equal, and the table is not returned.
    """
    check_block(model_config)
    # The table is added to the expected arrays, so that `arrays.to_params` accepts it.
    table = position_table(model_config)
    shapes = arrays.parameter_shapes(model_config) | {"pos_embed": table.shape}
    params = arrays.to_params(found, shapes, _published_by_path(model_config), _to_parameter)
    pos_embed = params.pop("pos_embed")
    if not np.allclose(pos_embed, table, atol=1e-5):
        difference = np.abs(pos_embed - table).max()
        raise UserError(
            f"the checkpoint's pos_embed differs from the sin-cos table by {difference:.2g}; it "
            "was trained with another position embedding."
        )
    return params


def to_published(params, model_config) -> dict[str, np.ndarray]:
    """Returns the arrays under the published names, f32. The inverse of `to_params`."""
    check_block(model_config)
    published = {"pos_embed": position_table(model_config)}
    for path, array in flax.traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(array, np.float32)
        names = _published(path, array.shape, model_config)
        # The first axis of a stacked array is the blocks, each of which has a name of its own.
        for name, part in zip(names, array if path.startswith("blocks/") else [array], strict=True):
            published[name] = _to_published_layout(path, part, names[name])
    return published


def published_shapes(model_config) -> dict[str, arrays.Shape]:
    """Returns name -> shape of all arrays in a published checkpoint of the model."""
    check_block(model_config)
    by_path = _published_by_path(model_config)
    return {name: shape for part in by_path.values() for name, shape in part.items()}


def check_block(model_config) -> None:
    """Raises unless block and condition have published names, and the sizes are realistic.

    Raises: ValueError.
    """
    # Sizes may come from a stranger's file, and the table is computed before any array is compared.
    tokens = math.prod(_grid(model_config))
    if tokens * model_config.hidden_size > MOST_POSITIONS:
        raise UserError(
            f"model.input_size={model_config.input_size}, patch_size={model_config.patch_size} and "
            f"hidden_size={model_config.hidden_size} are {tokens:,} tokens, of more than "
            f"{MOST_POSITIONS:,} numbers: no DiT has as many."
        )
    if model_config.block != "adaLN-Zero":
        raise UserError(
            f"model.block={model_config.block!r} has no published names or weights; those of "
            "'adaLN-Zero' alone can be converted. Other commands read any workdir as it is."
        )
    if model_config.condition != "label":
        raise UserError(
            f"model.condition={model_config.condition!r} has no published names or weights; models "
            "with labels can be converted. Other commands read any workdir as it is."
        )


def read_sizes(found: Mapping[str, np.ndarray]) -> dict:
    """Returns the fields of `config.model` that published arrays determine.

    The number of heads is that of the paper's model with the same width and depth. 1000 rows of
    labels are ImageNet's classes alone. With any other number of rows, the last row is the null
    class.
    Raises: ValueError if the arrays are not a DiT's, or no paper's model has this width and depth.
    """
    names = {
        "patches": "x_embedder.proj.weight",  # [D, C, p, p]
        "positions": "pos_embed",  # [1, N, D]
        "labels": "y_embedder.embedding_table.weight",  # [classes, D]
        "mlp": "blocks.0.mlp.fc1.weight",  # [4D, D]
        "output": "final_layer.linear.weight",  # [p*p*C or twice that, D]
    }
    # Names and ranks are checked first: the sizes below are read from the shapes.
    ranks = {"patches": 4, "positions": 3}
    wrong = {
        name: np.shape(found[name]) if name in found else "missing"
        for part, name in names.items()
        if name not in found or np.ndim(found[name]) != ranks.get(part, 2)
    }
    if wrong:
        raise UserError(
            f"the checkpoint is not a published DiT's: {wrong}. A DiT of diffusers is given as the "
            "directory that it wrote."
        )
    shapes = {part: np.shape(found[name]) for part, name in names.items()}
    hidden_size, in_channels, patch_size, _ = shapes["patches"]
    blocks = {name.split(".")[1] for name in found if name.startswith("blocks.")}
    sizes = dict(
        input_size=patch_size * math.isqrt(shapes["positions"][1]),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=len(blocks),
        mlp_ratio=shapes["mlp"][0] / hidden_size,
        num_classes=NUM_CLASSES,
        learn_sigma=shapes["output"][0] == 2 * patch_size**2 * in_channels,
    )
    # The table has one row more if there is a null class.
    if shapes["labels"][0] == NUM_CLASSES:
        sizes["null_condition"] = False
    else:
        sizes["num_classes"] = shapes["labels"][0] - 1
    # No shape depends on the number of heads.
    known_heads = {size[:2]: size[2] for size in dit.SIZES.values()}
    if (hidden_size, len(blocks)) not in known_heads:
        raise UserError(
            f"the checkpoint has hidden_size={hidden_size} and depth={len(blocks)}, and does not "
            f"tell its num_heads, which is known of {', '.join(map(str, known_heads))} alone: give "
            "--config with all its sizes."
        )
    return sizes | {"num_heads": known_heads[hidden_size, len(blocks)]}


def position_table(model_config) -> np.ndarray:
    """Returns the published pos_embed [1, N, D] f32, equal to the bit."""
    return layers.sincos_position_table(model_config.hidden_size, *_grid(model_config))[None]


def _grid(model_config):
    """Returns (rows, columns) of patches."""
    height, width, _ = sizes.input_shape(model_config)
    return height // model_config.patch_size, width // model_config.patch_size


def _published_by_path(model_config):
    """Returns parameter path -> {published name: shape}, with pos_embed."""
    shapes = arrays.parameter_shapes(model_config)
    published = {path: _published(path, shape, model_config) for path, shape in shapes.items()}
    return published | {"pos_embed": {"pos_embed": position_table(model_config).shape}}


def _published(path, shape, model_config):
    """Returns {published name: shape} of one parameter, with one name per block if stacked."""
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


def _axes(path, rank):
    """Returns the published array's axes in the order of the parameter's."""
    if path == "x_embedder/kernel":
        return 2, 3, 1, 0  # [D, C, p, p] -> [p, p, C, D]
    return (1, 0) if path.endswith("kernel") else tuple(range(rank))


def _to_parameter(path, array):
    """Returns one published array with its axes in the parameter's order.

    `arrays.to_params` then reshapes it.
    """
    return array.transpose(_axes(path, array.ndim))


def _to_published_layout(path, array, shape):
    """Returns a parameter, or one block's slice of it, in its published shape."""
    axes = _axes(path, len(shape))
    array = array.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return np.ascontiguousarray(array)
