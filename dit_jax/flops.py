"""Parameters, tokens and FLOPs of any model config, by formula.

  python -m dit_jax.flops [DiT-XL/2 --image_size 256 | --config FILE] [--json]

The DiT paper's "Gflops" are multiply-adds of one forward pass: `gmacs` here, gflops = 2 gmacs.
"""

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict, config_flags

from dit_jax import cli
from dit_jax.models import dit

FLAGS = flags.FLAGS
VAE_FACTOR = 8  # pixels per latent of the published models


def count(config) -> dict[str, int | float]:
    """Counts of `config.model`, for one image.

    Returns: params (trained), params_with_pos_embed (the published count), tokens; gmacs of one
      forward pass: matrix products only; gflops; train_gflops_per_image = 3 gflops.
    """
    d, depth, classes = config.hidden_size, config.depth, config.num_classes
    mlp = int(d * config.mlp_ratio)
    patch = config.patch_size**2 * config.in_channels
    out = patch * (2 if config.learn_sigma else 1)
    tokens = (config.input_size // config.patch_size) ** 2

    # Each Linear as (in, out, times it is applied to an image).
    block = [(d, 3 * d, tokens), (d, d, tokens), (d, mlp, tokens), (mlp, d, tokens), (d, 6 * d, 1)]
    outside = [(patch, d, tokens), (256, d, 1), (d, d, 1), (d, 2 * d, 1), (d, out, tokens)]
    linears = outside + depth * block
    attention = depth * 2 * tokens**2 * d  # q k^T and its product with v

    params = sum((i + 1) * o for i, o, _ in linears)
    params += (classes + (config.class_dropout_prob > 0)) * d
    gmacs = (sum(i * o * n for i, o, n in linears) + attention) / 1e9
    return {
        "params": params,
        "params_with_pos_embed": params + tokens * d,
        "tokens": tokens,
        "gmacs": gmacs,
        "gflops": 2 * gmacs,
        "train_gflops_per_image": 6 * gmacs,
    }


def published_config(name: str, image_size: int = 256) -> ConfigDict:
    """`config.model` of a model of the paper, as far as its counts depend on it.

    Raises: ValueError for an unknown name, or an image size that its patches do not divide.
    """
    fields = dit.named(name)
    unit = VAE_FACTOR * fields["patch_size"]
    if image_size <= 0 or image_size % unit:
        raise ValueError(
            f"{image_size=} must be a multiple of {unit}: the VAE's 8 x the patch size."
        )
    return ConfigDict(
        dict(
            input_size=image_size // VAE_FACTOR,
            in_channels=4,
            mlp_ratio=4.0,
            num_classes=1000,
            class_dropout_prob=0.1,
            learn_sigma=True,
            **fields,
        )
    )


def main(argv):
    if FLAGS.config is not None and len(argv) > 1:
        raise ValueError(f"give a model name or --config, not both: {' '.join(argv[1:])}.")
    if FLAGS.config is not None:
        name = pathlib.Path(config_flags.get_config_filename(FLAGS["config"])).name
        rows = {name: count(FLAGS.config.model)}
    else:
        table = [f"DiT-{size}/{patch}" for size in dit.SIZES for patch in (8, 4, 2)]
        names = argv[1:] or table
        rows = {name: count(published_config(name, FLAGS.image_size)) for name in names}
    if FLAGS.json:
        print(json.dumps(rows if len(rows) > 1 else next(iter(rows.values()))))
        return
    header = ("model", *next(iter(rows.values())))
    print("  ".join(f"{name:>{max(len(name), 11)}}" for name in header))
    for name, row in rows.items():
        cells = [f"{v:,}" if isinstance(v, int) else f"{v:,.4g}" for v in row.values()]
        cells = [f"{c:>{max(len(h), 11)}}" for c, h in zip([name, *cells], header, strict=True)]
        print("  ".join(cells))


if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_integer("image_size", 256, "Pixels; the models see latents 8 times smaller.")
    flags.DEFINE_bool("json", False, "Print JSON: the counts, or {model: counts} for several.")
    cli.run(main)
