"""Parameters, tokens and FLOPs of any model config, by formula.

  python -m dit_jax.flops [DiT-XL/2 --image_size 256 --block adaLN-Zero | --config FILE] [--json]
  python -m dit_jax.flops sd15-unet adm-imagenet256

The names are those of the DiT paper and of models.unet.PRESETS. The paper's "Gflops" are
multiply-adds of one forward pass: `gmacs` here, gflops = 2 gmacs.
"""

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from dit_jax import cli, counts, models
from dit_jax.config import ranges
from dit_jax.models import blocks, dit, unet

FLAGS = flags.FLAGS
VAE_FACTOR = 8  # pixels per latent of the published models


def count(config) -> dict[str, int | float]:
    """Counts of a config's model, for one image, as `counts` has them."""
    if config.model.name == "vae":
        return counts.of_vae(config.model, config.data.image_size)
    if config.model.name == "inception":
        return counts.of_inception(config.model)
    if config.model.name == "unet":
        return counts.of_unet(config.model)
    return counts.of_dit(config.model)


def published_config(
    name: str, image_size: int | None = None, block: str | None = None
) -> ConfigDict:
    """`config.model` of a DiT of the paper or a preset UNet, as far as its counts depend on it.

    Args: of a DiT alone: image_size, 256 if None.   block: adaLN-Zero if None.
    Raises: ValueError for an unknown name, an image size that its patches do not divide, or an
      image size or block for a UNet.
    """
    if name in unet.PRESETS:
        if image_size is not None or block is not None:
            raise ValueError(
                f"{name} is a UNet, of the one size that its name says: image_size={image_size}, "
                f"block={block} are of a DiT. For another UNet give --config."
            )
        return ConfigDict(dict(name="unet", **unet.named(name)))
    if not name.startswith("DiT-"):
        raise ValueError(
            f"unknown model {name!r}; the names are DiT-{{{','.join(dit.SIZES)}}}/PATCH, "
            f"{', '.join(unet.PRESETS)}."
        )
    image_size = 256 if image_size is None else image_size
    fields = dit.named(name)
    unit = VAE_FACTOR * fields["patch_size"]
    if image_size <= 0 or image_size % unit:
        raise ValueError(
            f"{image_size=} must be a multiple of {unit}: the VAE's 8 x the patch size."
        )
    return ConfigDict(
        dict(
            name="dit",
            input_size=image_size // VAE_FACTOR,
            in_channels=4,
            mlp_ratio=4.0,
            block=block or "adaLN-Zero",
            condition="label",
            num_classes=1000,
            class_dropout_prob=0.1,
            learn_sigma=True,
            **fields,
        )
    )


def count_names(
    names: list[str], image_size: int | None = None, block: str | None = None
) -> dict[str, dict[str, int | float]]:
    """Counts by name, as `published_config`; no names are all of the paper and of the presets.

    With an image size or a block no names are all of the paper alone.
    """
    of_dits = image_size is not None or block is not None
    all_names = [f"DiT-{size}/{patch}" for size in dit.SIZES for patch in (8, 4, 2)]
    all_names += [] if of_dits else list(unet.PRESETS)
    configs = {name: published_config(name, image_size, block) for name in names or all_names}
    return {name: count(ConfigDict(dict(model=model))) for name, model in configs.items()}


def main(names):
    if FLAGS.config is not None and names:
        raise ValueError(f"give a model name or --config, not both: {' '.join(names)}.")
    for flag, key in (("block", "block"), ("image_size", "input_size")):
        if FLAGS.config is not None and FLAGS[flag].present:
            raise ValueError(
                f"--{flag} is of a model name; of a --config set --config.model.{key}."
            )
    if FLAGS.config is not None:
        path, _, argument = FLAGS["config"].spec.partition(":")
        name = pathlib.Path(path).name + (argument and f":{argument}")
        _check_model(FLAGS.config.model)
        rows = {name: count(FLAGS.config)}
    else:
        rows = count_names(names, FLAGS.image_size, FLAGS.block)
    if FLAGS.json:
        print(json.dumps(rows if len(rows) > 1 else next(iter(rows.values()))))
        return
    columns = {name: None for row in rows.values() for name in row}  # in order; not all have all
    width = max(11, *map(len, rows))
    print(
        "  ".join([f"{'model':>{width}}", *(f"{name:>{max(len(name), 11)}}" for name in columns)])
    )
    for name, row in rows.items():
        cells = {column: _cell(row.get(column)) for column in columns}
        padded = [f"{cell:>{max(len(column), 11)}}" for column, cell in cells.items()]
        print("  ".join([f"{name:>{width}}", *padded]))


def _check_model(config):
    """Demands sizes that fit together; errors as `models.build`."""
    config = config.copy_and_resolve_references()
    if "attention" in config:
        config.attention = "xla"  # counts are the same, and need no GPU
    models.build(config)


def _cell(value):
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    cli.define_config(required=False)
    text = "Of DiTs: pixels, 256; latents are 8 times smaller."
    flags.DEFINE_integer("image_size", None, text, 1, ranges.MOST_IMAGE_SIZE)
    flags.DEFINE_enum("block", None, list(blocks.BLOCKS), "Of DiTs: adaLN-Zero, in-context, ...")
    flags.DEFINE_bool("json", False, "Print JSON: the counts, or {model: counts} for several.")
    cli.run(main, "MODEL ...")
