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
from dit_jax.errors import UserError, check_choice
from dit_jax.models import conditioning, layers, options, unet_blocks


class UNet(nn.Module):
    """A noise predictor: eps, and with learn_sigma the variance, from x_t, time and condition.

    The embedding of a label is added to that of the time. If there are transformer blocks, they
    attend to it instead. The output is 0 at initialisation. Dropout is active if `apply` gets a key
    'dropout'.
    """

    input_size: sizes.Size  # of x_t: one number for a square, or (height, width)
    in_channels: int
    base_channels: int
    channel_mult: tuple[float, ...]  # channels of each level, divided by base_channels
    blocks_per_level: int  # residual blocks of a level on the way down; on the way up one more
    attention_levels: tuple[int, ...]  # 0 is the full size; the middle always has attention
    transformer_depth: int  # transformer blocks per attention; 0 is plain self-attention
    num_heads: int  # either this or head_dim is 0
    head_dim: int
    context_size: int  # width of the context; 0 is no context
    time_scale_shift: bool  # True: the time scales and shifts norms; False: it is added
    resample: str  # 'conv', by convolutions, or 'resnet', by residual blocks
    norm_groups: int
    norm_epsilon: float  # of all norms but the transformers', whose epsilons unet_blocks has
    dropout: float  # of residual blocks
    condition: str  # a key of conditioning.KINDS
    num_classes: int  # 0: labels are ignored
    null_condition: bool  # whether there is one, for guidance; of labels it is class num_classes
    text_vocab_size: int  # number of token ids; this and the next three are for 'tokens'
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
        return x_t, jnp.zeros(1), conditioning.KINDS[self.condition].example(self)

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        """Predicts eps, and with learn_sigma the variance.

        Args:
          x_t: [B, h, w, C].   t: [B] network time (0..999 for DDPM).
          cond: as in `conditioning`.
        Returns: [B, h, w, C] f32, or [B, h, w, 2C] with learn_sigma: eps, then the variance.
        Raises: ValueError for an input of another shape.
        """
        if x_t.shape[1:] != sizes.input_shape(self):
            expected = ("B", *sizes.input_shape(self))
            raise UserError(f"x_t has shape {x_t.shape}; the model takes {expected}.")
        # Makers of blocks: residual blocks by width and name, attention by level and name.
        widths, last = self.widths, len(self.channel_mult) - 1
        resnet, downsample, upsample = self._make_resnets()
        attention = {i: self._make_attention(i) for i in self.levels_with_attention}
        # The time, perhaps with the label, and the context that transformer blocks attend to.
        t_emb = layers.compute_time_sinusoids(t, self.base_channels)  # [B, D]
        t_emb = unet_blocks.TimeEmbedding(self._time_size, name="time_embedding")(t_emb)
        kind = conditioning.KINDS[self.condition]
        context, y_emb = kind.embed(self, cond)  # [B, M, context_size] or None, [B, 4D] or None
        if y_emb is not None:
            t_emb = t_emb + y_emb

        # Down: every output is kept for a skip connection.
        x = kind.join(self, x_t, cond)  # [B, h, w, C or more]
        x = unet_blocks.conv(widths[0], self.dtype, "conv_in")(x)  # [B, h, w, D_0]
        skips = [x]
        for i, width in enumerate(widths):
            for j in range(self.blocks_per_level):
                x = resnet(width, name=f"down_blocks_{i}_resnets_{j}")(x, t_emb)
                if i in self.attention_levels:
                    x = attention[i](name=f"down_blocks_{i}_attentions_{j}")(x, context)
                skips.append(x)
            if i < last:  # [B, h/2, w/2, D_i]
                x = downsample(width, name=f"down_blocks_{i}_downsamplers_0")(x, t_emb)
                skips.append(x)
        # The middle always has attention, at the last level.
        middle = functools.partial(resnet, widths[-1])
        x = unet_blocks.MidBlock(middle, attention[last], name="mid_block")(x, t_emb, context)
        # Up: each level has one block more, for the skip of conv_in or of a downsampling.
        for i, width in reversed(list(enumerate(widths))):
            level = f"up_blocks_{last - i}"
            for j in range(self.blocks_per_level + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = resnet(width, name=f"{level}_resnets_{j}")(x, t_emb)
                if i in self.attention_levels:
                    x = attention[i](name=f"{level}_attentions_{j}")(x, context)
            if i > 0:  # [B, 2h, 2w, D_i]
                x = upsample(width, name=f"{level}_upsamplers_0")(x, t_emb)
        # The last convolution is zero at initialisation, and so is the output.
        norm = layers.group_norm(self.norm_groups, self.norm_epsilon, self.dtype, "conv_norm_out")
        out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        conv_out = unet_blocks.conv(out_channels, self.dtype, "conv_out", unet_blocks.zeros)
        x = conv_out(nn.silu(norm(x)))
        return x.astype(jnp.float32)  # [B, h, w, C or 2C]

    @property
    def widths(self) -> list[int]:
        """The channels of every level; level 0 has the full size."""
        return [round(mult * self.base_channels) for mult in self.channel_mult]

    @property
    def _time_size(self):
        """Width of the embedding of the time, and of a label that is added to it."""
        return 4 * self.base_channels

    @property
    def levels_with_attention(self) -> list[int]:
        """The attention_levels and the last level, because the middle has attention."""
        return sorted({*self.attention_levels, len(self.channel_mult) - 1})

    def heads(self, level: int) -> int:
        """Returns the number of attention heads at this level."""
        return self.num_heads or self.widths[level] // self.head_dim

    def _make_resnets(self):
        """Returns the makers of residual blocks, of downsampling and of upsampling."""
        resnet = functools.partial(
            self._recompute(unet_blocks.ResnetBlock),
            groups=self.norm_groups,
            epsilon=self.norm_epsilon,
            dropout=self.dropout,
            time_scale_shift=self.time_scale_shift,
            dtype=self.dtype,
        )
        if self.resample == "conv":
            downsample = functools.partial(unet_blocks.Downsample, dtype=self.dtype)
            upsample = functools.partial(unet_blocks.Upsample, dtype=self.dtype)
        else:
            downsample = functools.partial(resnet, resample=unet_blocks.halve)
            upsample = functools.partial(resnet, resample=unet_blocks.double)
        return resnet, downsample, upsample

    def _make_attention(self, level):
        """Returns the maker of this level's attention or transformer module."""
        if self.transformer_depth:
            block, option = unet_blocks.SpatialTransformer, dict(depth=self.transformer_depth)
        else:
            block, option = unet_blocks.AttentionBlock, dict(epsilon=self.norm_epsilon)
        return functools.partial(
            self._recompute(block),
            num_heads=self.heads(level),
            groups=self.norm_groups,
            dtype=self.dtype,
            attention=self.attention[level],
            **option,
        )

    def _recompute(self, block):
        """Returns the block class with the recomputation that `remat` chooses."""
        if self.remat == "none":
            return block
        return nn.remat(block, policy=options.REMAT_POLICIES[self.remat])

    def embed_label(self, label: jax.Array) -> conditioning.Embedded:
        """Embeds labels [B]: as a context for transformer blocks, else as a vector."""
        if self.num_classes == 0:
            return None, None
        embedding = nn.Embed(
            self.num_classes + self.null_condition,
            self.context_size if self.transformer_depth else self._time_size,
            embedding_init=nn.initializers.normal(1.0),  # as in ADM and latent diffusion
            name="class_embedding",
        )(label)
        if self.transformer_depth:
            return embedding[:, None].astype(self.dtype), None
        return None, embedding

    def embed_sequence(self, context: jax.Array) -> conditioning.Embedded:
        """Returns a caption's sequence [B, M, context_size]; transformer blocks project it."""
        return context.astype(self.dtype), None


def from_config(config) -> UNet:
    """Builds the module that `config.model` describes.

    Raises: ValueError for sizes that do not fit together, with the values.
    """
    model = UNet(**config)
    _check_levels(model)
    _check_heads(model)
    kind = conditioning.get_kind(model.condition)
    _check_context(model, kind)
    kind.check(model)
    check_choice("remat", model.remat, options.REMAT_POLICIES)
    check_choice("resample", model.resample, ("conv", "resnet"))
    return model.clone(attention=_resolve_attention(model))


def _check_levels(model):
    """Raises ValueError for sizes or channels of the levels that do not fit together."""
    levels = len(model.channel_mult)
    base_channels, norm_groups = model.base_channels, model.norm_groups
    if not levels:
        raise UserError("channel_mult=() needs a number for each level.")
    unit = 2 ** (levels - 1)
    if any(side % unit for side in sizes.height_and_width(model.input_size)):
        raise UserError(
            f"input_size={model.input_size} must be a multiple of {unit}: channel_mult="
            f"{model.channel_mult} has {levels} levels, and each but the first halves the size. "
            "Take fewer levels, or another size."
        )
    if base_channels % 2:
        raise UserError(f"{base_channels=} must be even for the sinusoids.")
    if invalid := [width for width in model.widths if width < 1 or width % norm_groups]:
        raise UserError(
            f"{norm_groups=} must divide the channels of all levels, not {invalid}. The channels "
            f"are {base_channels=} x channel_mult={model.channel_mult}."
        )
    if invalid := [level for level in model.attention_levels if level >= levels]:
        raise UserError(
            f"attention_levels={model.attention_levels} has {invalid}; the levels are "
            f"0..{levels - 1}, where 0 has the full size."
        )


def _check_heads(model):
    """Raises ValueError unless the heads divide the channels wherever there is attention."""
    num_heads, head_dim = model.num_heads, model.head_dim
    channels = [model.widths[level] for level in model.levels_with_attention]
    if (num_heads > 0) == (head_dim > 0) or any(c % (num_heads or head_dim) for c in channels):
        raise UserError(
            f"{num_heads=}, {head_dim=}: exactly one must not be 0, and it must divide the "
            f"channels of the levels with attention and of the middle, {channels}."
        )


def _check_context(model, kind):
    """Checks that there are either transformer blocks and a context, or neither."""
    transformer_depth, condition = model.transformer_depth, model.condition
    context_size, num_classes = model.context_size, model.num_classes
    has_context = context_size > 0 and (num_classes > 0 or kind.is_sequence)
    has_none = context_size == 0 and not kind.is_sequence
    if not (has_context if transformer_depth else has_none):
        raise UserError(
            f"{transformer_depth=}, {condition=}, {context_size=}, {num_classes=}: transformer "
            "blocks attend to a caption or a label. They need context_size, 768 for Stable "
            "Diffusion 1, and for labels num_classes. Without transformer blocks, set "
            "transformer_depth=0, condition='label' and context_size=0."
        )


def _resolve_attention(model):
    """Returns 'xla' or 'cudnn' for every level.

    Raises: ValueError if 'cudnn' is chosen and is possible at no level.
    """
    choice, widths = model.attention, model.widths
    head_dims = {i: widths[i] // model.heads(i) for i in model.levels_with_attention}
    # Head sizes differ between levels, so cuDNN may be possible at only some levels.
    attempt = "auto" if choice == "cudnn" else choice
    resolved = {
        size: options.resolve_attention(attempt, model.dtype, size)
        for size in {*head_dims.values()}
    }
    if choice == "cudnn" and "cudnn" not in resolved.values():
        options.resolve_attention(choice, model.dtype, min(resolved))  # raises, with the reason
    return tuple(resolved[head_dims[i]] if i in head_dims else "xla" for i in range(len(widths)))
