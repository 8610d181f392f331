"""Converter for DINOv2, whose arrays have the names of the official code or of transformers."""

import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import fields, parameters, weights
from dit_jax.errors import UserError
from dit_jax.models import dinov2

HEAD_SIZE = 64  # of all published sizes
# Published module or array -> transformers' ones, whose rows it concatenates; {} is the block's
# number.
TRANSFORMERS_MODULES = {
    "cls_token": ("embeddings.cls_token",),
    "mask_token": ("embeddings.mask_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "blocks.{}.norm1": ("encoder.layer.{}.norm1",),
    "blocks.{}.attn.qkv": tuple(
        f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")
    ),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.output.dense",),
    "blocks.{}.ls1.gamma": ("encoder.layer.{}.layer_scale1.lambda1",),
    "blocks.{}.norm2": ("encoder.layer.{}.norm2",),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.fc1",),
    "blocks.{}.mlp.fc2": ("encoder.layer.{}.mlp.fc2",),
    "blocks.{}.ls2.gamma": ("encoder.layer.{}.layer_scale2.lambda1",),
    "norm": ("layernorm",),
}
# Field with a whole number above 0 -> its largest value.
COUNTS = dict(num_attention_heads=fields.MAX_SIZE)
# Field -> the only value that this project's model supports.
CHOICES = dict(
    model_type=("dinov2",),
    hidden_act=("gelu",),
    layer_norm_eps=(1e-6,),
    mlp_ratio=(4,),
    patch_size=(dinov2.PATCH_SIZE,),
    use_swiglu_ffn=(False,),
)


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The position embedding is interpolated to the model's grid. The mask token is left out, since
    only training needs it.
    """
    tensors = {name: array for name, array in tensors.items() if name != "mask_token"}
    if "pos_embed" in tensors:
        tensors["pos_embed"] = interpolate_positions(tensors["pos_embed"], dinov2.GRID_SIZE)
    return parameters.to_params(tensors, make_table(model_config))


def interpolate_positions(pos_embed: np.ndarray, grid: int) -> np.ndarray:
    """Returns a position embedding [1, 1 + M^2, D] resized to [1, 1 + grid^2, D] f32.

    The official model does the same for images smaller than its training images. The interpolation
    is bicubic (a = -3/4), repeats the border and has no antialiasing. Its coordinates are for a
    grid with 0.1 patches more, as the published features require. An embedding that has this size
    already, or whose patches form no square, is returned unchanged.
    """
    side = math.isqrt(max(np.shape(pos_embed)[1] - 1, 0)) if np.ndim(pos_embed) == 3 else 0
    if side in (0, grid) or np.shape(pos_embed)[:2] != (1, 1 + side**2):
        return pos_embed
    patches = np.asarray(pos_embed[0, 1:], np.float64).reshape(side, side, -1)
    # Positions are f32 as in the official code: in f64 the weights differ by 1e-6.
    step = np.float32(side / (grid + 0.1))
    position = step * (np.arange(grid, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    index = np.floor(position).astype(int)[:, None] + np.arange(-1, 3)[None]  # [grid, 4]
    weight = dinov2.cubic(position[:, None] - index, -0.75)
    matrix = np.zeros((grid, side))
    rows = np.broadcast_to(np.arange(grid)[:, None], index.shape)
    # add.at, since at the border several taps fall on the same patch.
    np.add.at(matrix, (rows, np.clip(index, 0, side - 1)), weight)
    patches = np.einsum("oi,pj,ijd->opd", matrix, matrix, patches, optimize=True)
    patches = patches.reshape(1, grid**2, -1).astype(np.float32)
    return np.concatenate([pos_embed[:, :1], patches], axis=1)


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays."""
    return parameters.make_table(model_config, _published_name, _published_shape)


def _published_name(path):
    """Returns the published name of a parameter; {} is the block's number."""
    path = path.replace("patch_embed/", "patch_embed/proj/").replace("blocks/", "blocks/{}/")
    return parameters.to_torch_name(path)


def _published_shape(path, shape):
    """Returns the published shape of a parameter."""
    if path == "patch_embed/kernel":
        return shape[1], 3, dinov2.PATCH_SIZE, dinov2.PATCH_SIZE
    return parameters.to_linear_shape(path, shape)


def infer_model_config(tensors: Mapping[str, np.ndarray]) -> ConfigDict:
    """Returns `config.model` with the sizes of the published arrays.

    Raises: ValueError if the arrays are not DINOv2's, or belong to a model with another patch size,
      with registers, or with ViT-g's gated MLP.
    """
    shape = np.shape(tensors.get("patch_embed.proj.weight"))
    if len(shape) != 4 or not any(name.startswith("blocks.") for name in tensors):
        raise UserError(
            f"the checkpoint is no DINOv2: among its {len(tensors)} arrays, the shape of "
            f"patch_embed.proj.weight is {shape or 'none'}, not [D, 3, 14, 14], or no name begins "
            "with blocks. To convert transformers' model, give the directory that it wrote."
        )
    hidden_size, _, height, width = shape
    size, registers = dinov2.PATCH_SIZE, np.shape(tensors.get("register_tokens"))
    problem = None
    if (height, width) != (size, size):
        problem = f"patches of {height}x{width} pixels instead of {size}x{size}"
    elif registers:
        problem = f"register_tokens {registers}, but this model has none"
    elif "blocks.0.mlp.w12.weight" in tensors:
        problem = "a gated MLP, as ViT-g's"
    elif hidden_size % HEAD_SIZE:
        problem = f"{hidden_size=}, not a multiple of the head size {HEAD_SIZE}"
    if problem:
        raise UserError(
            f"the checkpoint has {problem}. Choose a ViT-S, -B or -L without registers, such as "
            "dinov2_vitl14_pretrain.pth."
        )
    model_config = dict(
        name="dinov2",
        hidden_size=hidden_size,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=hidden_size // HEAD_SIZE,
        dtype="float32",
    )
    return ConfigDict(model_config)


def read(source: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns published name -> array, from the official file or transformers' directory.

    Raises: FileNotFoundError; ValueError if transformers' model is of another kind; as
      `weights.read` and `fields.read`.
    """
    if not source.is_dir():
        return weights.read(source, "dinov2")
    path = source / "config.json"
    config = fields.read(path, fields.CONFIG_DESCRIPTION.format("transformers"))
    fields.check_supported(path, "a DINOv2", config, _list_unsupported(config))
    return to_published(weights.read(source, "dinov2"))


def _list_unsupported(config):
    """Returns {field: supported values, as a text} of the fields with an unsupported value."""
    unsupported = fields.list_unsupported(config, COUNTS, CHOICES)
    if not unsupported:
        width = config["num_attention_heads"] * HEAD_SIZE
        if config.get("hidden_size") != width:
            unsupported["hidden_size"] = f"num_attention_heads * {HEAD_SIZE}, {width}"
    return unsupported


def to_published(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns published name -> array from transformers' arrays; joins query, key and value.

    Arrays without a published name keep their own. `to_params` then reports them as unexpected.
    """
    others, published = dict(tensors), {}
    matches = (re.match(r"encoder\.layer\.(\d+)\.", name) for name in tensors)
    numbers = sorted({match[1] for match in matches if match}, key=int)
    for published_name, parts in TRANSFORMERS_MODULES.items():
        for number in numbers if "{}" in published_name else [""]:
            # The table has both modules, which have weights and biases, and single arrays.
            for suffix in ("", ".weight", ".bias"):
                names = [f"{part.format(number)}{suffix}" for part in parts]
                if all(name in others for name in names):
                    joined = np.concatenate([others.pop(name) for name in names])
                    published[f"{published_name.format(number)}{suffix}"] = joined
    return published | others
