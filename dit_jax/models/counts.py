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

    A context counts as CLIP's 77 tokens, without the work of the frozen encoder. A caption encoder
    that is trained with the model counts with its text_length tokens.
    Returns: params; gmacs, 1e9 multiply-adds of one forward pass (for a VAE encode_gmacs and
      decode_gmacs); gflops = 2 gmacs; for models that are trained train_gflops_per_image =
      3 gflops. A DiT also has tokens, and params_with_pos_embed, the published count.
    Raises: as `registry.build`.
    """
    model_config = config.model.copy_and_resolve_references()
    if "attention" in model_config:
        model_config.attention = "xla"  # the same products, and needs no GPU
    if "scan_unroll" in model_config:
        model_config.scan_unroll = False  # the same products, but traces one block only
    model = registry.build(model_config)
    size = sizes.simplify(config.data.image_size) if model_config.name == "vae" else None
    counts = dict(_count(model, size))
    if model_config.name == "inception":
        del counts["train_gflops_per_image"]  # it is never trained here
    return counts


@functools.lru_cache(maxsize=256)
def _count(model, image_size):
    """Returns the counts of a model; only a VAE needs the size of an image."""
    shapes = jax.tree.leaves(registry.param_shapes(model))
    params = sum(math.prod(leaf.shape) for leaf in shapes)
    counts = {"params": params}
    if isinstance(model, vae.AutoencoderKL):
        image_shape = *sizes.sides(image_size), model.image_channels
        image = jnp.zeros((1, *image_shape))
        latent = jnp.zeros((1, *model.latent_shape(image_shape)))
        counts["encode_gmacs"] = _gmacs(model, image, method="encode")
        counts["decode_gmacs"] = _gmacs(model, latent, method="decode")
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
        counts["gmacs"] = gmacs = _gmacs(model, *inputs)
    # A backward pass has twice the products of a forward pass, so training has 3 x 2 gmacs.
    return counts | {"gflops": 2 * gmacs, "train_gflops_per_image": 6 * gmacs}


def _gmacs(model, *inputs, method=None):
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
        # A scan's body is traced once, but runs once for each of its steps.
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(count_products, _inner_jaxprs(equation.params)))
        output = math.prod(equation.outvars[0].aval.shape)
        shapes = [v.aval.shape for v in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += output * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            _, *window = equation.params["dimension_numbers"].rhs_spec  # without output channels
            total += output * math.prod(shapes[1][axis] for axis in window)
    return total


def _inner_jaxprs(params):
    """Yields the programs in the parameters of an equation."""
    for value in params.values():
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):  # as in jax.checkpoint
            yield value


def published_config(
    name: str, image_size: sizes.Size | None = None, block: str | None = None
) -> ConfigDict:
    """Returns `config.model` of a DiT of the paper or a preset UNet.

    Only the keys that counts depend on have published values.
    Args: image_size, 256 if None, and block, adaLN-Zero if None; both are for a DiT only.
    Raises: ValueError for an unknown name, an image size that its patches do not divide, or an
      image size or block for a UNet.
    """
    if name in unet_presets.PRESETS:
        if image_size is not None or block is not None:
            raise UserError(
                f"{name} is a UNet, of the one size that its name says: image_size={image_size}, "
                f"block={block} are of a DiT. For another UNet give --config."
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
    unit = VAE_FACTOR * fields["patch_size"]
    if min(height, width) <= 0 or height % unit or width % unit:
        raise UserError(
            f"{image_size=} must be a multiple of {unit}: the VAE's 8 x the patch size."
        )
    model = default.get_config("dit").model.unlock()
    input_size = height // VAE_FACTOR, width // VAE_FACTOR
    model.update(input_size=input_size, block=block or "adaLN-Zero", **fields)
    return model


def count_names(
    names: list[str], image_size: sizes.Size | None = None, block: str | None = None
) -> dict[str, dict[str, int | float]]:
    """Returns counts by name; arguments as `published_config`.

    An empty list stands for all DiTs of the paper and all preset UNets. With an image size or a
    block it stands for the DiTs only.
    """
    only_dits = image_size is not None or block is not None
    all_names = [f"DiT-{size}/{patch}" for size in dit.SIZES for patch in (8, 4, 2)]
    all_names += [] if only_dits else list(unet_presets.PRESETS)
    configs = {name: published_config(name, image_size, block) for name in names or all_names}
    return {name: count(ConfigDict(dict(model=model))) for name, model in configs.items()}
