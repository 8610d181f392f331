"""Noise predictors, autoencoders, LPIPS. Only `build` makes a module of a name."""

import flax.linen as nn
import jax

from dit_jax.models import dit, lpips, vae

BUILDERS = {"dit": dit.from_config, "vae": vae.from_config, "lpips": lpips.from_config}


def build(config) -> nn.Module:
    """The module of `config.model`: `build(config.model).apply({"params": params}, x_t, t, y)`.

    Raises: ValueError for an unknown `name` or for sizes that do not fit together.
    """
    if config.name not in BUILDERS:
        raise ValueError(f"unknown model name {config.name!r}; known: {', '.join(BUILDERS)}.")
    return BUILDERS[config.name](config)


def init_params(model: nn.Module, key: jax.Array) -> dict:
    """The model's initial parameters, f32; under `jax.eval_shape` only their shapes."""
    return model.init(key, *model.example_inputs())["params"]
