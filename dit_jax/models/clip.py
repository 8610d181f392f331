"""CLIP's text transformer, which maps token ids to a context with a vector for each token.

Modules have the same names as in the checkpoints of transformers' CLIPTextModel.
Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", arXiv 2103.00020, section 2.4, and its code for the initial standard deviations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError, check_choice
from dit_jax.models import layers, options

NORM_EPSILON = 1e-5
_layer_norm = functools.partial(layers.layer_norm, NORM_EPSILON)

VIT_L_14 = dict(
    vocab_size=49408,
    length=77,
    hidden_size=768,
    depth=12,
    num_heads=12,
    mlp_size=3072,
    activation="quick_gelu",
)
# Fields of `config.model`, except name and dtype.
PRESETS = {
    "clip-vit-l-14": VIT_L_14,  # Stable Diffusion 1; 123,060,480 parameters
    # Stable Diffusion 2, which does not use the last of 24 layers; 340,387,840 parameters.
    "openclip-h": VIT_L_14
    | dict(hidden_size=1024, depth=23, num_heads=16, mlp_size=4096, activation="gelu"),
}


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns x sigmoid(1.702 x), which approximates GELU with an error of up to 0.02."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": layers.exact_gelu}


class CausalAttention(nn.Module):
    """Multi-head attention of each token to itself and all earlier tokens; softmax in f32."""

    num_heads: int
    out_std: float  # standard deviation of the last Linear's initial kernel
    dtype: str

    @nn.compact
    def __call__(self, x):
        batch, tokens, size = x.shape
        heads = (batch, tokens, self.num_heads, size // self.num_heads)
        q, k, v = (
            _dense(size, size**-0.5, self.dtype, f"{part}_proj")(x).reshape(heads) for part in "qkv"
        )
        x = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        return _dense(size, self.out_std, self.dtype, "out_proj")(x.reshape(batch, tokens, size))


class Layer(nn.Module):
    """Causal self-attention and MLP, each after a LayerNorm."""

    num_heads: int
    mlp_size: int
    activation: str
    out_std: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        attn = CausalAttention(self.num_heads, self.out_std, self.dtype, name="self_attn")
        x = x + attn(_layer_norm(self.dtype, "layer_norm1")(x))
        fc1_init = nn.initializers.normal((2 * x.shape[-1]) ** -0.5)
        inits = fc1_init, nn.initializers.normal(self.out_std)
        activation = ACTIVATIONS[self.activation]
        mlp = layers.Mlp(self.mlp_size, self.dtype, activation, inits, name="mlp")
        x = x + mlp(_layer_norm(self.dtype, "layer_norm2")(x))
        return x, None


class ClipText(nn.Module):
    """CLIP's text transformer, without the projection into the space of images.

    The layers' parameters are stacked over depth: every leaf under 'encoder_layers' is [L, ...].
    """

    vocab_size: int
    length: int  # the largest number of tokens
    hidden_size: int
    depth: int
    num_heads: int
    mlp_size: int
    activation: str  # 'quick_gelu' or 'gelu'
    dtype: str  # of the activations; parameters, norm statistics and outputs are f32

    def example_inputs(self) -> tuple[jax.Array]:
        """Returns the smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, 1), jnp.int32),)

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, M] int32 in [0, vocab_size) to [B, M, hidden_size] f32; M up to length.

        Returns the last layer's outputs after the final LayerNorm. A token attends to itself and
        all earlier tokens, including padding. A token id outside the vocabulary gives NaN.
        Raises: ValueError for more tokens than length, or for another rank or dtype.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.length or tokens.dtype != jnp.int32:
            raise UserError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; this CLIP takes "
                f"[B, M] of int32, M up to {self.length}."
            )
        with layers.product_precision(self.dtype):
            return self._encode(tokens)

    def _encode(self, tokens):
        embed = _embed(self.vocab_size, self.hidden_size, 0.02, self.dtype, "token_embedding")
        position = _embed(self.length, self.hidden_size, 0.01, self.dtype, "position_embedding")
        x = embed(tokens) + position(jnp.arange(tokens.shape[1]))[None]  # [B, M, D]
        # The standard deviation of the sum of all 2 L branches then does not grow with L.
        out_std = (self.hidden_size * 2 * self.depth) ** -0.5
        fields = self.num_heads, self.mlp_size, self.activation, out_std, self.dtype
        encoder_layers = layers.stack(Layer, self.depth)(*fields, name="encoder_layers")
        x, _ = encoder_layers(x)  # [B, M, D]
        return _layer_norm("float32", "final_layer_norm")(x.astype(jnp.float32))


def _embed(num_vectors, size, std, dtype, name):
    init = nn.initializers.normal(std)
    return nn.Embed(num_vectors, size, dtype=dtype, embedding_init=init, name=f"embeddings_{name}")


def _dense(size, std, dtype, name):
    return nn.Dense(size, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)


def from_config(config) -> ClipText:
    """Builds the module from `config.model` of a text encoder.

    Raises: ValueError for heads that do not divide the width, or an unknown activation.
    """
    options.check_heads(config.num_heads, config.hidden_size)
    check_choice("activation", config.activation, ACTIVATIONS)
    return ClipText(**config)
