"""UNet: the noise predictor of DDPM, ADM, latent diffusion and Stable Diffusion.

Modules have the same names as in diffusers' UNet2DConditionModel, so that one rule imports them.
The time's sinusoids and the padding of strided convolutions are as in ADM and latent diffusion.
Sources: Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, section 3; Rombach et al. 2022.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import sizes
from dit_jax.errors import UserError
from dit_jax.models import conditioning, layers, options, unet_blocks

RESAMPLE = ("conv", "resnet")


def get_widths(config) -> list[int]:
    """Returns the channels of every level, from the full size inwards."""
    return [round(mult * config.base_channels) for mult in config.channel_mult]


class UNet(nn.Module):
    """A noise predictor: eps, and with learn_sigma the variance, from x_t, time and condition.

    A label is added to the time; if there are transformer blocks, it is their only context instead.
    The output is 0 at initialisation. Dropout is active if `apply` gets a key 'dropout'.
    """

    input_size: sizes.Size  # of x_t: one number for a square, or (height, width)
    in_channels: int
    base_channels: int
    channel_mult: tuple[float, ...]  # channels of each level, divided by base_channels
    blocks_per_level: int  # residual blocks of a level; on the way up one more
    attention_levels: tuple[int, ...]  # 0 is the full size; the middle always has attention
    transformer_depth: int  # transformer blocks per attention; 0 is plain self-attention
    num_heads: int  # either this or head_dim is 0
    head_dim: int
    context_size: int  # width of the context; 0 is no context
    time_scale_shift: bool  # True: the time scales and shifts norms; False: it is added
    resample: str  # 'conv', by convolutions, or 'resnet', by residual blocks
    norm_groups: int
    norm_epsilon: float  # the transformers' norms have other ones, in unet_blocks
    dropout: float  # of residual blocks
    condition: str  # 'label', 'tokens' or 'context': see `conditioning`
    num_classes: int  # 0: labels are ignored
    null_condition: bool  # whether it has one, for guidance; of labels it is class num_classes
    text_vocab_size: int  # for 'tokens', as the next three: number of ids
    text_length: int
    text_depth: int
    text_num_heads: int
    learn_sigma: bool
    dtype: str  # of the activations; parameters, time embedding, norm statistics, output are f32
    attention: tuple[str, ...]  # self-attention of each level: 'xla' or 'cudnn'
    # What the backward pass of every block recomputes: 'none', 'dots' (all but Linears), 'full'.
    remat: str

    def example_inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        x_t = jnp.zeros((1, *sizes.input_shape(self)))
        return x_t, jnp.zeros(1), conditioning.example(self)

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        """Predicts eps, and with learn_sigma the variance.

        Args:
          x_t: [B, h, w, C].   t: [B] network time (0..999 for DDPM).
          cond: as in `conditioning`.
        Returns: [B, h, w, C] f32, or [B, h, w, 2C] with learn_sigma: eps, then the variance.
        Raises: ValueError for an input of another shape.
        """
        self._check_inputs(x_t, cond)
        # The settings that all residual blocks and all attentions of a level share.
        channels, last = get_widths(self), len(self.channel_mult) - 1
        resnet = functools.partial(
            self._recomputed(unet_blocks.ResnetBlock),
            groups=self.norm_groups,
            epsilon=self.norm_epsilon,
            dropout=self.dropout,
            time_scale_shift=self.time_scale_shift,
            dtype=self.dtype,
        )
        attention = {i: self._attention(i) for i in {*self.attention_levels, last}}
        # The time, with the label if it is added to it, and what transformer blocks attend to.
        t_emb = layers.time_frequencies(t, self.base_channels)  # [B, D]
        t_emb = unet_blocks.TimeEmbedding(4 * self.base_channels, name="time_embedding")(t_emb)
        t_emb, context = self._condition(t_emb, cond)  # [B, 4D], [B, M, context_size]

        # Down: every output is kept for a skip connection.
        conv = functools.partial(unet_blocks.conv, dtype=self.dtype)
        x = conv(channels[0], name="conv_in")(x_t)  # [B, h, w, D_0]
        skips = [x]
        for i, width in enumerate(channels):
            for j in range(self.blocks_per_level):
                x = resnet(width, name=f"down_blocks_{i}_resnets_{j}")(x, t_emb)
                if i in self.attention_levels:
                    x = attention[i](name=f"down_blocks_{i}_attentions_{j}")(x, context)
                skips.append(x)
            if i < last:  # [B, h/2, w/2, D_i]
                name = f"down_blocks_{i}_downsamplers_0"
                if self.resample == "conv":
                    x = unet_blocks.Downsample(self.dtype, name=name)(x, t_emb)
                else:
                    x = resnet(width, resample=unet_blocks.halve, name=name)(x, t_emb)
                skips.append(x)
        # The middle always has attention, at the last level.
        middle = functools.partial(resnet, channels[-1])
        x = unet_blocks.MidBlock(middle, attention[last], name="mid_block")(x, t_emb, context)
        # Up: each level has one block more, for the skip of conv_in or of a downsampling.
        for i, width in reversed(list(enumerate(channels))):
            level = f"up_blocks_{last - i}"
            for j in range(self.blocks_per_level + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = resnet(width, name=f"{level}_resnets_{j}")(x, t_emb)
                if i in self.attention_levels:
                    x = attention[i](name=f"{level}_attentions_{j}")(x, context)
            if i > 0:  # [B, 2h, 2w, D_i]
                name = f"{level}_upsamplers_0"
                if self.resample == "conv":
                    x = unet_blocks.Upsample(self.dtype, name=name)(x, t_emb)
                else:
                    x = resnet(width, resample=unet_blocks.double, name=name)(x, t_emb)
        # The last convolution is zero at initialisation, and so is the output.
        norm = layers.group_norm(self.norm_groups, self.norm_epsilon, self.dtype, "conv_norm_out")
        out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        x = conv(out_channels, name="conv_out", kernel_init=unet_blocks.zeros)(nn.silu(norm(x)))
        return x.astype(jnp.float32)  # [B, h, w, C or 2C]

    def heads(self, level: int) -> int:
        """Returns the number of attention heads at this level."""
        return self.num_heads or get_widths(self)[level] // self.head_dim

    def _attention(self, level):
        """Returns the maker of this level's attention or transformer module, by name."""
        if self.transformer_depth:
            block, option = unet_blocks.SpatialTransformer, dict(depth=self.transformer_depth)
        else:
            block, option = unet_blocks.AttentionBlock, dict(epsilon=self.norm_epsilon)
        return functools.partial(
            self._recomputed(block),
            num_heads=self.heads(level),
            groups=self.norm_groups,
            dtype=self.dtype,
            attention=self.attention[level],
            **option,
        )

    def _recomputed(self, block):
        """Returns the block class with the recomputation that `remat` chooses."""
        if self.remat == "none":
            return block
        return nn.remat(block, policy=options.REMAT_POLICIES[self.remat])

    def _condition(self, t_emb, cond):
        """Returns the time embedding and the context.

        Without transformer blocks, the embedding of a label is added to that of the time.
        """
        if self.condition != "label":
            return t_emb, conditioning.read(self, cond).astype(self.dtype)
        if self.num_classes == 0:
            return t_emb, None
        embed = nn.Embed(
            self.num_classes + self.null_condition,
            self.context_size if self.transformer_depth else t_emb.shape[-1],
            embedding_init=nn.initializers.normal(1.0),  # as in ADM and latent diffusion
            name="class_embedding",
        )
        if self.transformer_depth:
            return t_emb, embed(cond)[:, None].astype(self.dtype)
        return t_emb + embed(cond), None

    def _check_inputs(self, x_t, cond):
        if x_t.shape[1:] != sizes.input_shape(self):
            expected = ("B", *sizes.input_shape(self))
            raise UserError(f"x_t has shape {x_t.shape}; the model takes {expected}.")
        if self.condition == "label" and self.num_classes and cond.ndim != 1:
            raise UserError(
                f"cond has shape {cond.shape}; a model of condition='label' takes ('B',)."
            )


