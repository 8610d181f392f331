"""diffusers' DiTTransformer2DModel under the published names: its config, files and arrays.

Two constants of diffusers' model differ from the published one, of which its files are copies: the
frequencies of the time are 10000^(-k/127), not 10000^(-k/128), and every block's second LayerNorm
adds norm_eps, 1e-5 by default, to the variance, not 1e-6. Our model computes the published ones.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax.convert import arrays, dit, fields
from dit_jax.errors import UserError
from dit_jax.system import files

# The published module -> diffusers' modules, whose rows it joins; {} is the block's number.
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
# Of the same model; the older class is what DiT was before it had its own.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# What a config may leave out.
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
# Numbers above 0, and up to what.
COUNTS = dict(
    num_attention_heads=1024,
    attention_head_dim=1024,
    in_channels=1024,
    num_layers=fields.MOST_LAYERS,
    sample_size=4096,
    patch_size=1024,
    num_embeds_ada_norm=fields.MOST,
)
# What our model computes, and no other; of norm_eps see above.
FIXED = dict(
    attention_bias=(True,),
    activation_fn=("gelu-approximate",),
    upcast_attention=(False,),
    norm_type=("ada_norm_zero",),
    norm_elementwise_affine=(False,),
    norm_eps=(1e-5, 1e-6),
)


def read_sizes(directory: pathlib.Path) -> dict:
    """The fields of `config.model` that diffusers' config.json in the directory tells.

    The null class is always there: num_embeds_ada_norm=1000 labels are 1001 rows, the last of which
    is the null class's, index 1000 as here.

    Raises: FileNotFoundError; ValueError for a whole pipeline or a model of another kind, with what
      is not supported, or as `fields.read`.
    """
    if (directory / "model_index.json").is_file():
        raise UserError(
            f"{files.printable(directory)} is a whole pipeline: convert the DiT in "
            f"{files.printable(directory / 'transformer')}, and its VAE with `convert vae "
            f"{files.printable(directory / 'vae')}`."
        )
    path = directory / "config.json"
    theirs = fields.read(path, "the config.json that diffusers writes beside the weights")
    shown, kind = files.printable(path), theirs.get("_class_name")
    if kind not in CLASSES:
        raise UserError(
            f"{shown} describes diffusers' {fields.show(kind)}, but only a {CLASSES[0]} can be "
            "converted; docs/weights.md lists one."
        )
    theirs = DEFAULTS | theirs
    wrong = {n: theirs[n] for n, most in COUNTS.items() if not fields.is_count(theirs[n], most)}
    wrong |= {n: theirs[n] for n, values in FIXED.items() if theirs[n] not in values}
    channels = theirs["in_channels"]
    if not wrong and theirs["out_channels"] not in (None, channels, 2 * channels):
        wrong["out_channels"] = theirs["out_channels"]
    if wrong:
        raise UserError(f"{shown} describes a DiT of another kind: {fields.show(wrong)}.")
    return dict(
        input_size=theirs["sample_size"],
        patch_size=theirs["patch_size"],
        in_channels=channels,
        hidden_size=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        depth=theirs["num_layers"],
        num_heads=theirs["num_attention_heads"],
        mlp_ratio=4.0,
        num_classes=theirs["num_embeds_ada_norm"],
        learn_sigma=theirs["out_channels"] == 2 * channels,
    )


def to_published(found: Mapping[str, np.ndarray], model_config) -> dict[str, np.ndarray]:
    """The published names and arrays of diffusers' ones, pos_embed too.

    Raises: ValueError as `arrays.check`, under diffusers' names; if the blocks' copies of the
      embedders of time and label differ, with their names.
    """
    published = dit.published_shapes(model_config)
    table = {"pos_embed": dit.position_table(model_config)}
    sources = {name: _sources(name, model_config.depth) for name in published.keys() - table.keys()}
    expected = {}
    for name, copies in sources.items():
        rows, *rest = published[name]
        for parts in copies:
            expected |= dict.fromkeys(parts, (rows // len(parts), *rest))
    arrays.check(found, expected)
    differing = [
        part
        for first, *copies in sources.values()
        for parts in copies
        for one, part in zip(first, parts, strict=True)
        if not np.array_equal(found[one], found[part])
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
    """Diffusers' names of the parts of a published array, once or for each block's copy."""
    words = name.split(".")
    block = words[1] if words[0] == "blocks" else None
    module, _, leaf = name.replace(f"blocks.{block}.", "blocks.{}.", 1).rpartition(".")
    parts = [f"{part}.{leaf}" for part in MODULES[module]]
    if block is not None:
        return [[part.format(block) for part in parts]]
    copies = depth if "{}" in parts[0] else 1
    return [[part.format(i) for part in parts] for i in range(copies)]
