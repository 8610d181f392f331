"""The condition of a batch: its label, tokens or context, and their dropout in training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import models
from dit_jax.conditions import text_encoder
from dit_jax.models import conditioning

FEATURES = ("label", "tokens", "context")  # of a batch, as model.condition


def get_condition(batch: dict, resident: dict) -> jax.Array:
    """The condition of a batch: its one feature that is one; by 'record' out of `resident`."""
    if "record" in batch:
        return get_condition(
            {n: a[batch["record"]] for n, a in resident.items() if n in FEATURES}, {}
        )
    return next(batch[name] for name in reversed(FEATURES) if name in batch)


def drop(key: jax.Array, cond: jax.Array, prob: float, null: jax.Array | np.ndarray) -> jax.Array:
    """cond [B, ...], each row replaced by null [...] with the probability."""
    dropped = jax.random.bernoulli(key, prob, cond.shape[:1])
    dropped = dropped.reshape(-1, *(1,) * (cond.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null, cond.dtype)[None], cond)


def encode(
    model: nn.Module,
    params: dict,
    encoder: text_encoder.TextEncoder | None,
    cond: jax.Array,
    mesh: jax.sharding.Mesh,
) -> jax.Array:
    """A condition [B, ...] as the model takes it, computed once for all its calls."""
    if model.condition == "label" or cond.ndim == 3:
        return cond
    if model.condition == "tokens":
        return models.bind(conditioning.encoder(model), params["text_encoder"], mesh)(cond)
    return encoder(cond)