def from_config(config) -> UNet:
    """Builds the module that `config.model` describes.

    Raises: ValueError for sizes that do not fit together, with the values.
    """
    model = UNet(**config)
    _check_sizes(model)
    _check_condition(model)
    conditioning.check(model)
    options.check_choice("remat", model.remat, options.REMAT_POLICIES)
    return model.clone(attention=_resolve_attention(model))


def _check_sizes(model):
    """Raises ValueError for sizes of the levels, norms or heads that do not fit together."""
    channels, levels = get_widths(model), len(model.channel_mult)
    input_size, groups = model.input_size, model.norm_groups
    if levels < 1:
        raise UserError(f"channel_mult={model.channel_mult} needs a number for each level.")
    unit = 2 ** (levels - 1)
    if any(side < unit or side % unit for side in sizes.height_and_width(input_size)):
        raise UserError(
            f"{input_size=} must be a multiple of {unit}: each of the {levels} levels of "
            f"channel_mult={model.channel_mult} but the first halves it. Take fewer levels, or "
            "another size."
        )
    if model.base_channels % 2:
        raise UserError(f"base_channels={model.base_channels} must be even for the sinusoids.")
    if wrong := [c for c in channels if groups < 1 or c < 1 or c % groups]:
        raise UserError(
            f"norm_groups={groups} must divide the channels of all levels, not {wrong}; all are "
            f"base_channels={model.base_channels} x channel_mult={model.channel_mult}."
        )
    if strange := [level for level in model.attention_levels if level not in range(levels)]:
        raise UserError(
            f"attention_levels={model.attention_levels} has {strange}; the levels are "
            f"0..{levels - 1}, 0 the full size."
        )
    if (model.num_heads > 0) == (model.head_dim > 0) or min(model.num_heads, model.head_dim) < 0:
        raise UserError(
            f"num_heads={model.num_heads}, head_dim={model.head_dim}: exactly one must not be 0; "
            "the other follows from the channels."
        )
    attended = [channels[level] for level in {*model.attention_levels, levels - 1}]
    if wrong := [c for c in attended if c % (model.num_heads or model.head_dim)]:
        raise UserError(
            f"num_heads={model.num_heads}, head_dim={model.head_dim} must divide the channels of "
            f"the levels with attention and of the middle, not {sorted(wrong)}."
        )
    if model.resample not in RESAMPLE:
        raise UserError(
            f"resample={model.resample!r} is unknown; choose one of {', '.join(RESAMPLE)}."
        )


