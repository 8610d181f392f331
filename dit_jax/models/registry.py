"""The registry of networks. Only `build` turns the name of a model into a module."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from dit_jax.config import keys, ranges, sizes
from dit_jax.errors import UserError, check_choice
from dit_jax.models import clip, dinov2, dit, inception, lpips, unet, vae
from dit_jax.system import files

# Each takes a ConfigDict of its module's fields.
BUILDERS = {
    "dit": dit.from_config,
    "unet": unet.from_config,
    "vae": vae.from_config,
    "lpips": lpips.from_config,
    "inception": inception.from_config,
    "dinov2": dinov2.from_config,
    "clip": clip.from_config,
}

# Optional keys of `config.model` that are no fields of the module. A converted VAE has its
# publisher's scale and shift of latents.
OPTIONAL_KEYS = {"vae": ("scale", "shift")}


def build(config) -> nn.Module:
    """Builds the module of `config.model`.

    Use: `build(config.model).apply({"params": params}, x_t, t, y)`.

    Raises: ValueError for an unknown `name`, for keys that are missing, unknown or of another type,
      for a size out of its range, for sizes that do not fit together, or for an unknown choice.
    """
    check_keys(config)
    keys.check(config, "model")
    check_choice("dtype", config.dtype, ("float32", "bfloat16"))
    fields = {key: config[key] for key in _get_field_types(config.name)}
    for key, value in fields.items():
        if f"model.{key}" in sizes.KEYS:
            fields[key] = sizes.simplify(value)
        elif isinstance(value, list):
            fields[key] = tuple(value)  # JSON has lists, but a module must be hashable
    return BUILDERS[config.name](ConfigDict(fields))


def check_keys(config: ConfigDict | Mapping) -> None:
    """Raises ValueError unless `config.model` has exactly its model's keys, of the right types.

    Numbers may have any size, and the name of a choice may be unknown: `build` checks them.
    """
    name = config["name"]
    if name not in list(BUILDERS):  # a list, because the name may be unhashable
        known = ", ".join(BUILDERS)
        raise UserError(f"unknown model name {ranges.shorten(name)}; known: {known}.")
    types = _get_field_types(name)
    present = set(config) - {"name"}
    if missing := types.keys() - present:
        raise UserError(f"the model {name!r} needs {', '.join(sorted(missing))} too.")
    types |= {key: float for key in OPTIONAL_KEYS.get(name, ()) if key in present}
    if unknown := present - types.keys():
        names = files.list_some(sorted(unknown))
        raise UserError(f"the model {name!r} does not know {names}.")
    for key, expected_type in types.items():
        is_tuple = typing.get_origin(expected_type) is tuple
        if is_tuple:
            expected_type = typing.get_args(expected_type)[0]
        # In a config, one string chooses the attention of all levels of a UNet.
        takes_tuple = is_tuple and expected_type is not str
        keys.check_type(f"model.{key}", config[key], expected_type, takes_tuple)


def _get_field_types(name):
    """Returns {field: type} of the module that the builder of this name returns."""
    module = inspect.get_annotations(BUILDERS[name])["return"]
    types = dict(inspect.get_annotations(module))
    del types["parent"], types["name"]  # fields of every flax module
    return types


def init_params(model: nn.Module, key: jax.Array) -> dict:
    """Returns the model's initial parameters, f32; under `jax.eval_shape` only their shapes."""
    if hasattr(model, "scan_unroll"):
        # A loop gives the same numbers. Unrolled, the initialisation of DiT-XL/2 compiles for 37 s
        # on an H100.
        model = model.clone(scan_unroll=False)
    return model.init(key, *model.example_inputs())["params"]


def bind(model: nn.Module, params, mesh: jax.sharding.Mesh) -> Callable:
    """Returns `apply(*inputs)`: the model with these parameters, and its activations on the mesh.

    Options of `apply` are those of `Module.apply`, such as `rngs`. `sharding.pin_batch` pins
    activations only inside the context of the mesh.
    """

    def apply(*inputs, **options):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return model.apply({"params": params}, *inputs, **options)

    return apply


@functools.lru_cache(maxsize=64)
def param_shapes(model: nn.Module) -> dict:
    """Returns the shapes and dtypes of `init_params`, traced once for all equal models.

    The result is cached, so callers must not change it.
    """
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def compiler_options() -> dict[str, bool]:
    """Returns XLA's options on this backend, for a function that applies a transformer."""
    if jax.default_backend() != "gpu":
        return {}
    # Otherwise XLA reserves matrix products for Triton. Where cuBLAS then proves faster, it gets
    # the products without their bias and GELU, which are no longer fused.
    return {"xla_gpu_enable_triton_gemm": False}
