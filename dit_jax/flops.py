"""Parameters, tokens and FLOPs of any model config, counted on its traced forward pass.

  python -m dit_jax.flops [DiT-XL/2 --image_size 256 --block adaLN-Zero | --config FILE] [--json]
  python -m dit_jax.flops sd15-unet adm-imagenet256

Model names are the DiT paper's and the keys of models.unet_presets.PRESETS. The paper's "Gflops"
are multiply-adds of one forward pass. Here these are `gmacs`, and gflops = 2 gmacs.
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
    # Some flags describe a model by name; a config has keys for the same.
    for flag, key in (("block", "block"), ("image_size", "input_size")):
        if FLAGS.config is not None and FLAGS[flag].present:
            raise UserError(f"--{flag} is of a model name; of a --config set --config.model.{key}.")
    if FLAGS.config is not None:
        # The row of a config is named by its file and argument.
        path, _, argument = FLAGS["config"].spec.partition(":")
        name = pathlib.Path(path).name + (argument and f":{argument}")
        rows = {name: models.count(FLAGS.config)}
    else:
        rows = counts.count_names(names, FLAGS.image_size, FLAGS.block)
    if FLAGS.json:
        print(json.dumps(rows if len(rows) > 1 else next(iter(rows.values()))))
        return
    # Models have different counts, so the columns are the union, in order.
    columns = {name: None for row in rows.values() for name in row}
    width = max(11, *map(len, rows))
    print(
        "  ".join([f"{'model':>{width}}", *(f"{name:>{max(len(name), 11)}}" for name in columns)])
    )
    for name, row in rows.items():
        cells = {column: _cell(row.get(column)) for column in columns}
        padded = [f"{cell:>{max(len(column), 11)}}" for column, cell in cells.items()]
        print("  ".join([f"{name:>{width}}", *padded]))


def _cell(value):
    """Returns a count as text; '-' if a model does not have it."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    cli.define_config(required=False)
    text = "Of DiTs: pixels, 256, or HxW; latents are 8 times smaller."
    flags.DEFINE(parsers.SizeParser(), "image_size", None, text)
    flags.DEFINE_enum("block", None, list(blocks.BLOCKS), "Of DiTs: adaLN-Zero, in-context, ...")
    flags.DEFINE_bool("json", False, "Print JSON: the counts, or {model: counts} for several.")
    cli.run(main, "MODEL ...")