def _check_condition(model):
    """Raises ValueError unless there is a context exactly if transformer blocks attend to it."""
    depth, size = model.transformer_depth, model.context_size
    if depth == 0 and (size or model.condition != "label"):
        raise UserError(
            f"condition={model.condition!r}, context_size={size}: with transformer_depth=0 nothing "
            "attends to a context. Set transformer_depth, or condition='label' and context_size=0."
        )
    if depth and size < 1:
        raise UserError(
            f"transformer_depth={depth} needs context_size, the width of what its blocks attend "
            f"to, not {size}: 768 for Stable Diffusion 1."
        )
    if depth and model.condition == "label" and model.num_classes < 1:
        raise UserError(
            f"transformer_depth={depth} with condition='label' needs num_classes for the context, "
            f"not {model.num_classes}; without labels set transformer_depth=0."
        )


def _resolve_attention(model):
    """Returns 'xla' or 'cudnn' for every level.

    Raises: ValueError if 'cudnn' is chosen and is possible at no level.
    """
    choice, channels = model.attention, get_widths(model)
    levels = {*model.attention_levels, len(channels) - 1}
    sizes = {level: channels[level] // model.heads(level) for level in levels}
    # Head sizes differ between levels, so cuDNN may be possible at some of them only.
    attempt = "auto" if choice == "cudnn" else choice
    resolved = {
        size: options.resolve_attention(attempt, model.dtype, size) for size in {*sizes.values()}
    }
    if choice == "cudnn" and "cudnn" not in resolved.values():
        options.resolve_attention(choice, model.dtype, min(resolved))  # raises, with the reason
    return tuple(resolved[sizes[i]] if i in sizes else "xla" for i in range(len(channels)))
