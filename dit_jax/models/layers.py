"""Layers of the transformer: embeddings, modulated LayerNorm, attention, MLP."""

import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

logger = logging.getLogger("dit_jax")

LAYER_NORM_EPS = 1e-6
xavier_uniform = nn.initializers.xavier_uniform()
normal_002 = nn.initializers.normal(0.02)


def sincos_position_table(hidden_size: int, grid_size: int) -> np.ndarray:
    """The fixed 2-D sin-cos position table [grid_size**2, hidden_size], f32, rows row-major.

    The first half of the channels encodes the column, the second the row; each half is sin
    then cos. Computed in f64.
    """
    frequencies = 10000.0 ** -(np.arange(hidden_size // 4) / (hidden_size / 4))
    row, column = np.divmod(np.arange(grid_size**2), grid_size)
    angles = [position[:, None] * frequencies[None] for position in (column, row)]
    halves = [np.concatenate([np.sin(a), np.cos(a)], axis=1) for a in angles]
    return np.concatenate(halves, axis=1).astype(np.float32)


def time_frequencies(t: jax.Array, size: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Sinusoids [B, size] f32 of the network's time t [B]: cosines first, then sines."""
    exponent = jnp.arange(size // 2, dtype=jnp.float32) / (size // 2)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(max_period) * exponent)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _normalise(x):
    """(x_hat, rstd) of x over its last axis, f32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + LAYER_NORM_EPS)
    return centred * rstd, rstd


@jax.custom_vjp
def modulated_layer_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm(x) * (1 + scale) + shift, without affine parameters; statistics in f32.

    Args:
      x: [B, N, D].   shift, scale: [B, D].
    Returns:
      [B, N, D] in x's dtype.

    The backward pass keeps x and recomputes x_hat; differentiated by XLA the f32 x_hat of
    every block would be saved, which costs memory traffic.
    """
    x_hat, _ = _normalise(x)
    scale, shift = (a.astype(jnp.float32)[:, None] for a in (scale, shift))
    return (x_hat * (1 + scale) + shift).astype(x.dtype)


def _modulated_layer_norm_fwd(x, shift, scale):
    return modulated_layer_norm(x, shift, scale), (x, shift, scale)


def _modulated_layer_norm_bwd(saved, g):
    x, shift, scale = saved
    x_hat, rstd = _normalise(x)
    g = g.astype(jnp.float32)
    g_hat = g * (1 + scale.astype(jnp.float32)[:, None])
    mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
    g_x = rstd * (g_hat - mean(g_hat) - x_hat * mean(g_hat * x_hat))
    g_shift, g_scale = jnp.sum(g, axis=1), jnp.sum(g * x_hat, axis=1)
    return g_x.astype(x.dtype), g_shift.astype(shift.dtype), g_scale.astype(scale.dtype)


modulated_layer_norm.defvjp(_modulated_layer_norm_fwd, _modulated_layer_norm_bwd)


def resolve_attention(choice: str, dtype: str, head_dim: int) -> str:
    """Turns the config's attention choice into 'xla' or 'cudnn', once, at set-up.

    'auto' takes cuDNN on an NVIDIA GPU where a small forward and backward pass compiles with
    it, and XLA everywhere else.

    Raises: ValueError if cuDNN is demanded where it cannot run, or the name is unknown.
    """
    if choice not in ("auto", "xla", "cudnn"):
        raise ValueError(f"attention={choice!r} is unknown; choose one of auto, xla, cudnn.")
    if choice == "xla":
        return "xla"
    if jax.default_backend() != "gpu":
        reason = f"the backend is {jax.default_backend()!r}, not an NVIDIA GPU"
    elif dtype != "bfloat16":
        reason = f"cuDNN attention takes bfloat16, not {dtype}"
    elif head_dim % 8:
        reason = f"cuDNN attention needs a head size divisible by 8, not {head_dim}"
    else:
        reason = _cudnn_attention_error(dtype, head_dim)
    if reason is None:
        return "cudnn"
    if choice == "cudnn":
        raise ValueError(f"attention='cudnn' cannot run: {reason}. Use attention='auto' or 'xla'.")
    if jax.default_backend() == "gpu":
        logger.info("attention: xla (%s)", reason)
    return "xla"


def _cudnn_attention_error(dtype, head_dim):
    """None if cuDNN attention compiles here, else why not."""

    def total(q):
        return jax.nn.dot_product_attention(q, q, q, implementation="cudnn").sum()

    try:
        probe = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
        jax.jit(jax.grad(total)).lower(probe).compile()
    # Each cuDNN, driver and card refuses with its own exception type.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


class Attention(nn.Module):
    """Multi-head self-attention; softmax in f32."""

    num_heads: int
    dtype: str
    implementation: str  # 'xla' or 'cudnn'

    @nn.compact
    def __call__(self, x):
        batch, tokens, size = x.shape
        heads = (3, self.num_heads, size // self.num_heads)
        # One [D, 3D] matrix: three separate ones would draw from a wider uniform at init.
        qkv = nn.DenseGeneral(heads, dtype=self.dtype, kernel_init=xavier_uniform, name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # [B, N, H, D/H]
        x = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        x = x.reshape(batch, tokens, size)
        return nn.Dense(size, dtype=self.dtype, kernel_init=xavier_uniform, name="proj")(x)


class Mlp(nn.Module):
    """Linear, tanh GELU, Linear."""

    hidden_size: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=xavier_uniform)
        h = nn.gelu(dense(self.hidden_size, name="fc1")(x), approximate=True)  # [B, N, 4D]
        return dense(x.shape[-1], name="fc2")(h)


class TimestepEmbedder(nn.Module):
    """The network's time [B] to [B, D], in f32 whatever the model's dtype."""

    hidden_size: int

    @nn.compact
    def __call__(self, t):
        h = time_frequencies(t)  # [B, 256]
        h = nn.Dense(self.hidden_size, kernel_init=normal_002, name="mlp_0")(h)
        return nn.Dense(self.hidden_size, kernel_init=normal_002, name="mlp_2")(nn.silu(h))
