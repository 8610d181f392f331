"""Noise predictors, autoencoders, LPIPS, features, text. Only `build` makes a module of a name."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from dit_jax.config import ranges, sizes
from dit_jax.errors import UserError
from dit_jax.models import clip, dinov2, dit, inception, lpips, unet, vae
from dit_jax.system import files, forms

BUILDERS = {
    "dit": dit.from_config,
    "unet": unet.from_config,
    "vae": vae.from_config,
    "lpips": lpips.from_config,
    "inception": inception.from_config,
    "dinov2": dinov2.from_config,
    "clip": clip.from_config,
}

BESIDE = {"vae": ("scale", "shift")}  # keys that are of a model's outputs, where they are published


def build(config) -> nn.Module:
    """The module of `config.model`: `build(config.model).apply({"params": params}, x_t, t, y)`.

    Raises: ValueError for an unknown `name`, for keys that are missing, unknown or of another type,
      for a size out of its range, or for sizes that do not fit together.
    """
    check_keys(config)
    ranges.check(config, "model")
    return BUILDERS[config.name](config)


def check_keys(config: ConfigDict | Mapping) -> None:
    """Demands the keys of a model in `config.model`, with values of their types.

    Numbers may have any size, and names of a choice may be unknown: `build` checks these.
    Raises: ValueError with the key.
    """
    name = config["name"]
    if name not in list(BUILDERS):  # a list compares what has no hash
        known = ", ".join(BUILDERS)
        raise UserError(f"unknown model name {forms.shorten(name)}; known: {known}.")
    module = typing.get_type_hints(BUILDERS[name])["return"]
    kinds = typing.get_type_hints(module)
    kinds = {field.name: kinds[field.name] for field in dataclasses.fields(module)}
    del kinds["parent"], kinds["name"]  # flax's own
    given = set(config) - {"name"}
    if missing := kinds.keys() - given:
        raise UserError(f"the model {name!r} needs {', '.join(sorted(missing))} too.")
    kinds |= {key: float for key in BESIDE.get(name, ()) if key in given}
    if unknown := given - kinds.keys():
        names = files.list_some(sorted(unknown))
        raise UserError(f"the model {name!r} does not know {names}.")
    for key, kind in kinds.items():
        if kind == sizes.Size:
            sizes.check_type(f"model.{key}", config[key])
            continue
        many = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if many else kind
        # One text chooses the attention of all levels.
        forms.check_type(f"model.{key}", config[key], kind, many and kind is not str)


def init_params(model: nn.Module, key: jax.Array) -> dict:
    """The model's initial parameters, f32; under `jax.eval_shape` only their shapes."""
    if hasattr(model, "scan_unroll"):
        # The same numbers; unrolled, DiT-XL/2's initialisation compiles for 37 s on an H100.
        model = model.clone(scan_unroll=False)
    return model.init(key, *model.example_inputs())["params"]


def bind(model: nn.Module, params, mesh: jax.sharding.Mesh, rngs: dict | None = None) -> Callable:
    """Returns `apply(*inputs)`, the model with these parameters and its activations on the mesh.

    Only under the mesh's context does `sharding.pin_batch` pin them.
    """

    def apply(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return model.apply({"params": params}, *inputs, rngs=rngs)

    return apply


@functools.lru_cache(maxsize=64)
def param_shapes(model: nn.Module) -> dict:
    """The shapes and types of `init_params`, traced once for all equal models. Do not change."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def compiler_options() -> dict[str, bool]:
    """What XLA is told, on the present backend, about a function that applies a transformer."""
    if jax.default_backend() != "gpu":
        return {}
    # XLA otherwise sets its products aside for Triton, and those that cuBLAS wins after all no
    # longer take bias and GELU with them.
    return {"xla_gpu_enable_triton_gemm": False}
