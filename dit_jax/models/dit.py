"""DiT: the diffusion transformer with any of its four blocks.

Source: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import sizes
from dit_jax.errors import UserError, check_choice
from dit_jax.models import blocks, conditioning, layers, options

MAX_POSITIONS = 2**28  # largest size of the position table, which the host computes in f64
# Hidden size, depth, heads.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def parse_name(name: str) -> dict[str, int]:
    """Returns the config fields for a name of the paper, such as 'DiT-XL/2' with patch size 2.

    Raises: ValueError for an unknown name.
    """
    size, _, patch = name.removeprefix("DiT-").partition("/")
    is_number = patch.isdecimal() and len(patch) < 10 and int(patch) > 0
    if not name.startswith("DiT-") or size not in SIZES or not is_number:
        raise UserError(
            f"unknown model {name!r}; the names are DiT-{{{','.join(SIZES)}}}/PATCH, "
            "for example DiT-XL/2."
        )
    hidden_size, depth, num_heads = SIZES[size]
    return {
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": int(patch),
    }


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """Cuts [B, H, W, C] into tokens [B, N, p*p*C].

    Tokens are in row-major order; inside a token the order is row, column, channel.
    """
    batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    return x.reshape(batch, -1, p * p * channels)


def unpatchify(x: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """Inverts `patchify`: [B, N, p*p*C] to [B, H, W, C]; grid is (patches down, patches across)."""
    batch, _, size = x.shape
    p, (rows, columns) = patch_size, grid
    x = x.reshape(batch, rows, columns, p, p, size // p**2).swapaxes(2, 3)
    return x.reshape(batch, rows * p, columns * p, size // p**2)


class DiT(nn.Module):
    """A noise predictor: eps, and with learn_sigma the variance, from x_t, time and condition.

    Parameters of the blocks are stacked over depth: every leaf under 'blocks' is [L, ...].
    """

    input_size: sizes.Size  # of x_t: one number for a square, or (height, width)
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    block: str  # how time and condition enter, a key of blocks.BLOCKS
    condition: str  # a key of conditioning.KINDS
    num_classes: int  # 0: every label is 0
    null_condition: bool  # whether there is one, for guidance; of labels it is class num_classes
    context_size: int  # width of a caption's sequence
    text_vocab_size: int  # number of token ids; this and the next three are for 'tokens'
    text_length: int
    text_depth: int
    text_num_heads: int
    learn_sigma: bool
    dtype: str  # of the activations; parameters and output are f32
    attention: str  # 'xla' or 'cudnn'
    remat: str  # what the backward pass recomputes: 'none', 'dots' (all but matmuls), 'full'
    scan_unroll: bool  # True: one program for all blocks, fast steps; False: a loop, fast compiles

    def example_inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        x_t = jnp.zeros((1, *sizes.input_shape(self)))
        return x_t, jnp.zeros(1), conditioning.KINDS[self.condition].example(self)

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        """Predicts eps, and with learn_sigma the variance.

        Args: x_t [B, h, w, C]; t [B] network time (0..999 for DDPM); cond as in `conditioning`.
        Returns: [B, h, w, C] f32, or [B, h, w, 2C] with learn_sigma: eps, then the variance.
        """
        *size, channels = sizes.input_shape(self)
        p = self.patch_size
        grid = tuple(side // p for side in size)
        if x_t.shape[1:] != (*size, channels):
            expected = ("B", *size, channels)
            raise UserError(f"x_t has shape {x_t.shape}; the model takes {expected}.")
        out_channels = channels * (2 if self.learn_sigma else 1)

        kind = conditioning.KINDS[self.condition]
        x = patchify(kind.join(self, x_t, cond), p)  # [B, N, p*p*C]
        x = self._dense("x_embedder")(x)  # [B, N, D]
        # The position table is a constant, as in the paper, and no parameter.
        x = x + layers.make_position_table(self.hidden_size, *grid)[None].astype(self.dtype)
        t_emb = layers.TimestepEmbedder(self.hidden_size, name="t_embedder")(t)  # [B, D]
        sequence, y_emb = kind.embed(self, cond)  # [B, M, D] or None, [B, D] or None

        # A scan stacks the parameters of all blocks. XLA could merge the recomputation with the
        # forward pass (CSE) only where the blocks are unrolled, so only there it is prevented.
        block = blocks.BLOCKS[self.block]
        if self.remat != "none":
            block = nn.remat(
                block, policy=options.REMAT_POLICIES[self.remat], prevent_cse=self.scan_unroll
            )
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.depth if self.scan_unroll else 1,
        )(self.num_heads, self.mlp_ratio, self.dtype, self.attention, name="blocks")
        final_layer = blocks.FinalLayer(p * p * out_channels, self.dtype, name="final_layer")

        # The condition enters as more tokens, by cross-attention or by modulation. Only the image's
        # tokens become the output.
        num_tokens = x.shape[1]
        if self._modulates:
            c = (t_emb if y_emb is None else t_emb + y_emb).astype(self.dtype)  # [B, D]
            # A caption modulates by its mean, and its words are also tokens that are attended to.
            if sequence is not None:
                x = jnp.concatenate([x, sequence.astype(self.dtype)], axis=1)  # [B, N + M, D]
            x, _ = stack(x, c)
            x = final_layer(x[:, :num_tokens], c)  # [B, N, p*p*C or twice that]
        else:
            context = t_emb[:, None]
            if sequence is not None:
                context = jnp.concatenate([context, sequence], axis=1)
            context = context.astype(self.dtype)  # [B, 1 + M, D]
            if self.block == "in-context":
                x, _ = stack(jnp.concatenate([x, context], axis=1))  # [B, N + 1 + M, D]
            else:
                x, _ = stack(x, context)  # [B, N, D]
            x = final_layer(x[:, :num_tokens])
        return unpatchify(x, p, grid).astype(jnp.float32)  # [B, h, w, C or 2C]

    @property
    def _modulates(self):
        """Whether time and condition modulate the blocks, as a vector."""
        return self.block in ("adaLN", "adaLN-Zero")

    def embed_label(self, label: jax.Array) -> conditioning.Embedded:
        """Embeds labels [B], by a table of all classes and the null class, with at least one row.

        A label is a vector for blocks that are modulated, and a sequence of one for the others.
        """
        y_emb = nn.Embed(
            max(self.num_classes + self.null_condition, 1),
            self.hidden_size,
            embedding_init=layers.normal_002,
            name="y_embedder",
        )(label)
        return (None, y_emb) if self._modulates else (y_emb[:, None], None)

    def embed_sequence(self, context: jax.Array) -> conditioning.Embedded:
        """Embeds a caption's sequence [B, M, context_size]; its vector is from the mean."""
        context = context.astype(self.dtype)
        sequence = self._dense("context_embedder")(context)
        if not self._modulates:
            return sequence, None
        return sequence, self._dense("pooled_embedder")(context.mean(axis=1))

    def _dense(self, name):
        return nn.Dense(
            self.hidden_size, dtype=self.dtype, kernel_init=layers.xavier_uniform, name=name
        )


