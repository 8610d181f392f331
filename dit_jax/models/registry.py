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

# Optional keys of `config.model` that are no fields of the module: a converted VAE has the scale
# and shift of latents that its publisher uses.
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
    fields = {key: config[key] for key in _field_types(config.name)}
    for key, value in fields.items():
        if f"model.{key}" in sizes.KEYS:
            fields[key] = sizes.simplify(value)
        elif isinstance(value, list):
            fields[key] = tuple(value)  # JSON has lists, but a module needs a hash
    return BUILDERS[config.name](ConfigDict(fields))


def check_keys(config: ConfigDict | Mapping) -> None:
    """Raises ValueError unless `config.model` has exactly its model's keys, of the right types.

    Numbers may have any size, and the name of a choice may be unknown: `build` checks these.
    """
    name = config["name"]
    if name not in list(BUILDERS):  # a list, as the name may be a value without a hash
        known = ", ".join(BUILDERS)
        raise UserError(f"unknown model name {ranges.shorten(name)}; known: {known}.")
    kinds = _field_types(name)
    given = set(config) - {"name"}
    if missing := kinds.keys() - given:
        raise UserError(f"the model {name!r} needs {', '.join(sorted(missing))} too.")
    kinds |= {key: float for key in OPTIONAL_KEYS.get(name, ()) if key in given}
    if unknown := given - kinds.keys():
        names = files.list_some(sorted(unknown))
        raise UserError(f"the model {name!r} does not know {names}.")
    for key, kind in kinds.items():
        is_tuple = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if is_tuple else kind
        # In a config, one text chooses the attention of all levels of a UNet.
        keys.check_type(f"model.{key}", config[key], kind, is_tuple and kind is not str)


def _field_types(name):
    """Returns {field: type} of the module that the builder of this name returns."""
    module = inspect.get_annotations(BUILDERS[name])["return"]
    types = dict(inspect.get_annotations(module))
    del types["parent"], types["name"]  # fields of every flax module
    return types


def init_params(model: nn.Module, key: jax.Array) -> dict:
    """Returns the model's initial parameters, f32; under `jax.eval_shape` only their shapes."""
    if hasattr(model, "scan_unroll"):
        # The numbers are the same. Unrolled, initialising DiT-XL/2 compiles for 37 s on an H100.
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
    # Otherwise XLA reserves matrix products for Triton. If cuBLAS is faster after all, it gets the
    # products without their bias and GELU, which are then no longer fused.
    return {"xla_gpu_enable_triton_gemm": False}
