"""Parameters, tokens and multiply-adds of every model, by formula."""

import math

import flax.traverse_util
import jax
from ml_collections import ConfigDict

from dit_jax.models import blocks, conditioning, dit, registry, unet, unet_blocks

CLIP_LENGTH = 77  # tokens that it makes of any caption


def of_dit(config) -> dict[str, int | float]:
    """Counts of `config.model` of a DiT, for one image.

    Of captions all text_length tokens count, and the work of the encoder that is trained along; of
    a frozen one CLIP's 77, without its work.
    Returns: params (trained), params_with_pos_embed (the published count), tokens; gmacs of one
      forward pass: matrix products only; gflops; train_gflops_per_image = 3 gflops.
    Raises: ValueError for an unknown block or condition.
    """
    d, depth = config.hidden_size, config.depth
    mlp = blocks.mlp_size(d, config.mlp_ratio)
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
    words = _words(config, CLIP_LENGTH)
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
        text_params = conditioning.label_rows(config) * d
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


def _words(config, of_context):
    """Tokens of what `config.model` is told."""
    if config.condition == "label":
        return 1
    return config.text_length if config.condition == "tokens" else of_context


def _text_encoder(config):
    """(parameters, multiply-adds of a caption) of the encoder that is trained along."""
    d, length, depth = config.context_size, config.text_length, config.text_depth
    linears = depth * [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    params = sum((i + 1) * o for i, o in linears) + 2 * d * (2 * depth + 1)
    params += (config.text_vocab_size + length) * d
    return params, length * sum(i * o for i, o in linears) + depth * 2 * length**2 * d


def of_unet(config, context_tokens: int = CLIP_LENGTH) -> dict[str, int | float]:
    """Counts of `config.model` of a UNet, for one image.

    Args: context_tokens, M of a context [B, M, context_size] of a frozen encoder, whose own work is
      not counted; a label is one token, and the encoder that is trained along counts.
    Returns: params; gmacs of one forward pass: convolutions, products with the padding included,
      Linears and attention; gflops; train_gflops_per_image = 3 gflops.
    """
    channels, depth = unet.widths(config), config.transformer_depth
    base, blocks_per_level, last = config.base_channels, config.blocks_per_level, len(channels) - 1
    resample_by_blocks = config.resample == "resnet"
    words = _words(config, context_tokens)
    text_params = text_macs = 0
    if config.condition == "tokens":
        text_params, text_macs = _text_encoder(config)
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
            for into, times in ((width, tokens), (config.context_size, words)):
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
    params += text_params
    if config.condition == "label" and config.num_classes:
        rows = config.num_classes + (config.class_dropout_prob > 0)
        params += rows * (config.context_size if depth else 4 * base)
    products = sum(weights * times for weights, _, times in matrices)
    gmacs = (products + attention + text_macs) / 1e9
    return {
        "params": params,
        "gmacs": gmacs,
        "gflops": 2 * gmacs,
        "train_gflops_per_image": 6 * gmacs,
    }


def of_vae(config, image_size: int) -> dict[str, int | float]:
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


def of_inception(config) -> dict[str, int | float]:
    """Counts of `config.model` of Inception, for one image of any size, without its resize.

    Returns: params; gmacs of convolutions, products with the padding included, and classifier;
      gflops.
    """
    model = registry.build(config)

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


VAE_FACTOR = 8  # pixels per latent of the published models


def count(config) -> dict[str, int | float]:
    """Counts of a config's model, for one image, as `counts` has them."""
    if config.model.name == "vae":
        return of_vae(config.model, config.data.image_size)
    if config.model.name == "inception":
        return of_inception(config.model)
    if config.model.name == "unet":
        return of_unet(config.model)
    return of_dit(config.model)


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
