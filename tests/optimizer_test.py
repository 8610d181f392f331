"""Schedules at their corners, the update's parts, and the EMA's recursion."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from dit_jax import optimizer


@pytest.fixture
def optim():
    optim = default.get_config().optim
    optim.learning_rate = 1.0
    return optim


def test_constant_schedule_with_warmup(optim):
    optim.warmup_steps = 4
    rates = [float(optimizer.schedule(optim, 100)(step)) for step in (0, 1, 3, 4, 99)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 1, 1, 1])


def test_cosine_schedule_falls_to_zero_at_the_last_step(optim):
    optim.update(schedule="cosine", warmup_steps=10)
    rates = [float(optimizer.schedule(optim, 110)(step)) for step in (0, 9, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0.1, 1, 1, 0.5, 0], atol=1e-6)


def test_published_optimizer_is_plain_adam(optim):
    """First step of Adam: -lr g / (|g| + eps), with no decay and no clipping."""
    tx = optimizer.make_optimizer(optim, 100)
    params, grads = {"w": jnp.array([3.0, -5.0])}, {"w": jnp.array([1e-4, -20.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1.0, 1.0], rtol=1e-3)


def test_weight_decay_and_clipping(optim):
    optim.update(weight_decay=0.1, grad_clip_norm=1.0, learning_rate=0.5)
    tx = optimizer.make_optimizer(optim, 100)
    params, grads = {"w": jnp.array([3.0])}, {"w": jnp.array([0.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.5 * 0.1 * 3.0], rtol=1e-6)
    _, state = tx.update({"w": jnp.array([100.0])}, tx.init(params), params)
    mu = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(mu, [0.1 * 1.0], rtol=1e-6)  # (1 - b1) times the clipped gradient


def test_ema_follows_each_step_from_the_initial_weights():
    ema = {"w": jnp.array([1.0])}
    for value in (2.0, 3.0):
        ema = optimizer.update_ema(ema, {"w": jnp.array([value])}, 0.9)
    np.testing.assert_allclose(ema["w"], [0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(schedule="linear"), "schedule='linear'.*constant or cosine"),
        (dict(warmup_steps=100), "warmup_steps=100 must lie in"),
        (dict(learning_rate=0.0), "learning_rate=0.0 must be positive"),
        (dict(grad_clip_norm=-1.0), "grad_clip_norm=-1.0"),
        (dict(ema_decay=1.0), "ema_decay=1.0"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(optim, change, message):
    optim.update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.make_optimizer(optim, 100)
