"""DiT with each of the four blocks against a forward pass in NumPy, and common properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import initial_params, random_like, random_params
from helpers.close import assert_close, assert_trees_close

from dit_jax import models
from dit_jax.models import blocks

GRID, PATCH, SIZE, HEADS, DEPTH, CLASSES = 4, 2, 48, 4, 3, 7  # of the golden model


def _layer_norm(x, scale=1.0, bias=0.0):
    variance = np.mean((x - x.mean(-1, keepdims=True)) ** 2, axis=-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) * scale + bias


def _linear(x, p):
    """Applies a kernel [D, ...] and a bias [...] to x [.., D]."""
    return np.tensordot(x, p["kernel"], 1) + p["bias"]


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attend(q, k, v, proj):
    """Attends from q [B, N, H, D/H] to k and v [B, M, H, D/H], and projects to [B, N, D]."""
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return _linear(np.einsum("bhnm,bmhd->bnhd", weight, v).reshape(*q.shape[:2], SIZE), proj)


def _self_attend(x, p):
    q, k, v = np.moveaxis(_linear(x, p["qkv"]), 2, 0)
    return _attend(q, k, v, p["proj"])


def _cross_attend(x, context, p):
    k, v = np.moveaxis(_linear(context, p["kv"]), 2, 0)
    return _attend(_linear(x, p["q"])[:, :, 0], k, v, p["proj"])


def _mlp(x, p):
    return _linear(_gelu(_linear(x, p["fc1"])), p["fc2"])


def _modulate(x, shift, scale):
    return _layer_norm(x) * (1 + scale) + shift


def _make_modulation(c, p):
    """Returns the shifts, scales and gates, each [B, 1, D], for c [B, D]."""
    return np.moveaxis(_linear(_silu(c), p), 1, 0)[:, :, None]


def _apply_block(name, x, c, context, p):
    if name == "adaLN-Zero":
        shift, scale, gate, shift_2, scale_2, gate_2 = _make_modulation(c, p["adaLN_modulation"])
        x = x + gate * _self_attend(_modulate(x, shift, scale), p["attn"])
        return x + gate_2 * _mlp(_modulate(x, shift_2, scale_2), p["mlp"])
    if name == "adaLN":
        shift, scale, shift_2, scale_2 = _make_modulation(c, p["adaLN_modulation"])
        x = x + _self_attend(_modulate(x, shift, scale), p["attn"])
        return x + _mlp(_modulate(x, shift_2, scale_2), p["mlp"])
    x = x + _self_attend(_layer_norm(x, **p["norm1"]), p["attn"])
    if name == "cross-attention":
        x = x + _cross_attend(_layer_norm(x, **p["norm_cross"]), context, p["cross_attn"])
    return x + _mlp(_layer_norm(x, **p["norm2"]), p["mlp"])


def _make_position_table():
    """Returns [N, D]: sines and cosines of the column, then sines and cosines of the row."""
    rate = 10000 ** -(np.arange(SIZE // 4) / (SIZE // 4))
    column, row = np.arange(GRID**2) % GRID, np.arange(GRID**2) // GRID
    angles = [np.outer(column, rate), np.outer(row, rate)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def _forward(name, params, x_t, t, y):
    """Computes the model's output [B, 8, 8, 8] in f64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    patches = [
        x_t[:, i : i + PATCH, j : j + PATCH].reshape(len(x_t), -1)
        for i in range(0, GRID * PATCH, PATCH)
        for j in range(0, GRID * PATCH, PATCH)
    ]
    x = (
        _linear(np.stack(patches, axis=1).astype(np.float64), p["x_embedder"])
        + _make_position_table()
    )
    angles = np.outer(t, 10000.0 ** -(np.arange(128) / 128))
    h = _linear(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), p["t_embedder"]["mlp_0"])
    t_emb = _linear(_silu(h), p["t_embedder"]["mlp_2"])
    y_emb = p["y_embedder"]["embedding"][y]
    c, context = t_emb + y_emb, np.stack([t_emb, y_emb], axis=1)
    if name == "in-context":
        x = np.concatenate([x, context], axis=1)
    for i in range(DEPTH):
        x = _apply_block(name, x, c, context, jax.tree.map(lambda a, i=i: a[i], p["blocks"]))
    x = x[:, : GRID**2]
    if name.startswith("adaLN"):
        x = _modulate(x, *_make_modulation(c, p["final_layer"]["adaLN_modulation"]))
    else:
        x = _layer_norm(x, **p["final_layer"]["norm"])
    x = _linear(x, p["final_layer"]["linear"])
    out = np.empty((len(x), GRID * PATCH, GRID * PATCH, x.shape[-1] // PATCH**2))
    for n in range(GRID**2):
        i, j = PATCH * (n // GRID), PATCH * (n % GRID)
        out[:, i : i + PATCH, j : j + PATCH] = x[:, n].reshape(len(x), PATCH, PATCH, -1)
    return out


@pytest.fixture(scope="module", params=blocks.BLOCKS)
def block(request):
    return request.param


@pytest.fixture(scope="module")
def config(block, golden_model_config):
    config = golden_model_config.copy_and_resolve_references()
    config.block = block
    return config


@pytest.fixture(scope="module")
def initial(config):
    return initial_params(models.build(config))


@pytest.fixture(scope="module")
def params(config):
    return random_params(models.build(config))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    x_t = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    return x_t, np.array([3.0, 250.0, 999.0], np.float32), np.array([0, CLASSES, 4], np.int32)


@pytest.fixture(scope="module")
def apply(config):
    return jax.jit(models.build(config).apply)


@pytest.fixture(scope="module")
def out(apply, params, inputs):
    return apply({"params": params}, *inputs)


def _value_and_grad(config, params, inputs):
    model = models.build(config)

    def loss(params):
        out = model.apply({"params": params}, *inputs)
        return jnp.mean(out**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_output_equals_the_numpy_reference(block, params, inputs, out):
    expected = _forward(block, params, *inputs)
    assert_close(out, expected, 2e-5)


def test_numpy_reference_equals_the_published_model(golden, golden_params):
    out = _forward("adaLN-Zero", golden_params, golden["x_t"], golden["t"], golden["y"])
    assert_close(out, golden["model_out"], 2e-5)


def test_speed_options_change_neither_output_nor_gradient(block, config, params, inputs):
    expected = _value_and_grad(config, params, inputs)
    variants = [dict(scan_unroll=True, remat="full")]
    if block == "adaLN-Zero":  # the options are outside the blocks, so one block is enough
        variants.append(dict(remat="dots"))
    for options in variants:
        changed = config.copy_and_resolve_references()
        changed.update(options)
        assert_trees_close(_value_and_grad(changed, params, inputs), expected, 1e-5)


def test_bfloat16_returns_f32_near_the_f32_output(config, params, inputs, out):
    config = config.copy_and_resolve_references()
    config.dtype = "bfloat16"
    bf16_out = jax.jit(models.build(config).apply)({"params": params}, *inputs)
    assert bf16_out.dtype == jnp.float32
    error = np.abs(bf16_out - out).max() / np.abs(out).max()
    assert 1e-5 < error < 0.05  # above 1e-5, so bfloat16 was used


def test_initial_output_is_exactly_zero(apply, initial, inputs):
    assert not np.any(np.asarray(apply({"params": initial}, *inputs)))


def test_blocks_and_final_layer_have_the_expected_initial_statistics(block, initial):
    """For adaLN-Zero, these are the published statistics."""

    def bound(fan_in, fan_out):
        return np.sqrt(6 / (fan_in + fan_out))

    d = SIZE
    uniform = {  # path -> bound of the uniform distribution
        "blocks/attn/qkv": bound(d, 3 * d),  # one matrix, not three
        "blocks/attn/proj": bound(d, d),
        "blocks/mlp/fc1": bound(d, 4 * d),
        "blocks/mlp/fc2": bound(4 * d, d),
    }
    zeros, ones = {"final_layer/linear"}, set()
    if block == "adaLN-Zero":
        zeros |= {"blocks/adaLN_modulation", "final_layer/adaLN_modulation"}
    elif block == "adaLN":
        uniform["blocks/adaLN_modulation"] = bound(d, 4 * d)
        zeros |= {"final_layer/adaLN_modulation"}
    else:
        ones |= {"blocks/norm1", "blocks/norm2", "final_layer/norm"}
    if block == "cross-attention":
        uniform["blocks/cross_attn/q"] = uniform["blocks/cross_attn/proj"] = bound(d, d)
        uniform["blocks/cross_attn/kv"] = bound(d, 2 * d)  # one matrix, like qkv
        ones |= {"blocks/norm_cross"}
    seen = set()
    for part in ("blocks", "final_layer"):
        for path, leaf in jax.tree_util.tree_leaves_with_path({part: initial[part]}):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            module, _, kind = path.rpartition("/")
            seen.add(module)
            if kind == "bias" or module in zeros:
                assert not np.any(np.asarray(leaf)), path
            elif module in ones:
                assert np.all(np.asarray(leaf) == 1), path
            else:
                assert np.abs(leaf).max() == pytest.approx(uniform[module], rel=0.02), path
                assert np.std(leaf) == pytest.approx(uniform[module] / np.sqrt(3), rel=0.03), path
    assert seen == uniform.keys() | zeros | ones


def test_cross_attention_ignores_the_order_and_repetition_of_context_tokens():
    block = blocks.CrossAttentionBlock(2, mlp_ratio=4.0, dtype="float32", attention="xla")
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal((2, n, 16)).astype(np.float32) for n in (6, 5))
    params = random_like(jax.eval_shape(block.init, jax.random.key(2), x, context))
    apply = jax.jit(lambda context: block.apply(params, x, context)[0])
    out = apply(context)
    order = np.array([3, 0, 4, 1, 2])
    assert_close(apply(context[:, order]), out, 1e-6)
    for changed in (context[:, :4], context[:, ::-1] + 1, context[::-1]):
        assert np.abs(apply(changed) - out).max() > 0.01
    repeated = np.concatenate([context, context], axis=1)  # each token has half its weight, twice
    assert_close(apply(repeated), out, 1e-6)
