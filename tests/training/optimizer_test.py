"""Schedules at their corners, the update's parts by width, and the EMA's recursion."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.close import assert_close, assert_trees_close

from configs import default, smoke
from dit_jax import models, train
from dit_jax.models import conditioning
from dit_jax.training import optimizer, programs


@pytest.fixture
def optim():
    optim = default.get_config().optim
    optim.learning_rate = 1.0
    return optim


def test_constant_schedule_with_warmup(optim):
    optim.warmup_steps = 4
    rates = [float(optimizer.schedule(optim, 100)(step)) for step in (0, 1, 3, 4, 99)]
    assert_close(rates, [0.25, 0.5, 1, 1, 1], 1e-7)


def test_cosine_schedule_falls_to_zero_at_the_last_step(optim):
    optim.update(schedule="cosine", warmup_steps=10)
    rates = [float(optimizer.schedule(optim, 110)(step)) for step in (0, 9, 10, 60, 110)]
    assert_close(rates, [0.1, 1, 1, 0.5, 0], 1e-6)


def test_published_optimizer_is_plain_adam(optim):
    """First step of Adam: -lr g / (|g| + eps), with no decay and no clipping."""
    tx = optimizer.make_optimizer(optim, 100)
    params, grads = {"w": jnp.array([3.0, -5.0])}, {"w": jnp.array([1e-4, -20.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates["w"], [-1.0, 1.0], 1e-3)


def test_weight_decay_and_clipping(optim):
    optim.update(weight_decay=0.1, grad_clip_norm=1.0, learning_rate=0.5)
    tx = optimizer.make_optimizer(optim, 100)
    params, grads = {"w": jnp.array([3.0])}, {"w": jnp.array([0.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates["w"], [-0.5 * 0.1 * 3.0], 1e-6)
    _, state = tx.update({"w": jnp.array([100.0])}, tx.init(params), params)
    mu = optax.tree_utils.tree_get(state, "mu")["w"]
    assert_close(mu, [0.1 * 1.0], 1e-6)  # (1 - b1) times the clipped gradient


def test_ema_follows_each_step_from_the_initial_weights():
    ema = {"w": jnp.array([1.0])}
    for value in (2.0, 3.0):
        ema = optimizer.update_ema(ema, {"w": jnp.array([value])}, 0.9)
    assert_close(ema["w"], [0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3], 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="adam"), "unknown optim.name='adam'; choose one of adamw"),
        (dict(schedule="linear"), "schedule='linear'; choose one of constant, cosine"),
        (dict(warmup_steps=100), "warmup_steps=100 must be in"),
        (dict(learning_rate=0.0), "optim.learning_rate=0.0 must be a number in"),
        (dict(learning_rate=1e30), "optim.learning_rate=1e[+]30 must be .* 100"),
        (dict(learning_rate=0.5, weight_decay=2.0), "0.5 times .*=2.0 must be below 1: .* share"),
        (dict(eps=0.0), "optim.eps=0 gives NaN for parameters without a gradient"),
        (dict(grad_clip_norm=-1.0), "grad_clip_norm=-1.0"),
        (dict(ema_decay=1.0), "ema_decay=1.0"),
        (dict(mup_base_width=-64), "optim.mup_base_width=-64 must be"),
        (dict(mup_base_width=64), "mup_base_width=64 .* model.hidden_size, a key that this model"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(optim, change, message):
    optim.update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.make_optimizer(optim, 100)


# Of configs/smoke.py, whether its input grows with hidden_size.
GROWS = {
    "x_embedder/kernel": False,
    "x_embedder/bias": False,
    "t_embedder/mlp_0/kernel": False,
    "t_embedder/mlp_0/bias": False,
    "t_embedder/mlp_2/kernel": True,
    "t_embedder/mlp_2/bias": False,
    "y_embedder/embedding": False,
    "blocks/adaLN_modulation/kernel": True,
    "blocks/adaLN_modulation/bias": False,
    "blocks/attn/qkv/kernel": True,
    "blocks/attn/qkv/bias": False,
    "blocks/attn/proj/kernel": True,
    "blocks/attn/proj/bias": False,
    "blocks/mlp/fc1/kernel": True,
    "blocks/mlp/fc1/bias": False,
    "blocks/mlp/fc2/kernel": True,
    "blocks/mlp/fc2/bias": False,
    "final_layer/adaLN_modulation/kernel": True,
    "final_layer/adaLN_modulation/bias": False,
    "final_layer/linear/kernel": True,
    "final_layer/linear/bias": False,
}


def _shapes(hidden_size, condition="label"):
    config = smoke.get_config().model
    config.update(hidden_size=hidden_size, condition=condition, context_size=16)
    return models.param_shapes(models.build(config))


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def _random(shapes, seed):
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return tree.unflatten([rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def test_matrices_whose_input_grows_learn_slower_in_wider_models():
    factors = _by_path(optimizer.width_factors(_shapes(32), 0.25))
    assert factors == {path: 0.25 if grows else 1.0 for path, grows in GROWS.items()}


@pytest.mark.parametrize("condition", conditioning.KINDS)
def test_factors_are_of_the_kernels_whose_first_axis_grows(condition):
    """The first of an application: that of the stack of blocks comes before it."""
    narrow, wide = (_by_path(_shapes(size, condition)) for size in (32, 64))
    assert ("context_embedder/kernel" in narrow) == conditioning.KINDS[condition].is_sequence
    for path, factor in _by_path(optimizer.width_factors(_shapes(32, condition), 0.25)).items():
        axis = path.startswith("blocks/")
        grows = path.endswith("kernel") and wide[path].shape[axis] > narrow[path].shape[axis]
        assert factor == (0.25 if grows else 1.0), path


def test_first_step_is_as_large_as_the_factor(optim):
    """First step of Adam: -lr factor sign(g), for any |g|, clipped or not."""
    optim.update(learning_rate=0.5, mup_base_width=8, grad_clip_norm=1.0)
    tx = optimizer.make_optimizer(optim, 100, hidden_size=32)
    params, grads = _random(_shapes(32), 0), _random(_shapes(32), 1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    signs = _by_path(jax.tree.map(np.sign, grads))
    for path, update in _by_path(updates).items():
        size = 0.5 * (8 / 32 if GROWS[path] else 1)
        median = np.median(np.asarray(update) * signs[path])  # not of a gradient near eps
        assert_trees_close({path: median}, {path: -size}, 1e-3)


def test_weight_decay_is_scaled_along(optim):
    optim.update(weight_decay=0.1, learning_rate=0.5, mup_base_width=8)
    tx = optimizer.make_optimizer(optim, 100, hidden_size=32)
    params = _random(_shapes(32), 0)
    grads = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)
    for path, param in _by_path(params).items():
        size = 0.5 * 0.1 * (8 / 32 if GROWS[path] else 1)
        assert_close(_by_path(updates)[path], -size * np.asarray(param), 1e-6)


@pytest.mark.parametrize("base_width", [0, 32])
def test_off_and_at_the_base_width_it_is_adamw_to_the_bit(optim, base_width):
    optim.update(weight_decay=0.1, learning_rate=0.3, mup_base_width=base_width)
    tx = optimizer.make_optimizer(optim, 100, hidden_size=32)
    plain = optax.adamw(optax.constant_schedule(0.3), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    params = _random(_shapes(32), 0)
    state = plain_state = plain.init(params)
    for seed in (1, 2, 3):
        grads = _random(_shapes(32), seed)
        updates, state = tx.update(grads, state, params)
        expected, plain_state = plain.update(grads, plain_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        jax.tree.map(np.testing.assert_array_equal, state, plain_state)


@pytest.mark.parametrize("grad_clip_norm", [0.0, 1.0])
def test_state_is_that_of_a_run_without_it(smoke_config, grad_clip_norm):
    """Each leaf with its sharding."""
    smoke_config.mesh.update(data=1, fsdp=8)
    smoke_config.optim.grad_clip_norm = grad_clip_norm
    without = programs.make_program(smoke_config).state
    smoke_config.optim.mup_base_width = 8
    assert programs.make_program(smoke_config).state == without


def test_a_vae_has_no_width():
    config = default.get_config("vae")
    config.optim.mup_base_width = 64
    with pytest.raises(ValueError, match="a key that this model lacks"):
        programs.make_program(config)


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(smoke_config, tmp_path):
    smoke_config.update(total_steps=4, log_every_steps=1, eval_every_steps=0, sample_every_steps=0)
    smoke_config.model.update(depth=1, scan_unroll=False)
    smoke_config.optim.update(
        mup_base_width=8, schedule="constant", warmup_steps=0, learning_rate=2e-3
    )
    whole = train.train_and_evaluate(smoke_config, tmp_path / "whole")
    smoke_config.total_steps = 2
    train.train_and_evaluate(smoke_config, tmp_path / "broken")
    smoke_config.total_steps = 4
    broken = train.train_and_evaluate(smoke_config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, broken, whole)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert_close(rates, [2e-3] * 4, 1e-6)  # the base one
