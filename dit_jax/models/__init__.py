"""Noise predictors, autoencoders, LPIPS, features, text. Only `build` makes a module of a name."""

import flax.linen as nn
import jax

from dit_jax.models import clip, dinov2, dit, inception, lpips, unet, vae

BUILDERS = {
    "dit": dit.from_config,
    "unet": unet.from_config,
    "vae": vae.from_config,
    "lpips": lpips.from_config,
    "inception": inception.from_config,
    "dinov2": dinov2.from_config,
    "clip": clip.from_config,
}


# Sizes of a model's config, and the least that they may be.
LEAST = {"hidden_size": 1, "patch_size": 1, "depth": 0, "latent_channels": 1, "norm_groups": 1}


def build(config) -> nn.Module:
    """The module of `config.model`: `build(config.model).apply({"params": params}, x_t, t, y)`.

    Raises: ValueError for an unknown `name` or for sizes that do not fit together.
    """
    if config.name not in BUILDERS:
        raise ValueError(f"unknown model name {config.name!r}; known: {', '.join(BUILDERS)}.")
    least = LEAST | ({"num_heads": 1} if config.name == "dit" else {})  # a UNet may have head_dim
    for key in least.keys() & config.keys():
        if config[key] < least[key]:
            raise ValueError(f"model.{key}={config[key]} must be at least {least[key]}.")
    if config.get("mlp_ratio", 1.0) <= 0:
        raise ValueError(f"model.mlp_ratio={config.mlp_ratio} must be above 0.")
    return BUILDERS[config.name](config)


def init_params(model: nn.Module, key: jax.Array) -> dict:
    """The model's initial parameters, f32; under `jax.eval_shape` only their shapes."""
    if hasattr(model, "scan_unroll"):
        # The same numbers; unrolled, DiT-XL/2's initialisation compiles for 37 s on an H100.
        model = model.clone(scan_unroll=False)
    return model.init(key, *model.example_inputs())["params"]


def compiler_options() -> dict[str, bool]:
    """What XLA is told, on the present backend, about a function that applies a transformer."""
    if jax.default_backend() != "gpu":
        return {}
    # XLA otherwise sets its products aside for Triton, and those that cuBLAS wins after all no
    # longer take bias and GELU with them.
    return {"xla_gpu_enable_triton_gemm": False}
