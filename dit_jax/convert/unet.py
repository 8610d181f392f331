"""Converter for diffusers' UNet2DConditionModel."""

import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import fields, parameters, weights
from dit_jax.models import unet_presets

# Values of the other fields that a config.json may leave out.
DEFAULTS = dict(
    sample_size=None,
    in_channels=4,
    out_channels=4,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    dropout=0.0,
    norm_num_groups=32,
    norm_eps=1e-5,
    cross_attention_dim=1280,
    transformer_layers_per_block=1,
    attention_head_dim=8,
)
# Fields about how an EMA was computed, which diffusers writes into the config of EMA weights.
EMA_FIELDS = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
# Field -> the values that this project's UNet supports; the first is the default.
CHOICES = dict(
    center_input_sample=(False,),
    flip_sin_to_cos=(True,),
    freq_shift=(0,),
    mid_block_type=("UNetMidBlock2DCrossAttn",),
    only_cross_attention=(False,),
    downsample_padding=(1,),
    mid_block_scale_factor=(1,),
    act_fn=("silu", "swish"),
    reverse_transformer_layers_per_block=(None,),
    encoder_hid_dim=(None,),
    encoder_hid_dim_type=(None,),
    num_attention_heads=(None,),
    dual_cross_attention=(False,),
    use_linear_projection=(False, True),  # a convolution of 1x1 is the same product
    class_embed_type=(None,),
    addition_embed_type=(None,),
    addition_time_embed_dim=(None,),
    num_class_embeds=(None,),
    upcast_attention=(False, True),  # here the softmax always is f32
    resnet_time_scale_shift=("default", "scale_shift"),
    resnet_skip_time_act=(False,),
    resnet_out_scale_factor=(1,),
    time_embedding_type=("positional",),
    time_embedding_dim=(None,),
    time_embedding_act_fn=(None,),
    timestep_post_act=(None,),
    time_cond_proj_dim=(None,),
    conv_in_kernel=(3,),
    conv_out_kernel=(3,),
    projection_class_embeddings_input_dim=(None,),
    attention_type=("default",),
    class_embeddings_concat=(False,),
    mid_block_only_cross_attention=(None, False),
    cross_attention_norm=(None,),
    addition_embed_type_num_heads=(64,),
)
# Fields where diffusers also allows a list with a number for each level. The numbers must be equal.
SAME_AT_ALL_LEVELS = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block")
# Field with a whole number above 0 -> its largest value.
COUNTS = dict(
    sample_size=4096,
    in_channels=1024,
    norm_num_groups=fields.MAX_SIZE,
    layers_per_block=32,
    cross_attention_dim=fields.MAX_SIZE,
    transformer_layers_per_block=32,
)
MAX_LEVELS = 8
BLOCK_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`."""
    return parameters.to_params(_flatten_projections(tensors), make_table(model_config))


def _flatten_projections(tensors):
    """Returns the arrays with Linears before and after the transformer blocks.

    Older files have convolutions of 1x1 there, which compute the same.
    """
    flat = dict(tensors)
    for name, array in tensors.items():
        if name.endswith(("proj_in.weight", "proj_out.weight")) and array.shape[2:] == (1, 1):
            flat[name] = array[:, :, 0, 0]
    return flat


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays."""
    return parameters.make_table(model_config, parameters.to_diffusers_name)


def read_model_config(source: pathlib.Path) -> ConfigDict:
    """Returns `config.model` from diffusers' config.json.

    Args:
      source: the directory, or a weights file in it.
    Raises: FileNotFoundError; ValueError for a whole pipeline or a UNet of another kind, with the
      unsupported fields; as `weights.find_config` and `fields.read`.
    """
    config = _read_fields(weights.find_config(source, "unet"))
    channels = config["block_out_channels"]
    num_heads, head_dim = _get_heads(config["attention_head_dim"], channels)
    model_config = dict(
        name="unet",
        input_size=config["sample_size"],
        in_channels=config["in_channels"],
        base_channels=channels[0],
        channel_mult=tuple(
            c / channels[0] if c % channels[0] else c // channels[0] for c in channels
        ),
        blocks_per_level=config["layers_per_block"],
        attention_levels=tuple(
            i for i, block in enumerate(config["down_block_types"]) if block.startswith("Cross")
        ),
        transformer_depth=config["transformer_layers_per_block"],
        num_heads=num_heads,
        head_dim=head_dim,
        context_size=config["cross_attention_dim"],
        time_scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
        resample="conv",
        norm_groups=config["norm_num_groups"],
        norm_epsilon=float(config["norm_eps"]),
        dropout=float(config["dropout"]),
        condition="context",
        num_classes=0,
        null_condition=True,
        **unet_presets.UNUSED_TEXT_FIELDS,  # nothing reads these with condition 'context'
        learn_sigma=config["out_channels"] != config["in_channels"],
        dtype="float32",
        attention="auto",
        remat="none",
    )
    return ConfigDict(model_config)


def _read_fields(path):
    """Returns the fields of config.json that describe the network, with supported values."""
    fields.refuse_pipeline(path.parent, "unet", "unet")
    config = fields.read(path, fields.CONFIG_DESCRIPTION.format("diffusers"))
    fields.check_class(path, config.get("_class_name"), ["UNet2DConditionModel"])
    # Fields that do not describe the network are left out. Any other unknown field is refused,
    # since it may change what the network computes.
    config = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in EMA_FIELDS
    }
    config = fields.complete(config, DEFAULTS, CHOICES)
    # A list of equal numbers is the same as the number.
    for name in SAME_AT_ALL_LEVELS:
        values = config[name]
        if isinstance(values, list) and values and values == values[:1] * len(values):
            config[name] = values[0]
    fields.check_supported(path, "a UNet", config, _list_unsupported(config))
    return config


def _list_unsupported(config):
    """Returns {field: supported values, as a text} of the fields with an unsupported value."""
    unsupported = fields.list_unsupported(config, COUNTS, CHOICES)
    unknown = config.keys() - DEFAULTS.keys() - CHOICES.keys()
    unsupported |= {name: "not this field" for name in unknown}
    if not (fields.is_number(config["norm_eps"]) and config["norm_eps"] > 0):
        unsupported["norm_eps"] = "a number above 0"
    if not (fields.is_number(config["dropout"]) and 0 <= config["dropout"] < 1):
        unsupported["dropout"] = "a number in [0, 1)"
    channels, block_types = config["block_out_channels"], config["down_block_types"]
    # Later checks need both lists, so an invalid list ends the checks.
    is_list = isinstance(channels, list) and 0 < len(channels) <= MAX_LEVELS
    if not is_list or not all(map(fields.is_count, channels)):
        unsupported["block_out_channels"] = f"a list of up to {MAX_LEVELS} numbers above 0"
        return unsupported
    is_list = isinstance(block_types, list) and len(block_types) == len(channels)
    if not is_list or not all(block_type in BLOCK_TYPES for block_type in block_types):
        unsupported["down_block_types"] = f"{' or '.join(BLOCK_TYPES)} for each level"
        return unsupported
    mirrored = [block_type.replace("Down", "Up") for block_type in reversed(block_types)]
    if config["up_block_types"] != mirrored:
        unsupported["up_block_types"] = f"down_block_types in reverse, {mirrored}"
    if _get_heads(config["attention_head_dim"], channels) is None:
        unsupported["attention_head_dim"] = (
            "the same number of heads, or width of heads, at all levels"
        )
    # Compared only when both are valid numbers.
    in_channels, out_channels = config["in_channels"], config["out_channels"]
    if not unsupported and out_channels not in (in_channels, 2 * in_channels):
        unsupported["out_channels"] = "in_channels, or twice that"
        if in_channels == 9:
            unsupported["in_channels"] = "out_channels, without an inpainting UNet's mask and image"
    return unsupported


def _get_heads(attention_head_dim, channels):
    """Returns (num_heads, 0) or (0, head_dim), the one that is the same at all levels.

    None if neither is. diffusers' attention_head_dim is the number of heads in this model.
    """
    head_counts = attention_head_dim
    if not isinstance(head_counts, list):
        head_counts = [head_counts] * len(channels)
    if len(head_counts) != len(channels) or not all(map(fields.is_count, head_counts)):
        return None
    if len({*head_counts}) == 1:
        return head_counts[0], 0
    head_dims = {width / heads for width, heads in zip(channels, head_counts, strict=True)}
    return (0, int(head_dims.pop())) if len(head_dims) == 1 else None
