"""The networks: DiT, UNet, VAE, CLIP's text transformer, feature extractors, LPIPS.

`build` makes the module of `config.model`; `count` returns its parameters and multiply-adds.
"""

from dit_jax.models.counts import count
from dit_jax.models.registry import (
    bind,
    build,
    check_keys,
    compiler_options,
    init_params,
    param_shapes,
)

__all__ = [
    "bind",
    "build",
    "check_keys",
    "compiler_options",
    "count",
    "init_params",
    "param_shapes",
]
