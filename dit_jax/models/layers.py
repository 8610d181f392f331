"""Layers of the transformer: embeddings, LayerNorm, attention, MLP."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LAYER_NORM_EPS = 1e-6
xavier_uniform = nn.initializers.xavier_uniform()
normal_002 = nn.initializers.normal(0.02)


def make_position_table(hidden_size: int, height: int, width: int) -> np.ndarray:
    """Returns the fixed 2-D sin-cos position table [height * width, hidden_size] f32, row-major.

    The first half of the channels encodes the column, the second half the row. Each half has the
    sines first, then the cosines. The table is computed in f64.
    """
    frequencies = 10000.0 ** -(np.arange(hidden_size // 4) / (hidden_size / 4))
    row, column = np.divmod(np.arange(height * width), width)
    angles = [position[:, None] * frequencies[None] for position in (column, row)]
    halves = [np.concatenate([np.sin(a), np.cos(a)], axis=1) for a in angles]
    return np.concatenate(halves, axis=1).astype(np.float32)


def compute_time_sinusoids(t: jax.Array, size: int = 256) -> jax.Array:
    """Returns sinusoids [B, size] f32 of the network's time t [B]: cosines first, then sines."""
    exponent = jnp.arange(size // 2, dtype=jnp.float32) / (size // 2)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10000.0) * exponent)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@jax.custom_vjp
def modulated_layer_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns LayerNorm(x) * (1 + scale) + shift, without affine parameters; statistics in f32.

    Args:
      x: [B, N, D].   shift, scale: [B, D].
    Returns:
      [B, N, D] in x's dtype.

    The backward pass keeps x, its mean and 1 / std. Without this custom derivative, the f32 x_hat
    of every block would be saved, which costs memory traffic. In training the variance is
    E[x^2] - E[x]^2, with a relative error of about 1e-7 (E[x] / std)^2.
    """
    # Without a derivative, XLA fuses two passes over x into one kernel. In training, it fuses
    # statistics of a single pass into the kernel that computes x.
    x_32 = x.astype(jnp.float32)
    mean = _mean(x_32)
    rstd = jax.lax.rsqrt(_mean((x_32 - mean) ** 2) + LAYER_NORM_EPS)
    return _modulate(x, mean, rstd, shift, scale)


def _modulated_layer_norm_fwd(x, shift, scale):
    x_32 = x.astype(jnp.float32)
    mean = _mean(x_32)
    variance = jnp.maximum(_mean(x_32**2) - mean**2, 0)  # rounding may make it negative
    rstd = jax.lax.rsqrt(variance + LAYER_NORM_EPS)
    return _modulate(x, mean, rstd, shift, scale), (x, mean, rstd, shift, scale)


def _modulated_layer_norm_bwd(saved, g):
    x, mean, rstd, shift, scale = saved
    x_hat = (x.astype(jnp.float32) - mean) * rstd
    g = g.astype(jnp.float32)
    g_hat = g * (1 + scale.astype(jnp.float32)[:, None])
    g_x = rstd * (g_hat - _mean(g_hat) - x_hat * _mean(g_hat * x_hat))
    g_shift, g_scale = jnp.sum(g, axis=1), jnp.sum(g * x_hat, axis=1)
    return g_x.astype(x.dtype), g_shift.astype(shift.dtype), g_scale.astype(scale.dtype)


def _modulate(x, mean, rstd, shift, scale):
    scale, shift = (a.astype(jnp.float32)[:, None] for a in (scale, shift))
    return ((x.astype(jnp.float32) - mean) * rstd * (1 + scale) + shift).astype(x.dtype)


_mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
modulated_layer_norm.defvjp(_modulated_layer_norm_fwd, _modulated_layer_norm_bwd)


@jax.custom_vjp
def gelu(h: jax.Array) -> jax.Array:
    """Returns h / 2 (1 + tanh(u)), where u = sqrt(2 / pi) (h + 0.044715 h^3).

    The backward pass keeps only h.
    """
    return nn.gelu(h, approximate=True)


def _gelu_bwd(h, g):
    # The derivative of h sigmoid(2 u), which is the same function. If both passes had tanh(u), XLA
    # would save tanh(u) for the backward pass.
    x = h.astype(jnp.float32)
    two_u = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
    two_du = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x**2)
    s = nn.sigmoid(two_u)
    return ((g.astype(jnp.float32) * (s + x * s * (1 - s) * two_du)).astype(h.dtype),)


gelu.defvjp(lambda h: (gelu(h), h), _gelu_bwd)


exact_gelu = functools.partial(nn.gelu, approximate=False)


def product_precision(dtype: str):
    """Returns a context in which the products of f32 activations are computed in full f32."""
    # By default JAX multiplies f32 in TF32 or bfloat16 on devices with these formats.
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def group_norm(groups: int, epsilon: float, dtype: str, name: str) -> nn.GroupNorm:
    """Returns a GroupNorm whose statistics are computed in f32 and in two passes."""
    # In one pass, the variance loses f32 digits if the mean is much larger than the deviation.
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def layer_norm(epsilon: float, dtype: str, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm whose statistics are computed in f32 and in two passes."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def stack(block: type[nn.Module], depth: int) -> Callable:
    """Returns a module class that scans over `depth` blocks, with parameters [depth, ...]."""
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)


class LayerNorm(nn.Module):
    """LayerNorm of x [B, N, D] with a scale and a bias, by `modulated_layer_norm`."""

    @nn.compact
    def __call__(self, x):
        batch, _, size = x.shape
        scale = self.param("scale", nn.initializers.ones, (size,))
        bias = self.param("bias", nn.initializers.zeros, (size,))
        shift, scale = (jnp.broadcast_to(a[None], (batch, size)) for a in (bias, scale - 1))
        return modulated_layer_norm(x, shift, scale)


class Projections(nn.Module):
    """Linears from x [B, N, D] to `parts` arrays [B, N, H, D/H], with a single kernel parameter.

    Each part is a separate product. A single product would have to be split before the attention,
    and the gradients of its parts would have to be joined.
    """

    num_heads: int
    dtype: str
    parts: int  # 3 are q, k and v

    @nn.compact
    def __call__(self, x):
        batch, tokens, size = x.shape
        heads = (self.num_heads, size // self.num_heads)

        def init(key, shape):
            # Drawn as one matrix: separate [D, D] kernels would have a wider distribution.
            return xavier_uniform(key, (size, self.parts * size)).reshape(shape)

        kernel = self.param("kernel", init, (size, self.parts, *heads))
        bias = self.param("bias", nn.initializers.zeros, (self.parts, *heads))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)

        def project(i):
            # cuBLAS fuses the bias into the product only if both have flat shapes.
            y = x @ kernel[:, i].reshape(size, size) + bias[i].reshape(1, 1, size)
            return y.reshape(batch, tokens, *heads)

        return [project(i) for i in range(self.parts)]


class Attention(nn.Module):
    """Multi-head self-attention; softmax in f32."""

    num_heads: int
    dtype: str
    implementation: str  # 'xla' or 'cudnn'

    @nn.compact
    def __call__(self, x):
        batch, tokens, size = x.shape
        q, k, v = Projections(self.num_heads, self.dtype, 3, name="qkv")(x)
        x = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        x = x.reshape(batch, tokens, size)
        return nn.Dense(size, dtype=self.dtype, kernel_init=xavier_uniform, name="proj")(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, N, D] to an unordered context [B, M, D]; softmax in f32.

    The attention is always XLA's: with few keys, a fused kernel saves nothing.
    """

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x, context):
        # As for qkv, all projections of a sequence are drawn as one matrix, [D, D] or [D, 2D].
        (q,) = Projections(self.num_heads, self.dtype, 1, name="q")(x)
        k, v = Projections(self.num_heads, self.dtype, 2, name="kv")(context)
        size = x.shape[-1]
        x = jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(x.shape)
        return nn.Dense(size, dtype=self.dtype, kernel_init=xavier_uniform, name="proj")(x)


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    hidden_size: int
    dtype: str
    activation: Callable = gelu
    kernel_inits: tuple[Callable, Callable] = (xavier_uniform, xavier_uniform)  # of fc1, fc2

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        fc1_init, fc2_init = self.kernel_inits
        h = dense(self.hidden_size, kernel_init=fc1_init, name="fc1")(x)  # [B, N, hidden_size]
        return dense(x.shape[-1], kernel_init=fc2_init, name="fc2")(self.activation(h))


class TimestepEmbedder(nn.Module):
    """An MLP from the network's time [B] to [B, D], in f32 whatever the model's dtype."""

    hidden_size: int

    @nn.compact
    def __call__(self, t):
        h = compute_time_sinusoids(t)  # [B, 256]
        h = nn.Dense(self.hidden_size, kernel_init=normal_002, name="mlp_0")(h)
        return nn.Dense(self.hidden_size, kernel_init=normal_002, name="mlp_2")(nn.silu(h))
