"""The condition of a batch: its label, tokens or context, and their dropout in training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import models
from dit_jax.conditions import text_encoder
from dit_jax.models import conditioning

FEATURES = ("label", "tokens", "context")  # of a batch, as model.condition


def get_condition(batch: dict, records: dict | None = None) -> jax.Array:
    """The batch's context, tokens or label; looked up in records where it holds their numbers."""
    if "record" in batch:
        batch = {name: records[name][batch["record"]] for name in FEATURES if name in records}
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
