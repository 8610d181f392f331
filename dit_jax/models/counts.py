"""Counts of a model's parameters, tokens and multiply-adds, from its traced forward pass."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import default
from dit_jax.config import sizes
from dit_jax.errors import UserError
from dit_jax.models import dit, registry, unet_presets, vae

CLIP_LENGTH = 77  # tokens of any caption in CLIP
VAE_FACTOR = 8  # pixels per latent, along a side, in the published models


def count(config) -> dict[str, int | float]:
    """Returns the counts of a config's model, for one image.

    A frozen text encoder is not counted; its context has CLIP's 77 tokens. A text encoder that is
    trained with the model is counted, with text_length tokens.
    Returns: params; gmacs, 1e9 multiply-adds of one forward pass, or encode_gmacs and decode_gmacs
      of a VAE; gflops = 2 gmacs; train_gflops_per_image = 3 gflops if the model is trained; tokens
      and params_with_pos_embed, the published number, of a DiT.
    Raises: as `registry.build`.
    """
    model_config = config.model.copy_and_resolve_references()
    if "attention" in model_config:
        model_config.attention = "xla"  # the same products, and needs no GPU
    if "scan_unroll" in model_config:
        model_config.scan_unroll = False  # the same products, but only one block is traced
    model = registry.build(model_config)
    size = sizes.simplify(config.data.image_size) if model_config.name == "vae" else None
    counts = dict(_count(model, size))
    if model_config.name == "inception":
        del counts["train_gflops_per_image"]  # Inception is never trained here
    return counts


@functools.lru_cache(maxsize=256)
def _count(model, image_size):
    """Returns the counts of a model; image_size is for a VAE, else None."""
    shapes = jax.tree.leaves(registry.param_shapes(model))
    params = sum(math.prod(leaf.shape) for leaf in shapes)
    counts = {"params": params}
    if isinstance(model, vae.AutoencoderKL):
        image_shape = *sizes.sides(image_size), model.image_channels
        image = jnp.zeros((1, *image_shape))
        latent = jnp.zeros((1, *model.latent_shape(image_shape)))
        counts["encode_gmacs"] = _count_gmacs(model, image, method="encode")
        counts["decode_gmacs"] = _count_gmacs(model, latent, method="decode")
        gmacs = counts["encode_gmacs"] + counts["decode_gmacs"]
    else:
        inputs = list(model.example_inputs())
        if getattr(model, "condition", None) == "context":
            inputs[-1] = jnp.zeros((1, CLIP_LENGTH, model.context_size))
        if isinstance(model, dit.DiT):
            height, width, _ = sizes.input_shape(model)
            tokens = height * width // model.patch_size**2
            counts["params_with_pos_embed"] = params + tokens * model.hidden_size
            counts["tokens"] = tokens
        counts["gmacs"] = gmacs = _count_gmacs(model, *inputs)
    # A backward pass has twice the products of a forward pass, so training has 3 x 2 gmacs.
    return counts | {"gflops": 2 * gmacs, "train_gflops_per_image": 6 * gmacs}


def _count_gmacs(model, *inputs, method=None):
    """Returns the multiply-adds of a forward pass, in units of 1e9."""

    def forward(params, *inputs):
        return model.apply({"params": params}, *inputs, method=method)

    jaxpr = jax.make_jaxpr(forward)(registry.param_shapes(model), *inputs)
    return count_products(jaxpr.jaxpr) / 1e9


def count_products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Returns the multiply-adds of a program's matrix products and convolutions.

    Products with the padding of convolutions are counted too.
    """
    total = 0
    for equation in jaxpr.eqns:
        # The body of a scan is traced once, but runs `length` times.
        num_runs = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += num_runs * sum(map(count_products, _find_inner_jaxprs(equation.params)))
        output_size = math.prod(equation.outvars[0].aval.shape)
        shapes = [operand.aval.shape for operand in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted_axes, _), _ = equation.params["dimension_numbers"]
            total += output_size * math.prod(shapes[0][axis] for axis in contracted_axes)
        elif equation.primitive.name == "conv_general_dilated":
            _, *kernel_axes = equation.params["dimension_numbers"].rhs_spec  # without the outputs
            total += output_size * math.prod(shapes[1][axis] for axis in kernel_axes)
    return total


def _find_inner_jaxprs(params):
    """Yields the programs in the parameters of an equation."""
    for value in params.values():
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):  # as in jax.checkpoint
            yield value


def make_published_config(
    name: str, image_size: sizes.Size | None = None, block: str | None = None
) -> ConfigDict:
    """Returns `config.model` of a DiT of the paper or a preset UNet.

    Only the keys that counts depend on have published values.
    Args: image_size, block, both for a DiT only; None stands for 256 and adaLN-Zero.
    Raises: ValueError for an unknown name, an image size that is not a multiple of the patch, or an
      image size or block for a UNet.
    """
    if name in unet_presets.PRESETS:
        if image_size is not None or block is not None:
            raise UserError(
                f"{name} is a UNet of fixed size, but {image_size=} and {block=} are for a DiT. "
                "Leave them out, or give --config for another UNet."
            )
        model = default.get_config("unet").model.unlock()
        model.update(unet_presets.get(name))
        return model
    if not name.startswith("DiT-"):
        raise UserError(
            f"unknown model {name!r}; the names are DiT-{{{','.join(dit.SIZES)}}}/PATCH, "
            f"{', '.join(unet_presets.PRESETS)}."
        )
    image_size = 256 if image_size is None else image_size
    height, width = sizes.height_and_width(image_size)
    fields = dit.parse_name(name)
    patch_pixels = VAE_FACTOR * fields["patch_size"]  # along a side
    if min(height, width) <= 0 or height % patch_pixels or width % patch_pixels:
        raise UserError(
            f"{image_size=} must be a multiple of {patch_pixels}: the VAE's 8 x the patch size."
        )
    model = default.get_config("dit").model.unlock()
    input_size = height // VAE_FACTOR, width // VAE_FACTOR
    model.update(input_size=input_size, block=block or "adaLN-Zero", **fields)
    return model


def count_names(
    names: list[str], image_size: sizes.Size | None = None, block: str | None = None
) -> dict[str, dict[str, int | float]]:
    """Returns the counts of models by name; arguments as `make_published_config`.

    An empty list stands for all DiTs of the paper and all preset UNets; with an image size or a
    block, for the DiTs alone.
    """
    only_dits = image_size is not None or block is not None
    all_names = [f"DiT-{size}/{patch}" for size in dit.SIZES for patch in (8, 4, 2)]
    all_names += [] if only_dits else list(unet_presets.PRESETS)
    configs = {name: make_published_config(name, image_size, block) for name in names or all_names}
    return {name: count(ConfigDict(dict(model=model))) for name, model in configs.items()}
