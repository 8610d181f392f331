"""The published DiT's parameters: its names, Linear weights [out, in], one entry per block."""

import math
from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from dit_jax.config import sizes
from dit_jax.convert import arrays
from dit_jax.errors import UserError
from dit_jax.models import dit, layers

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
NUM_CLASSES = 1000  # ImageNet's, of all published models
MOST_POSITIONS = 2**26  # numbers of a position table, computed in f64 to be compared: 512 MiB


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Our parameters from the published names; see `convert.load`.

    The published position table is a constant here: it must equal ours and is not returned.
    """
    check_block(model_config)
    table = position_table(model_config)
    shapes = arrays.parameter_shapes(model_config) | {"pos_embed": table.shape}
    params = arrays.to_params(found, shapes, _published_by_path(model_config), _to_ours)
    pos_embed = params.pop("pos_embed")
    if not np.allclose(pos_embed, table, atol=1e-5):
        difference = np.abs(pos_embed - table).max()
        raise UserError(
            f"the checkpoint's pos_embed differs from the sin-cos table by {difference:.2g}; it "
            "was trained with another position embedding."
        )
    return params


def to_published(params, model_config) -> dict[str, np.ndarray]:
    """The published names and arrays of our parameters, f32: `to_params` backwards."""
    check_block(model_config)
    found = {"pos_embed": position_table(model_config)}
    for path, array in flax.traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(array, np.float32)
        names = _published(path, array.shape, model_config)
        for name, part in zip(names, array if path.startswith("blocks/") else [array], strict=True):
            found[name] = _to_theirs(path, part, names[name])
    return found


def published_shapes(model_config) -> dict[str, arrays.Shape]:
    """Name -> shape of all that a published checkpoint of the model holds."""
    check_block(model_config)
    by_path = _published_by_path(model_config)
    return {name: shape for part in by_path.values() for name, shape in part.items()}


def check_block(model_config) -> None:
    """Demands the block and the condition that have published names, and sizes that models have.

    Raises: ValueError for others.
    """
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
            "told labels alone can be converted. Other commands read any workdir as it is."
        )


def read_sizes(found: Mapping[str, np.ndarray]) -> dict:
    """The fields of `config.model` that published arrays tell, the number of heads by the name.

    1000 labels are ImageNet's classes; any other number has the null class among them.

    Raises: ValueError for arrays that no DiT is made of, or sizes that bear no name.
    """
    names = {
        "patches": "x_embedder.proj.weight",  # [D, C, p, p]
        "positions": "pos_embed",  # [1, N, D]
        "labels": "y_embedder.embedding_table.weight",  # [classes, D]
        "mlp": "blocks.0.mlp.fc1.weight",  # [4D, D]
        "output": "final_layer.linear.weight",  # [p*p*C or twice that, D]
    }
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
    if shapes["labels"][0] == NUM_CLASSES:
        sizes["null_condition"] = False
    else:
        sizes["num_classes"] = shapes["labels"][0] - 1
    named = {size[:2]: size[2] for size in dit.SIZES.values()}
    if (hidden_size, len(blocks)) not in named:
        raise UserError(
            f"the checkpoint has hidden_size={hidden_size} and depth={len(blocks)}, and does not "
            f"tell its num_heads, which is known of {', '.join(map(str, named))} alone: give "
            "--config with all its sizes."
        )
    return sizes | {"num_heads": named[hidden_size, len(blocks)]}


def position_table(model_config) -> np.ndarray:
    """The published pos_embed [1, N, D] f32, to the bit."""
    return layers.sincos_position_table(model_config.hidden_size, *_grid(model_config))[None]


def _grid(model_config):
    """Patches down and across."""
    height, width, _ = sizes.input_shape(model_config)
    return height // model_config.patch_size, width // model_config.patch_size


def _published_by_path(model_config):
    """Our path -> {name: shape} of the published arrays behind it, pos_embed too."""
    shapes = arrays.parameter_shapes(model_config)
    published = {path: _published(path, shape, model_config) for path, shape in shapes.items()}
    return published | {"pos_embed": {"pos_embed": position_table(model_config).shape}}


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


def _axes(path, rank):
    """The published array's axes in our order."""
    if path == "x_embedder/kernel":
        return 2, 3, 1, 0  # [D, C, p, p] -> [p, p, C, D]
    return (1, 0) if path.endswith("kernel") else tuple(range(rank))


def _to_ours(path, array):
    """One published array, laid out as ours up to a reshape."""
    return array.transpose(_axes(path, array.ndim))


def _to_theirs(path, array, shape):
    """One of our arrays, or a block's part of it, in its published shape."""
    axes = _axes(path, len(shape))
    array = array.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return np.ascontiguousarray(array)
