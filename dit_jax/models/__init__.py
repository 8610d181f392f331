"""Noise predictors. `build` is the only place where a name becomes a module."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models import dit

BUILDERS = {"dit": dit.from_config}


def build(config) -> nn.Module:
    """The module of `config.model`: `build(config.model).apply({"params": params}, x_t, t, y)`.

    Raises: ValueError for an unknown `name` or for sizes that do not fit together.
    """
    if config.name not in BUILDERS:
        raise ValueError(f"unknown model name {config.name!r}; known: {', '.join(BUILDERS)}.")
    return BUILDERS[config.name](config)


def init_params(model: nn.Module, key: jax.Array) -> dict:
    """The model's initial parameters, f32; under `jax.eval_shape` only their shapes."""
    x_t = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    return model.init(key, x_t, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
