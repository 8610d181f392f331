"""Converter from diffusers' DiTTransformer2DModel to the published DiT's names.

diffusers' files are copies of the published weights, but its model differs in two constants. Its
time frequencies are 10000^(-k/127) instead of 10000^(-k/128). Every block's second LayerNorm adds
norm_eps, by default 1e-5, to the variance instead of 1e-6. This project computes the published
model.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import arrays, dit, fields
from dit_jax.errors import UserError
from dit_jax.system import files

# Published module -> diffusers' modules whose rows it concatenates; {} is the block's number.
MODULES = {
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
# Both are the same model: DiT had the older class before it got its own.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# Values of the fields that a config.json may leave out.
DEFAULTS = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=None,
    num_layers=28,
    attention_bias=True,
    sample_size=32,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    upcast_attention=False,
    norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
    norm_eps=1e-5,
)
# Field with a whole number above 0 -> its largest value.
COUNTS = dict(
    num_attention_heads=1024,
    attention_head_dim=1024,
    in_channels=1024,
    num_layers=fields.MOST_LAYERS,
    sample_size=4096,
    patch_size=1024,
    num_embeds_ada_norm=fields.MOST,
)
# Field -> the values that this project's model supports. For norm_eps see the module's docstring.
FIXED = dict(
    attention_bias=(True,),
    activation_fn=("gelu-approximate",),
    upcast_attention=(False,),
    norm_type=("ada_norm_zero",),
    norm_elementwise_affine=(False,),
    norm_eps=(1e-5, 1e-6),
)


def read_sizes(directory: pathlib.Path) -> dict:
    """Returns the fields of `config.model` that diffusers' config.json in the directory determines.

    There always is a null class. With num_embeds_ada_norm=1000 the label table has 1001 rows, and
    row 1000 is the null class, as in this project.
    Raises: FileNotFoundError; ValueError for a whole pipeline, or a model of another kind, with the
      unsupported fields; as `fields.read`.
    """
    if (directory / "model_index.json").is_file():
        raise UserError(
            f"{files.printable(directory)} is a whole pipeline: convert the DiT in "
            f"{files.printable(directory / 'transformer')}, and its VAE with `convert vae "
            f"{files.printable(directory / 'vae')}`."
        )
    path = directory / "config.json"
    config = fields.read(path, "the config.json that diffusers writes beside the weights")
    shown, kind = files.printable(path), config.get("_class_name")
    if kind not in CLASSES:
        raise UserError(
            f"{shown} describes diffusers' {fields.show(kind)}, but only a {CLASSES[0]} can be "
            "converted; docs/weights.md lists one."
        )
    config = DEFAULTS | config
    wrong = {n: config[n] for n, most in COUNTS.items() if not fields.is_count(config[n], most)}
    wrong |= {n: config[n] for n, values in FIXED.items() if config[n] not in values}
    # out_channels is the only field whose allowed values depend on another field.
    channels = config["in_channels"]
    if not wrong and config["out_channels"] not in (None, channels, 2 * channels):
        wrong["out_channels"] = config["out_channels"]
    if wrong:
        raise UserError(f"{shown} describes a DiT of another kind: {fields.show(wrong)}.")
    return dict(
        input_size=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=channels,
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        depth=config["num_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=4.0,
        num_classes=config["num_embeds_ada_norm"],
        learn_sigma=config["out_channels"] == 2 * channels,
    )


def to_published(found: Mapping[str, np.ndarray], model_config) -> dict[str, np.ndarray]:
    """Returns the arrays under the published names, pos_embed included, from diffusers' names.

    Every block of diffusers has a copy of the embedders of time and label. The copies must be
    equal.
    Raises: ValueError as `arrays.check`, with diffusers' names; ValueError with the names of copies
      that differ from the first block's.
    """
    published = dit.published_shapes(model_config)
    table = {"pos_embed": dit.position_table(model_config)}
    sources = {name: _sources(name, model_config.depth) for name in published.keys() - table.keys()}
    # Checked under diffusers' names, so that a message shows the names of the file.
    expected = {}
    for name, copies in sources.items():
        rows, *rest = published[name]
        for parts in copies:
            expected |= dict.fromkeys(parts, (rows // len(parts), *rest))
    arrays.check(found, expected)
    # The published DiT has one embedder for all blocks: different copies cannot be joined.
    differing = [
        part
        for first, *copies in sources.values()
        for parts in copies
        for original, part in zip(first, parts, strict=True)
        if not np.array_equal(found[original], found[part])
    ]
    if differing:
        raise UserError(
            f"{len(differing)} of the blocks' embedders of time and label differ from the first "
            f"block's, such as {', '.join(sorted(differing)[:3])}: a DiT has one for all blocks."
        )
    return table | {
        name: np.concatenate([found[part] for part in first])
        for name, (first, *_) in sources.items()
    }


def _sources(name, depth):
    """Returns diffusers' names of the parts of a published array.

    A list holds the parts that are concatenated. There is one list, or one for each block's copy.
    """
    words = name.split(".")
    block = words[1] if words[0] == "blocks" else None
    module, _, leaf = name.replace(f"blocks.{block}.", "blocks.{}.", 1).rpartition(".")
    parts = [f"{part}.{leaf}" for part in MODULES[module]]
    if block is not None:
        return [[part.format(block) for part in parts]]
    copies = depth if "{}" in parts[0] else 1
    return [[part.format(i) for part in parts] for i in range(copies)]
