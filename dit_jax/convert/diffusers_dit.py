"""Converter for diffusers' DiTTransformer2DModel: to the names of the published DiT.

diffusers' files are copies of the published weights, but its model differs in two constants. The
time frequencies are 10000^(-k/127) instead of 10000^(-k/128). Every block's second LayerNorm adds
norm_eps, by default 1e-5, to the variance instead of 1e-6. This project computes the published
model.
"""

import pathlib
import re
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import dit, fields, parameters
from dit_jax.errors import UserError

# Published module -> diffusers' modules, whose rows it concatenates; {} is the block's number.
DIFFUSERS_MODULES = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",),
    "y_embedder.embedding_table": (
        "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
    ),
    "blocks.{}.adaLN_modulation.1": ("transformer_blocks.{}.norm1.linear",),
    "blocks.{}.attn.qkv": tuple(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"),
    "blocks.{}.attn.proj": ("transformer_blocks.{}.attn1.to_out.0",),
    "blocks.{}.mlp.fc1": ("transformer_blocks.{}.ff.net.0.proj",),
    "blocks.{}.mlp.fc2": ("transformer_blocks.{}.ff.net.2",),
    "final_layer.adaLN_modulation.1": ("proj_out_1",),
    "final_layer.linear": ("proj_out_2",),
}
# Both are the same model: diffusers had one class for all transformers before DiT got its own.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# Values of the other fields that a config.json may leave out.
DEFAULTS = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=None,
    num_layers=28,
    sample_size=32,
    patch_size=2,
    num_embeds_ada_norm=1000,
)
# Field with a whole number above 0 -> its largest value.
COUNTS = dict(
    num_attention_heads=1024,
    attention_head_dim=1024,
    in_channels=1024,
    num_layers=fields.MAX_LAYERS,
    sample_size=4096,
    patch_size=1024,
    num_embeds_ada_norm=fields.MAX_SIZE,
)
# Field -> the values that this project's model supports; the first is the default. For norm_eps see
# the module's docstring.
CHOICES = dict(
    attention_bias=(True,),
    activation_fn=("gelu-approximate",),
    upcast_attention=(False,),
    norm_type=("ada_norm_zero",),
    norm_elementwise_affine=(False,),
    norm_eps=(1e-5, 1e-6),
)


def to_published(tensors: Mapping[str, np.ndarray], model_config) -> dict[str, np.ndarray]:
    """Returns published name -> array, pos_embed included, from diffusers' arrays.

    Every block of diffusers has a copy of the embedders of time and label. The copies must be
    equal.
    Raises: ValueError as `parameters.check`, with diffusers' names; ValueError with the names of
      copies that differ from the first block's.
    """
    shapes = parameters.list_published(dit.make_table(model_config))
    position_table = {"pos_embed": dit.make_position_table(model_config)}
    names = shapes.keys() - position_table.keys()
    copies = {name: _list_copies(name, model_config.depth) for name in names}
    # Checked under diffusers' names, so that a message shows the names in the file.
    expected = {}
    for name in names:
        rows, *other_axes = shapes[name]
        for parts in copies[name]:
            expected |= dict.fromkeys(parts, (rows // len(parts), *other_axes))
    parameters.check(tensors, expected)
    differing = [
        part
        for first_copy, *other_copies in copies.values()
        for parts in other_copies
        for first_part, part in zip(first_copy, parts, strict=True)
        if not np.array_equal(tensors[first_part], tensors[part])
    ]
    if differing:
        raise UserError(
            f"{len(differing)} of the blocks' embedders of time and label differ from the first "
            f"block's, such as {', '.join(sorted(differing)[:3])}: a published DiT has one for all "
            "blocks. This model cannot be converted."
        )
    return position_table | {
        name: np.concatenate([tensors[part] for part in copies[name][0]]) for name in names
    }


def _list_copies(name, depth):
    """Returns the copies of a published array in diffusers' model, each as the names of its parts.

    The published array is the concatenation of the parts. Only embedders have several copies.
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    module, _, leaf = re.sub(r"^blocks\.\d+", "blocks.{}", name).rpartition(".")
    parts = [f"{part}.{leaf}" for part in DIFFUSERS_MODULES[module]]
    if "{}" not in parts[0]:
        return [parts]
    numbers = [block[1]] if block else range(depth)
    return [[part.format(number) for part in parts] for number in numbers]


def read_sizes(directory: pathlib.Path) -> dict:
    """Returns the fields of `config.model` that diffusers' config.json determines.

    The model always has a null class. With num_embeds_ada_norm=1000 the label table has 1001 rows,
    and row 1000 is the null class, as in this project.
    Raises: FileNotFoundError; ValueError for a whole pipeline, or a model of another kind, with the
      unsupported fields; as `fields.read`.
    """
    fields.refuse_pipeline(directory, "dit", "transformer")
    path = directory / "config.json"
    config = fields.read(path, fields.CONFIG_DESCRIPTION.format("diffusers"))
    fields.check_class(path, config.get("_class_name"), CLASSES)
    config = fields.complete(config, DEFAULTS, CHOICES)
    fields.check_supported(path, "a DiT", config, _list_unsupported(config))
    return dict(
        input_size=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        depth=config["num_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=4.0,
        num_classes=config["num_embeds_ada_norm"],
        learn_sigma=config["out_channels"] == 2 * config["in_channels"],
    )


def _list_unsupported(config):
    """Returns {field: supported values, as a text} of the fields with an unsupported value."""
    unsupported = fields.list_unsupported(config, COUNTS, CHOICES)
    # Compared only if in_channels is a valid number.
    channels = config["in_channels"]
    if not unsupported and config["out_channels"] not in (None, channels, 2 * channels):
        unsupported["out_channels"] = "None, in_channels, or twice that"
    return unsupported