def from_config(config) -> DiT:
    """Builds the module that `config.model` describes.

    Raises: ValueError for sizes that do not fit together, with the values.
    """
    fields = {key: config[key] for key in config if key != "name"}
    hidden_size, num_heads = config.hidden_size, config.num_heads
    patch_size = config.patch_size
    height, width = sizes.height_and_width(fields["input_size"])
    fields["input_size"] = input_size = sizes.simplify((height, width))
    if not num_heads or hidden_size % num_heads:
        raise UserError(f"{num_heads=} must divide {hidden_size=}; DiT-S uses 6 heads for 384.")
    if hidden_size % 4:
        raise UserError(f"{hidden_size=} must be a multiple of 4 for the sin-cos position table.")
    if height % patch_size or width % patch_size:
        common = math.gcd(height, width)
        divisors = [number for number in range(1, common + 1) if common % number == 0]
        raise UserError(f"{patch_size=} must divide {input_size=}; choose one of {divisors}.")
    if (size := height * width // patch_size**2 * hidden_size) > MAX_POSITIONS:
        raise UserError(
            f"{input_size=} in patches of {patch_size=} with {hidden_size=}: the position table "
            f"would have {size:,} numbers; at most {MAX_POSITIONS:,} fit."
        )
    check_choice("block", config.block, blocks.BLOCKS)
    blocks.compute_mlp_size(hidden_size, fields["mlp_ratio"])
    conditioning.get_kind(config.condition).check(config)
    check_choice("remat", config.remat, options.REMAT_POLICIES)
    fields["attention"] = options.resolve_attention(
        fields["attention"], fields["dtype"], hidden_size // num_heads
    )
    return DiT(**fields)
