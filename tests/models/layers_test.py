"""Embedding tables against published ones, and hand-written gradients against autodiff."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close

from dit_jax.models import layers


def test_position_table_equals_the_published_table(golden):
    table = layers.make_position_table(48, 4, 4)
    assert table.dtype == np.float32
    assert_close(table, golden["w/pos_embed"][0], 1e-6)


def test_first_half_of_the_position_table_encodes_the_column():
    table = layers.make_position_table(8, 3, 5).reshape(3, 5, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[2, :, :4])  # same columns, other rows
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 4, 4:])
    assert_close(table[0, 2, 0], np.sin(2.0), 1e-6)  # sin first


def test_time_sinusoids_are_cosines_then_sines():
    out = layers.compute_time_sinusoids(jnp.array([0.0, 7.0]))
    np.testing.assert_array_equal(out[0], np.repeat([1.0, 0.0], 128))
    angles = 7 * 10000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    assert_close(out[1], expected, 2e-6)


def _reference_layer_norm(x, shift, scale):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def test_modulated_layer_norm_has_the_reference_s_value_and_gradient():
    keys = jax.random.split(jax.random.key(0), 4)
    x = 3 * jax.random.normal(keys[0], (2, 5, 16)) + 1
    shift, scale = jax.random.normal(keys[1], (2, 2, 16))
    weights = jax.random.normal(keys[2], (2, 5, 16))

    def value_and_grads(f):
        return jax.value_and_grad(lambda *a: jnp.sum(weights * f(*a)), argnums=(0, 1, 2))(
            x, shift, scale
        )

    actual = value_and_grads(layers.modulated_layer_norm)
    expected = value_and_grads(_reference_layer_norm)
    assert_trees_close(actual, expected, 2e-5)


def test_layer_norm_with_scale_and_bias_has_the_reference_s_value_and_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights = 3 * jax.random.normal(keys[0], (2, 2, 5, 16)) + 1
    scale, bias = jax.random.normal(keys[1], (2, 16))
    module = layers.LayerNorm()

    def value_and_grads(f):
        return jax.value_and_grad(lambda *a: jnp.sum(weights * f(*a)), argnums=(0, 1, 2))(
            x, scale, bias
        )

    def reference(x, scale, bias):
        shift, scale = (jnp.stack([a, a]) for a in (bias, scale - 1))
        return _reference_layer_norm(x, shift, scale)

    actual = value_and_grads(lambda x, s, b: module.apply({"params": {"scale": s, "bias": b}}, x))
    assert_trees_close(actual, value_and_grads(reference), 2e-5)
    np.testing.assert_array_equal(
        module.init_with_output(keys[0], x)[0],
        layers.modulated_layer_norm(x, *jnp.zeros((2, 2, 16))),
    )


def test_modulated_layer_norm_is_accurate_far_from_zero_in_training():
    x = 30 + jax.random.normal(jax.random.key(0), (2, 5, 1152))
    zeros = jnp.zeros((2, 1152))
    out, backward = jax.vjp(layers.modulated_layer_norm, x, zeros, zeros)
    expected, expected_backward = jax.vjp(_reference_layer_norm, x, zeros, zeros)
    assert_close(out, expected, 2.5e-4)
    g = jax.random.normal(jax.random.key(1), x.shape)
    assert_trees_close(backward(g), expected_backward(g), 1e-3)


def test_modulated_layer_norm_of_a_constant_is_near_its_shift_in_training_too():
    # For some of these constants, rounding makes the variance negative.
    x = jnp.linspace(1000, 1001, 99)[None, :, None].repeat(48, axis=2)
    shift, scale = jnp.ones((2, 1, 48))
    out, backward = jax.vjp(layers.modulated_layer_norm, x, shift, scale)
    assert np.abs(out - 1).max() < 0.3  # x - mean is rounding error, which is multiplied by 1000
    assert all(np.isfinite(g).all() for g in backward(jnp.ones_like(out)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_gelu_and_its_gradient_equal_their_formulas(dtype, tolerance):
    h = jnp.linspace(-5, 5, 999, dtype=dtype)
    x = np.asarray(h, np.float64)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    du = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    gradient = jax.vmap(jax.grad(layers.gelu))(h)
    assert gradient.dtype == dtype
    expected = (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * du
    assert_close(gradient, expected, tolerance)
    if dtype == "float32":
        assert_close(layers.gelu(h), x / 2 * (1 + tanh), tolerance)


def test_projections_equal_the_parts_of_one_dense_product():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    dense = nn.DenseGeneral((3, 2, 4), kernel_init=layers.xavier_uniform)
    module = layers.Projections(num_heads=2, dtype="float32", parts=3)
    params = module.init(jax.random.key(1), x)
    params["params"]["bias"] = jax.random.normal(jax.random.key(2), (3, 2, 4))
    expected = dense.apply(params, x)
    for i, part in enumerate(module.apply(params, x)):
        assert_close(part, expected[:, :, i], 1e-6)
    kernel = dense.init(jax.random.key(1), x)["params"]["kernel"]
    np.testing.assert_array_equal(module.init(jax.random.key(1), x)["params"]["kernel"], kernel)


def test_modulated_layer_norm_computes_its_statistics_in_f32():
    x = (1000 + jax.random.normal(jax.random.key(0), (1, 4, 64))).astype(jnp.bfloat16)
    zeros = jnp.zeros((1, 64), jnp.bfloat16)
    out = layers.modulated_layer_norm(x, zeros, zeros)
    assert out.dtype == jnp.bfloat16
    expected = _reference_layer_norm(x.astype(jnp.float32), *(2 * [jnp.zeros((1, 64))]))
    assert_close(out, expected, 0.005)
