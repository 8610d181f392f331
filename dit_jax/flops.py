"""Parameters, tokens and FLOPs of any model config, by formula.

  python -m dit_jax.flops [DiT-XL/2 --image_size 256 --block adaLN-Zero | --config FILE] [--json]

The DiT paper's "Gflops" are multiply-adds of one forward pass: `gmacs` here, gflops = 2 gmacs.
"""

import json
import math
import pathlib

import flax.traverse_util
import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dit_jax import cli, models, text
from dit_jax.models import blocks, conditioning, dit

FLAGS = flags.FLAGS
VAE_FACTOR = 8  # pixels per latent of the published models
CLIP_LENGTH = 77  # tokens that it makes of any caption


def count(config) -> dict[str, int | float]:
    """Counts of a config's model, for one image: those of the functions below."""
    if config.model.name == "vae":
        return count_vae(config.model, config.data.image_size)
    if config.model.name == "inception":
        return count_inception(config.model)
    return count_dit(config.model)


def count_dit(config) -> dict[str, int | float]:
    """Counts of `config.model` of a DiT, for one image.

    Of captions all text_length tokens count, and the work of the encoder that is trained along; of
    a frozen one CLIP's 77, without its work.
    Returns: params (trained), params_with_pos_embed (the published count), tokens; gmacs of one
      forward pass: matrix products only; gflops; train_gflops_per_image = 3 gflops.
    Raises: ValueError for an unknown block or condition.
    """
    d, depth, classes = config.hidden_size, config.depth, config.num_classes
    mlp = int(d * config.mlp_ratio)
    patch = config.patch_size**2 * config.in_channels
    out = patch * (2 if config.learn_sigma else 1)
    tokens = (config.input_size // config.patch_size) ** 2

    blocks.check(config.block)
    # Of a block: vectors of c that modulate it, and LayerNorms with a scale and a bias.
    modulations, norms = {
        "in-context": (0, 2),
        "cross-attention": (0, 3),
        "adaLN": (4, 0),
        "adaLN-Zero": (6, 0),
    }[config.block]
    conditioning.check(config)
    words = {"label": 1, "tokens": config.text_length, "context": CLIP_LENGTH}[config.condition]
    context = 1 + words  # tokens, of t and of the label or caption
    stream = tokens + context if config.block == "in-context" else tokens
    if modulations and config.condition != "label":
        stream += words

    # Each Linear as (in, out, times it is applied to an image).
    block = [(d, 3 * d, stream), (d, d, stream), (d, mlp, stream), (mlp, d, stream)]
    block += [(d, modulations * d, 1)]
    attention = 2 * stream**2 * d  # q k^T and its product with v
    if config.block == "cross-attention":
        block += [(d, d, tokens), (d, 2 * d, context), (d, d, tokens)]
        attention += 2 * tokens * context * d
    outside = [(patch, d, tokens), (256, d, 1), (d, d, 1), (d, out, tokens)]
    outside += [(d, 2 * d if modulations else 0, 1)]
    text_params = text_macs = 0
    if config.condition == "label":
        text_params = (classes + (config.class_dropout_prob > 0)) * d
    else:
        width = config.context_size
        outside.append((width, d, words))
        outside += [(width, d, 1)] * (modulations > 0)  # its mean
        if config.condition == "tokens":
            text_params, text_macs = _text_encoder(config)
    linears = outside + depth * block

    params = sum((i + 1) * o for i, o, _ in linears) + text_params
    params += 2 * d * (depth * norms + (norms > 0))
    gmacs = (sum(i * o * n for i, o, n in linears) + depth * attention + text_macs) / 1e9
    return {
        "params": params,
        "params_with_pos_embed": params + tokens * d,
        "tokens": tokens,
        "gmacs": gmacs,
        "gflops": 2 * gmacs,
        "train_gflops_per_image": 6 * gmacs,
    }


def _text_encoder(config):
    """(parameters, multiply-adds of a caption) of the encoder that is trained along."""
    d, length, depth = config.context_size, config.text_length, config.text_depth
    linears = depth * [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    params = sum((i + 1) * o for i, o in linears) + 2 * d * (2 * depth + 1)
    params += (text.ByteTokenizer.vocab_size + length) * d
    return params, length * sum(i * o for i, o in linears) + depth * 2 * length**2 * d


def count_vae(config, image_size: int) -> dict[str, int | float]:
    """Counts of `config.model` of a VAE, for one image of image_size x image_size pixels.

    Returns: params; encode_gmacs and decode_gmacs of convolutions and attention, products with
      the padding included; gflops of both; train_gflops_per_image = 3 gflops.
    """
    encoder = _vae_half(config, image_size, decoder=False)
    decoder = _vae_half(config, image_size, decoder=True)
    params = encoder[0] + decoder[0]
    gmacs = encoder[1] / 1e9, decoder[1] / 1e9
    return {
        "params": params,
        "encode_gmacs": gmacs[0],
        "decode_gmacs": gmacs[1],
        "gflops": 2 * sum(gmacs),
        "train_gflops_per_image": 6 * sum(gmacs),
    }


def count_inception(config) -> dict[str, int | float]:
    """Counts of `config.model` of Inception, for one image of any size, without its resize.

    Returns: params; gmacs of convolutions, products with the padding included, and classifier;
      gflops.
    """
    model = models.build(config)

    def forward(key):
        return model.init_with_output(key, *model.example_inputs(), capture_intermediates=True)

    _, variables = jax.eval_shape(forward, jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    params = macs = 0
    for path, leaf in flat.items():
        collection, _, module = path.partition("/")
        if collection != "params":
            continue
        params += math.prod(leaf.shape)
        if module.endswith("/kernel"):
            (output,) = flat[f"intermediates/{module.removesuffix('kernel')}__call__"]
            macs += math.prod(leaf.shape) * math.prod(output.shape[1:-1])
    return {"params": params, "gmacs": macs / 1e9, "gflops": 2 * macs / 1e9}


def _vae_half(config, image_size, decoder):
    """(parameters, multiply-adds) of the encoder or the decoder, with its 1x1 convolution."""
    channels, latent = list(config.block_channels), config.latent_channels
    sizes = [image_size // 2**i for i in range(len(channels))]
    convs, norms = [], []  # (kernel, in, out, size of the output), (channels,)

    def block(into, out, size):
        convs.extend([(3, into, out, size), (3, out, out, size)])
        norms.extend([into, out])
        if into != out:
            convs.append((1, into, out, size))

    wide, small = channels[-1], sizes[-1]
    block(wide, wide, small)
    block(wide, wide, small)
    attention = 0
    if config.mid_attention:
        convs.extend(4 * [(1, wide, wide, small)])
        norms.append(wide)
        attention = 2 * small**4 * wide
    levels = list(zip(channels, sizes, strict=True))
    if decoder:
        levels.reverse()
    convs.append((3, latent if decoder else config.image_channels, levels[0][0], levels[0][1]))
    into = levels[0][0]
    for i, (width, size) in enumerate(levels):
        for _ in range(config.layers_per_block + decoder):
            block(into, width, size)
            into = width
        if i < len(levels) - 1:
            convs.append((3, width, width, levels[i + 1][1]))
    moments = 2 * latent
    convs.append((3, into, config.image_channels if decoder else moments, levels[-1][1]))
    norms.append(into)
    if config.use_quant_conv:
        ends = latent if decoder else moments
        convs.append((1, ends, ends, small))
    params = sum((k * k * i + 1) * o for k, i, o, _ in convs) + 2 * sum(norms)
    return params, sum(k * k * i * o * n * n for k, i, o, n in convs) + attention


def published_config(name: str, image_size: int = 256, block: str = "adaLN-Zero") -> ConfigDict:
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
            block=block,
            condition="label",
            num_classes=1000,
            class_dropout_prob=0.1,
            learn_sigma=True,
            **fields,
        )
    )


def main(argv):
    if FLAGS.config is not None and len(argv) > 1:
        raise ValueError(f"give a model name or --config, not both: {' '.join(argv[1:])}.")
    if FLAGS.config is not None and FLAGS["block"].present:
        raise ValueError("--block is of a model name; of a --config set --config.model.block.")
    if FLAGS.config is not None:
        name = pathlib.Path(config_flags.get_config_filename(FLAGS["config"])).name
        rows = {name: count(FLAGS.config)}
    else:
        table = [f"DiT-{size}/{patch}" for size in dit.SIZES for patch in (8, 4, 2)]
        names = argv[1:] or table
        configs = {name: published_config(name, FLAGS.image_size, FLAGS.block) for name in names}
        rows = {name: count_dit(config) for name, config in configs.items()}
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
    flags.DEFINE_enum("block", "adaLN-Zero", list(blocks.BLOCKS), "How time and label come in.")
    flags.DEFINE_bool("json", False, "Print JSON: the counts, or {model: counts} for several.")
    cli.run(main)
