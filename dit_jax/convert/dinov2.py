"""Converter for DINOv2: the official names, and transformers' names of the same arrays."""

import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import fields, parameters, weights
from dit_jax.errors import UserError
from dit_jax.models import dinov2

HEAD_SIZE = 64  # of all published sizes
# Official module or array -> transformers' whose rows it concatenates; {} is the block's number.
TRANSFORMERS = {
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
# Field of transformers' config.json -> the only value that this project's model supports.
CHOICES = dict(
    model_type=("dinov2",),
    hidden_act=("gelu",),
    layer_norm_eps=(1e-6,),
    mlp_ratio=(4,),
    patch_size=(dinov2.PATCH_SIZE,),
    use_swiglu_ffn=(False,),
)


def read(source: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns official name -> array, from an official file or transformers' directory.

    Raises: FileNotFoundError; ValueError if transformers' model is of another kind; as
      `weights.read` and `fields.read`.
    """
    if not source.is_dir():
        return weights.read(source, "dinov2")
    path = source / "config.json"
    config = fields.read(path, fields.CONFIG_DESCRIPTION.format("transformers"))
    wrong = fields.list_unsupported(config, dict(num_attention_heads=fields.MAX_SIZE), CHOICES)
    width = 0 if wrong else config["num_attention_heads"] * HEAD_SIZE
    if not wrong and config.get("hidden_size") != width:
        wrong["hidden_size"] = f"num_attention_heads * {HEAD_SIZE}, {width}"
    fields.check_supported(path, "a DINOv2", config, wrong)
    return to_official(weights.read(source, "dinov2"))


def to_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns transformers' arrays under the official names, with query, key and value joined.

    Arrays without an official name keep their own. `to_params` then reports them as unexpected.
    """
    tensors, official = dict(tensors), {}
    numbers = {m[1] for name in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", name))}
    for official_name, parts in TRANSFORMERS.items():
        for number in sorted(numbers, key=int) if "{}" in official_name else [""]:
            # The table has both modules, which have weights and biases, and single arrays.
            for leaf in ("", ".weight", ".bias"):
                names = [f"{name.format(number)}{leaf}" for name in parts]
                if all(name in tensors for name in names):
                    joined = np.concatenate([tensors.pop(name) for name in names])
                    official[f"{official_name.format(number)}{leaf}"] = joined
    return official | tensors


def read_sizes(tensors: Mapping[str, np.ndarray]) -> dict:
    """Returns `config.model` with the sizes that the official arrays show.

    Raises: ValueError if the arrays are not DINOv2's, or belong to a model with another patch size,
      with registers, or with ViT-g's gated MLP.
    """
    shape = np.shape(tensors.get("patch_embed.proj.weight"))
    if len(shape) != 4 or not any(name.startswith("blocks.") for name in tensors):
        raise UserError(
            "the checkpoint is not DINOv2's: patch_embed.proj.weight has shape "
            f"{shape or 'none'}, not [D, 3, 14, 14], among {len(tensors)} arrays, or there is no "
            "blocks.0. transformers' model is given as the directory that it wrote."
        )
    p, (hidden_size, *_, height, width) = dinov2.PATCH_SIZE, shape
    registers = np.shape(tensors.get("register_tokens"))
    problems = {
        f"patches of {height}x{width} pixels, DINOv2 of {p}x{p}": (height, width) != (p, p),
        f"register_tokens {registers}, but this model has none": registers,
        "a gated MLP, as ViT-g's": "blocks.0.mlp.w12.weight" in tensors,
        f"{hidden_size=}, not a multiple of the head size {HEAD_SIZE}": hidden_size % HEAD_SIZE,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UserError(
                f"the checkpoint has {problem}: take a ViT-S, -B or -L without registers, such as "
                "dinov2_vitl14_pretrain.pth."
            )
    return dict(
        name="dinov2",
        hidden_size=hidden_size,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=hidden_size // HEAD_SIZE,
        dtype="float32",
    )


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the official names; see `convert.load`.

    The position embedding is interpolated to the model's grid. The mask token is left out, since
    only training needs it.
    """
    tensors = {name: array for name, array in tensors.items() if name != "mask_token"}
    if "pos_embed" in tensors:
        tensors["pos_embed"] = interpolate_positions(tensors["pos_embed"], dinov2.GRID_SIZE)
    table = parameters.make_table(model_config, _official_name, _official_shape)
    return parameters.to_params(tensors, table)


def _official_name(path):
    """Returns the official name of a parameter; {} is the block's number."""
    path = path.replace("patch_embed/", "patch_embed/proj/").replace("blocks/", "blocks/{}/")
    return parameters.to_torch_name(path)


def _official_shape(path, shape):
    """Returns the official shape of a parameter."""
    if path == "patch_embed/kernel":
        return shape[1], 3, dinov2.PATCH_SIZE, dinov2.PATCH_SIZE
    return parameters.to_linear_shape(path, shape)


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
