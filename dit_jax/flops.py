"""Parameters, tokens and FLOPs of a model, counted on its traced forward pass.

  python -m dit_jax.flops [DiT-XL/2 --image_size 256 --block adaLN-Zero | --config FILE] [--json]
  python -m dit_jax.flops sd15-unet adm-imagenet256

Model names are those of the DiT paper and the keys of models.unet_presets.PRESETS. The paper's
"Gflops" are multiply-adds of one forward pass. Here they are named `gmacs`, and gflops = 2 gmacs.
"""

import json
import pathlib

from absl import flags

from dit_jax import cli, models
from dit_jax.config import parsers
from dit_jax.errors import UserError
from dit_jax.models import blocks, counts

FLAGS = flags.FLAGS


def main(names):
    if FLAGS.config is not None and names:
        raise UserError(f"give a model name or --config, not both: {' '.join(names)}.")
    # A config has keys in place of the flags that describe a named model.
    for flag, key in (("block", "block"), ("image_size", "input_size")):
        if FLAGS.config is not None and FLAGS[flag].present:
            raise UserError(
                f"--{flag} is for a model name. With --config, set --config.model.{key}."
            )
    if FLAGS.config is not None:
        # The row is named after the config's file and argument.
        path, colon, argument = FLAGS["config"].spec.partition(":")
        rows = {pathlib.Path(path).name + colon + argument: models.count(FLAGS.config)}
    else:
        rows = counts.count_names(names, FLAGS.image_size, FLAGS.block)
    if FLAGS.json:
        print(json.dumps(rows if len(rows) > 1 else next(iter(rows.values()))))
        return
    # Models have different counts, so the table has the columns of all rows, in order.
    columns = list({column: None for row in rows.values() for column in row})
    lines = [["model", *columns]]
    for name, row in rows.items():
        lines.append([name, *(_format_count(row.get(column)) for column in columns)])
    widths = [max(11, *map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _format_count(value):
    """Returns a count as text; '-' if a model does not have it."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    cli.define_config(required=False)
    image_size_help = "DiT: pixels, 256 by default, or HxW; latents are 8 times smaller."
    flags.DEFINE(parsers.SizeParser(), "image_size", None, image_size_help)
    flags.DEFINE_enum("block", None, list(blocks.BLOCKS), "DiT: the block; adaLN-Zero by default.")
    flags.DEFINE_bool("json", False, "Print JSON: the counts, or {model: counts} for several.")
    cli.run(main, "MODEL ...")
