"""Parameters, tokens and FLOPs of any model config, by formula.

  python -m dit_jax.flops [DiT-XL/2 --image_size 256 --block adaLN-Zero | --config FILE] [--json]
  python -m dit_jax.flops sd15-unet adm-imagenet256

The names are those of the DiT paper and of models.unet.PRESETS. The paper's "Gflops" are
multiply-adds of one forward pass: `gmacs` here, gflops = 2 gmacs.
"""

import json
import math
import pathlib

import flax.traverse_util
import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dit_jax import cli, models
from dit_jax.models import blocks, dit, unet, unet_blocks

FLAGS = flags.FLAGS
VAE_FACTOR = 8  # pixels per latent of the published models
CONTEXT_TOKENS = 77  # of CLIP's text encoders


def count(config) -> dict[str, int | float]:
    """Counts of a config's model, for one image: those of the functions below."""
    if config.model.name == "vae":
        return count_vae(config.model, config.data.image_size)
    if config.model.name == "inception":
        return count_inception(config.model)
    if config.model.name == "unet":
        return count_unet(config.model)
    return count_dit(config.model)


def count_dit(config) -> dict[str, int | float]:
    """Counts of `config.model` of a DiT, for one image.

    Returns: params (trained), params_with_pos_embed (the published count), tokens; gmacs of one
      forward pass: matrix products only; gflops; train_gflops_per_image = 3 gflops.
    Raises: ValueError for an unknown block.
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
    context = 2  # tokens, of t and y
    stream = tokens + context if config.block == "in-context" else tokens

    # Each Linear as (in, out, times it is applied to an image).
    block = [(d, 3 * d, stream), (d, d, stream), (d, mlp, stream), (mlp, d, stream)]
    block += [(d, modulations * d, 1)]
    attention = 2 * stream**2 * d  # q k^T and its product with v
    if config.block == "cross-attention":
        block += [(d, d, tokens), (d, 2 * d, context), (d, d, tokens)]
        attention += 2 * tokens * context * d
    outside = [(patch, d, tokens), (256, d, 1), (d, d, 1), (d, out, tokens)]
    outside += [(d, 2 * d if modulations else 0, 1)]
    linears = outside + depth * block

    params = sum((i + 1) * o for i, o, _ in linears)
    params += 2 * d * (depth * norms + (norms > 0))
    params += (classes + (config.class_dropout_prob > 0)) * d
    gmacs = (sum(i * o * n for i, o, n in linears) + depth * attention) / 1e9
    return {
        "params": params,
        "params_with_pos_embed": params + tokens * d,
        "tokens": tokens,
        "gmacs": gmacs,
        "gflops": 2 * gmacs,
        "train_gflops_per_image": 6 * gmacs,
    }


def count_unet(config, context_tokens: int = CONTEXT_TOKENS) -> dict[str, int | float]:
    """Counts of `config.model` of a UNet, for one image.

    Args: context_tokens, M of a context [B, M, context_size]; a label is one token.
    Returns: params; gmacs of one forward pass: convolutions, products with the padding included,
      Linears and attention; gflops; train_gflops_per_image = 3 gflops.
    """
    channels, depth = unet.widths(config), config.transformer_depth
    base, blocks_per_level, last = config.base_channels, config.blocks_per_level, len(channels) - 1
    resample_by_blocks = config.resample == "resnet"
    context_tokens = 1 if config.condition == "label" else context_tokens
    # (weights, numbers beside them, times the weights are applied to an image); other products.
    matrices, norms, attention = [], [], 0

    def conv(into, out, size, kernel=3):
        matrices.append((kernel**2 * into * out, out, size**2))

    def linear(into, out, times, bias=True):
        matrices.append((into * out, out if bias else 0, times))

    def resnet(into, out, size):
        conv(into, out, size)
        conv(out, out, size)
        linear(4 * base, 2 * out if config.time_scale_shift else out, 1)
        norms.extend([into, out])
        if into != out:
            conv(into, out, size, kernel=1)

    def attend(width, size):
        nonlocal attention
        tokens = size**2
        norms.append(width)
        if depth == 0:
            for _ in range(4):
                linear(width, width, tokens)
            attention += 2 * tokens**2 * width
            return
        mlp = unet_blocks.FEED_FORWARD_RATIO * width
        for _ in range(2):  # into the transformer blocks and out of them
            linear(width, width, tokens)
        for _ in range(depth):
            norms.extend(3 * [width])
            for into, times in ((width, tokens), (config.context_size, context_tokens)):
                linear(width, width, tokens, bias=False)  # queries
                linear(into, 2 * width, times, bias=False)  # keys and values
                linear(width, width, tokens)
                attention += 2 * tokens * times * width
            linear(width, 2 * mlp, tokens)
            linear(mlp, width, tokens)

    sizes = [config.input_size // 2**i for i in range(last + 1)]
    linear(base, 4 * base, 1)
    linear(4 * base, 4 * base, 1)
    conv(config.in_channels, channels[0], sizes[0])
    into, skips = channels[0], [channels[0]]
    for i, (width, size) in enumerate(zip(channels, sizes, strict=True)):
        for _ in range(blocks_per_level):
            resnet(into, width, size)
            if i in config.attention_levels:
                attend(width, size)
            into = width
            skips.append(width)
        if i < last:
            (resnet if resample_by_blocks else conv)(width, width, sizes[i + 1])
            skips.append(width)
    resnet(into, into, sizes[-1])
    attend(into, sizes[-1])
    resnet(into, into, sizes[-1])
    for i in reversed(range(last + 1)):
        for _ in range(blocks_per_level + 1):
            resnet(into + skips.pop(), channels[i], sizes[i])
            if i in config.attention_levels:
                attend(channels[i], sizes[i])
            into = channels[i]
        if i > 0:
            (resnet if resample_by_blocks else conv)(into, into, sizes[i - 1])
    norms.append(into)
    conv(into, config.in_channels * (2 if config.learn_sigma else 1), sizes[0])

    params = sum(weights + biases for weights, biases, _ in matrices) + 2 * sum(norms)
    if config.condition == "label" and config.num_classes:
        rows = config.num_classes + (config.class_dropout_prob > 0)
        params += rows * (config.context_size if depth else 4 * base)
    gmacs = (sum(weights * times for weights, _, times in matrices) + attention) / 1e9
    return {
        "params": params,
        "gmacs": gmacs,
        "gflops": 2 * gmacs,
        "train_gflops_per_image": 6 * gmacs,
    }


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


def main(argv):
    if FLAGS.config is not None and len(argv) > 1:
        raise ValueError(f"give a model name or --config, not both: {' '.join(argv[1:])}.")
    if FLAGS.config is not None and FLAGS["block"].present:
        raise ValueError("--block is of a model name; of a --config set --config.model.block.")
    if FLAGS.config is not None:
        name = pathlib.Path(config_flags.get_config_filename(FLAGS["config"])).name
        rows = {name: count(FLAGS.config)}
    else:
        rows = count_names(argv[1:], FLAGS.image_size, FLAGS.block)
    if FLAGS.json:
        print(json.dumps(rows if len(rows) > 1 else next(iter(rows.values()))))
        return
    counts = {count: None for row in rows.values() for count in row}  # in order; not all have all
    width = max(11, *map(len, rows))
    print(
        "  ".join([f"{'model':>{width}}", *(f"{count:>{max(len(count), 11)}}" for count in counts)])
    )
    for name, row in rows.items():
        cells = {count: _cell(row.get(count)) for count in counts}
        padded = [f"{cell:>{max(len(count), 11)}}" for count, cell in cells.items()]
        print("  ".join([f"{name:>{width}}", *padded]))


def _cell(value):
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_integer("image_size", None, "Of DiTs: pixels, 256; latents are 8 times smaller.")
    flags.DEFINE_enum("block", None, list(blocks.BLOCKS), "Of DiTs: adaLN-Zero, in-context, ...")
    flags.DEFINE_bool("json", False, "Print JSON: the counts, or {model: counts} for several.")
    cli.run(main)
