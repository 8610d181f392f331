"""Configs beside weights: any contents are read or refused with a message."""

import json
import pathlib

import pytest
from helpers import bpe, published_configs

from dit_jax.convert import (
    clip,
    diffusers_dit,
    dinov2,
    fields,
    parameters,
    stable_diffusion,
    unet,
    vae,
)

WRONG_VALUES = [
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**18, 10**4000, 2**20),
    *("x\x1b[2J\n", "x" * 10**5, [], {}, [[[]]], [10**18], [None] * 1000, {"a": {"b": 1}}),
]
DINOV2 = dict(
    hidden_act="gelu",
    hidden_size=128,
    layer_norm_eps=1e-6,
    mlp_ratio=4,
    model_type="dinov2",
    num_attention_heads=2,
    patch_size=14,
    use_swiglu_ffn=False,
)
VAE = published_configs.VAE | dict(
    mid_block_add_attention=True,
    latents_mean=None,
    scaling_factor=0.5,
    shift_factor=0.1,
    use_post_quant_conv=True,
    use_quant_conv=True,
)
UNET = published_configs.UNET | dict(
    act_fn="silu", dropout=0.1, norm_eps=1e-5, resnet_time_scale_shift="default"
)
# Kind -> (a valid config, the function that reads it).
KINDS = {
    "clip": (
        {"architectures": ["CLIPTextModel"]} | published_configs.CLIP,
        lambda path: clip.read_model_config(path.parent),
    ),
    "CLIPModel": (
        {
            "architectures": ["CLIPModel"],
            "text_config": published_configs.CLIP,
            "text_config_dict": {},
        },
        lambda path: clip.read_model_config(path.parent),
    ),
    "dinov2": (DINOV2, lambda path: dinov2.read(path.parent)),
    "dit": (published_configs.DIT, lambda path: diffusers_dit.read_sizes(path.parent)),
    "scheduler": (published_configs.SCHEDULER, stable_diffusion.read_process),
    "unet": (UNET, lambda path: unet.read_model_config(path.parent)),
    "vae": (VAE, lambda path: vae.read_model_config(path.parent)),
}
FIELDS = [(kind, name) for kind, (config, _) in KINDS.items() for name in config]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_wrong_values_are_read_or_refused_with_a_message(kind, name, tmp_path):
    config, read = KINDS[kind]
    path = tmp_path / "config.json"
    for value in WRONG_VALUES:
        path.write_text(json.dumps(config | {name: value}))
        message = _read_error(read, path)
        assert message is None or str(tmp_path) in message
        assert message is None or message.replace("\n", "").isprintable(), value
        assert message is None or len(message) < 1500, value


def _read_error(read, path):
    """Returns the message of the error from reading, or None."""
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:  # there are no weights beside it
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config_json", "message"),
    [
        ("", "cannot read .*: it ends too early"),
        ("[]", "it holds a list instead of fields with names. It must be the"),
        ("null", "it holds a NoneType instead of fields"),
        ('{"a":' * 10**5, "nested more than 100 deep"),
        ('{"a": 1, "a": 2}', "the key 'a' is in one object twice"),
        ("\ufeff" + "[" * 200, "ends too early|nested"),
    ],
)
def test_damaged_config_is_refused_with_a_message(kind, config_json, message, tmp_path):
    (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(ValueError, match=message) as error:
        KINDS[kind][1](tmp_path / "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_shapes_of_the_largest_sizes_take_no_memory(kind, tmp_path):
    config, read = KINDS[kind]
    largest = dict(layers_per_block=8, block_out_channels=[2**20] * 2, in_channels=4)
    (tmp_path / "config.json").write_text(json.dumps(config | largest | {"out_channels": 4}))
    parameters.get_shapes(read(tmp_path / "config.json"))
    for name, value in (("layers_per_block", 33), ("block_out_channels", [8] * 9)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=name):
            read(tmp_path / "config.json")


def test_pipelines_are_refused_instead_of_a_part(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for kind in ("unet", "vae"):
        message = (
            rf"run `convert {kind} {tmp_path}/{kind} DST`\. .*run `convert sd {tmp_path} DST`\."
        )
        with pytest.raises(ValueError, match=message):
            KINDS[kind][1](tmp_path / "config.json")


def test_values_are_shown_in_one_short_line():
    assert fields.show("a\nb") == r"a\nb"
    assert fields.show({"a\x1b": [1.5]}) == r"{'a\x1b': [1.5]}"
    assert fields.show(["x"] * 10**6) == "['x', " + "'x', " * 58 + "'x',..."
    unsupported = {f"name{i}": "nothing" for i in range(100)}
    path = pathlib.Path("config.json")
    with pytest.raises(ValueError, match=r"^config\.json describes a DiT of another") as error:
        fields.check_supported(path, "a DiT", {"name1": "a\n"}, unsupported)
    _, *lines = str(error.value).splitlines()
    assert lines[1] == r"  name1='a\n'; supported: nothing"
    assert (len(lines), lines[-1]) == (21, "  and 80 more")


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, 2**20 + 1, None, "1", float("nan"), 10**4000])
def test_invalid_counts(value):
    assert not fields.is_count(value)
    assert fields.is_count(1)
    assert fields.is_count(2**20)


@pytest.mark.parametrize(
    "value", [True, None, "1", float("nan"), float("-inf"), 10**400, -(10**31)]
)
def test_invalid_numbers(value):
    assert not fields.is_number(value)
    assert fields.is_number(-1.5)
    assert fields.is_number(0)


@pytest.mark.parametrize("pad", [7, ["!"], {"content": None}, {"content": {"a": "!"}}])
def test_padding_token_that_is_no_text_is_refused(pad, tmp_path):
    bpe.write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    with pytest.raises(ValueError, match="has a pad_token that is no text: "):
        clip.read_tokenizer(tmp_path, published_configs.CLIP_CONFIG)
