"""Published UNets by name, as fields of `config.model` without name, dtype, attention, remat."""

from dit_jax.errors import UserError

# Every UNet has these fields, but no preset trains a text encoder.
UNUSED_TEXT_FIELDS = dict(text_vocab_size=4096, text_length=32, text_depth=2, text_num_heads=4)
# The fields of most UNets; each preset below changes some of them.
_COMMON = UNUSED_TEXT_FIELDS | dict(
    in_channels=3,
    blocks_per_level=2,
    transformer_depth=0,
    num_heads=0,
    head_dim=0,
    context_size=0,
    time_scale_shift=False,
    resample="conv",
    norm_groups=32,
    norm_epsilon=1e-5,
    dropout=0.0,
    condition="label",
    num_classes=0,
    null_condition=False,
    learn_sigma=False,
)
_ADM = _COMMON | dict(
    head_dim=64,
    time_scale_shift=True,
    resample="resnet",
    num_classes=1000,
    learn_sigma=True,
)
# Latent diffusion and Stable Diffusion.
_LATENT = _COMMON | dict(
    in_channels=4,
    input_size=64,
    base_channels=320,
    channel_mult=(1, 2, 4, 4),
    attention_levels=(0, 1, 2),
    transformer_depth=1,
    condition="context",
    null_condition=True,
)
# The comments count parameters.
PRESETS = {
    # Ho et al. 2020, appendix B: 35,746,307 parameters. The published code has sines before cosines
    # and other frequencies, and pads strided convolutions only at the bottom and the right.
    "ddpm-cifar10": _COMMON
    | dict(
        input_size=32,
        base_channels=128,
        channel_mult=(1, 2, 2, 2),
        attention_levels=(1,),
        num_heads=1,
        norm_epsilon=1e-6,
        dropout=0.1,
    ),
    # Dhariwal & Nichol 2021, table 11, and the flags of the published checkpoints: 295,904,454.
    "adm-imagenet64": _ADM
    | dict(
        input_size=64,
        base_channels=192,
        channel_mult=(1, 2, 3, 4),
        blocks_per_level=3,
        attention_levels=(1, 2, 3),
        dropout=0.1,
    ),
    # Dhariwal & Nichol 2021, in the same way: 553,838,086.
    "adm-imagenet256": _ADM
    | dict(
        input_size=256,
        base_channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        attention_levels=(3, 4, 5),
    ),
    # Rombach et al. 2022, LDM-4-G, with one head as in the published checkpoint's config:
    # 401,433,091, of which 512,512 embed the labels.
    "ldm4-imagenet256": _LATENT
    | dict(
        in_channels=3,
        base_channels=192,
        channel_mult=(1, 2, 3, 5),
        attention_levels=(1, 2, 3),
        num_heads=1,
        context_size=512,
        condition="label",
        num_classes=1000,
    ),
    # Stable Diffusion 1.1 to 1.5: 859,520,964.
    "sd15-unet": _LATENT | dict(num_heads=8, context_size=768),
    # Stable Diffusion 2.0 and 2.1: 865,910,724.
    "sd2-unet": _LATENT | dict(head_dim=64, context_size=1024),
    # For the digits, tests and CPUs: 702,753.
    "unet-tiny": _COMMON
    | dict(
        input_size=8,
        in_channels=1,
        base_channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_levels=(1,),
        num_heads=4,
        norm_groups=8,
        num_classes=10,
        null_condition=True,
    ),
}


def get(name: str) -> dict:
    """Returns the config fields of a preset.   Raises: ValueError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown model {name!r}; the names are {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
