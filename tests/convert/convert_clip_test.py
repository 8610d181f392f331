"""CLIP's text transformer from transformers' files: names, sizes and tokenizer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from helpers import bpe, published_configs, published_files
from ml_collections import ConfigDict

from dit_jax import convert
from dit_jax.data import text

# Arrays of a whole CLIP outside of the text transformer.
OTHER_SHAPES = {
    "vision_model.embeddings.class_embedding": (16,),
    "vision_model.embeddings.position_ids": (1, 5),
    "vision_model.encoder.layers.0.mlp.fc1.bias": (48,),
    "visual_projection.weight": (8, 16),
    "text_projection.weight": (8, 16),
    "logit_scale": (),
}


@pytest.fixture(scope="module")
def golden():
    """A tiny CLIPTextModel of transformers 5.23: parameters, tokens, and its last hidden states.

    'gelu' has the other activation, 'skipped' the final LayerNorm after the last layer but one.
    """
    with np.load(GOLDENS / "clip_tiny_reference.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def published():
    return published_files.read_golden("clip")


@pytest.fixture(scope="module")
def params(published):
    return jax.tree.map(jnp.asarray, convert.load("clip", published, published_configs.CLIP_CONFIG))


def _changed(**changes):
    return ConfigDict(published_configs.CLIP_CONFIG.to_dict() | changes)


def _error(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def _write(directory, tensors, class_name="CLIPTextModel", **changes):
    """Writes the arrays as transformers does, and returns the directory."""
    sizes = published_configs.CLIP | changes
    config = {"text_config": sizes} if class_name == "CLIPModel" else sizes
    config = {"architectures": [class_name]} | config
    return published_files.write(directory, tensors, config, "model.safetensors")


@pytest.fixture
def text_encoder_dir(published, tmp_path):
    """The directory of the text model in a Stable Diffusion, with the tokenizer beside it."""
    bpe.write(tmp_path / "sd" / "tokenizer")
    (tmp_path / "sd" / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    return _write(tmp_path / "sd" / "text_encoder", published)


def test_axes_of_published_arrays(params, published):
    """Compares single entries; the recorded output shows that all are right."""
    layers = params["encoder_layers"]
    assert layers["self_attn"]["k_proj"]["kernel"].shape == (3, 16, 16)
    for entry, name in (
        (layers["self_attn"]["k_proj"]["kernel"][1, 5, 9], "layers.1.self_attn.k_proj.weight"),
        (layers["mlp"]["fc2"]["kernel"][2, 5, 9], "layers.2.mlp.fc2.weight"),
    ):
        assert entry == published[f"text_model.encoder.{name}"][9, 5]


def test_workdir_has_parameters_config_and_tokenizer(text_encoder_dir, golden, tmp_path):
    config = convert.to_workdir("clip", text_encoder_dir, tmp_path / "workdir")
    assert config.model.to_dict() == published_configs.CLIP_CONFIG.to_dict()
    tokenizer = text.load_tokenizer(tmp_path / "workdir")
    assert (tokenizer.length, tokenizer.vocab_size) == (12, 535)
    tokens = tokenizer(["the cat's on", ""])
    np.testing.assert_array_equal(tokens[:, 5:], [[534] + [0] * 6, [0] * 7])  # pad "!"
    padded_with_end = np.where(tokens == 0, 534, tokens)
    np.testing.assert_array_equal(padded_with_end, golden["tokens"][:2])
    model, params = published_files.restore(tmp_path / "workdir", "clip")
    actual = jax.jit(model.apply)({"params": params}, padded_with_end)
    assert _error(actual, golden["quick_gelu"][:2]) < 1e-5


@pytest.mark.parametrize(
    ("config", "older", "pad"),
    [
        ({"pad_token": text.END}, {"pad_token": "!"}, "!"),
        ({"pad_token": "!"}, {"eos_token": text.END}, "!"),
        ({"pad_token": {"content": "!"}, "added_tokens_decoder": {}}, {"pad_token": text.END}, "!"),
        (None, {"pad_token": {"content": "!"}}, "!"),
        (None, None, text.END),
    ],
)
def test_padding_token_is_read_from_the_files(config, older, pad, tmp_path):
    bpe.write(tmp_path)
    for name, contents in (("tokenizer_config.json", config), ("special_tokens_map.json", older)):
        if contents is not None:
            (tmp_path / name).write_text(json.dumps(contents))
    tokenizer = convert.clip.read_tokenizer(tmp_path, published_configs.CLIP_CONFIG)
    assert tokenizer([""])[0, -1] == bpe.VOCAB[pad]


def test_command_leaves_out_the_last_layers(golden, run_command, text_encoder_dir, tmp_path):
    workdir = tmp_path / "workdir"
    out = run_command("convert", "clip", text_encoder_dir, workdir, "--skip_layers=1")
    assert out == f"{workdir}: {json.dumps(_changed(depth=2).to_dict())}\n"
    assert text.load_tokenizer(workdir).length == 12
    model, params = published_files.restore(workdir, "clip")
    assert (
        _error(jax.jit(model.apply)({"params": params}, golden["tokens"]), golden["skipped"]) < 1e-5
    )
    for skip_layers in (3, -1):
        with pytest.raises(
            ValueError, match=rf"{skip_layers=} must be in 0..2: .*config.json has 3"
        ):
            convert.to_workdir("clip", text_encoder_dir, tmp_path / "none", skip_layers=skip_layers)


@pytest.mark.parametrize(
    ("class_name", "other_names"),
    [
        ("CLIPTextModel", {}),
        ("CLIPTextModelWithProjection", {"text_projection.weight"}),
        ("CLIPModel", OTHER_SHAPES.keys()),
    ],
)
def test_other_arrays_of_each_class_are_ignored(
    class_name, other_names, published, params, tmp_path
):
    tensors = published | {name: np.ones(OTHER_SHAPES[name], np.float32) for name in other_names}
    tensors["text_model.embeddings.position_ids"] = np.arange(12, dtype=np.int64)[None]
    source = bpe.write(_write(tmp_path / "hf", tensors, class_name))
    config = convert.to_workdir("clip", source, tmp_path / "workdir")
    assert config.model.to_dict() == published_configs.CLIP_CONFIG.to_dict()
    _, loaded = published_files.restore(tmp_path / "workdir", "clip")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # The array that one class does not use is unexpected in another.
    tensors["visual_projection.weight"] = tensors["text_model.other"] = np.ones(3, np.float32)
    source = bpe.write(_write(tmp_path / "other_names", tensors, class_name))
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.to_workdir("clip", source, tmp_path / "other")
    assert "other (3,)" in str(error.value)
    assert ("visual_projection.weight" in str(error.value)) == (class_name != "CLIPModel")
    assert not (tmp_path / "other").exists()


def test_names_of_transformers_5_have_no_prefix(published, params):
    tensors = {name.removeprefix("text_model."): array for name, array in published.items()}
    tensors["embeddings.position_ids"] = np.zeros((1, 12), np.float32)
    loaded = convert.load("clip", tensors, published_configs.CLIP_CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tensors["text_model.final_layer_norm.bias"] = tensors.pop("final_layer_norm.bias")
    with pytest.raises(ValueError, match=r"missing \(1\): final_layer_norm.bias \(16,\)"):
        convert.load("clip", tensors, published_configs.CLIP_CONFIG)


def test_missing_fields_have_transformers_defaults(published, tmp_path):
    source = _write(tmp_path / "hf", published, "CLIPModel")
    config = {"architectures": ["CLIPModel"], "text_config": {"hidden_size": 1, "vocab_size": 9}}
    config["text_config_dict"] = {"hidden_size": 768, "num_attention_heads": 12}
    (source / "config.json").write_text(json.dumps(config))
    assert convert.clip.read_model_config(source).to_dict() == dict(
        name="clip",
        vocab_size=9,
        length=77,
        hidden_size=768,
        depth=12,
        num_heads=12,
        mlp_size=2048,
        activation="quick_gelu",
        dtype="float32",
    )


@pytest.mark.parametrize(
    ("class_name", "changes", "message"),
    [
        ("T5EncoderModel", {}, "the class T5EncoderModel, but only CLIPTextModel, CLIPText"),
        ("CLIPTextModel", {"hidden_act": "relu"}, "hidden_act='relu'; supported: quick_gelu, gelu"),
        ("CLIPTextModel", {"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06; supported: 1e-05"),
        ("CLIPModel", {"num_hidden_layers": None}, "num_hidden_layers=None; supported: a whole"),
        ("CLIPTextModel", {"num_hidden_layers": 4}, r"missing \(16\): encoder.layers.3.lay"),
        ("CLIPTextModel", {"num_hidden_layers": 2}, r"unexpected \(16\): encoder.layers.2"),
        ("CLIPTextModel", {"vocab_size": 534}, r"ids up to 534, but the text model has 534 tokens"),
    ],
)
def test_other_models_are_refused(published, tmp_path, class_name, changes, message):
    source = bpe.write(_write(tmp_path / "hf", published, class_name, **changes))
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("clip", source, tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("text_encoder/config.json", r"no .*config.json: it must be .* that transformers writes"),
        ("text_encoder/model.safetensors", "no model.safetensors or pytorch_model.bin in .*text_"),
        (
            "tokenizer/merges.txt",
            "no vocab.json with merges.txt, and no tokenizer.json, in .*text_",
        ),
    ],
)
def test_missing_files_are_named(text_encoder_dir, tmp_path, missing, message):
    (tmp_path / "sd" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert.to_workdir("clip", text_encoder_dir, tmp_path / "workdir")


def test_files_in_half_precision_are_suggested(text_encoder_dir, tmp_path):
    (text_encoder_dir / "model.safetensors").rename(text_encoder_dir / "model.fp16.safetensors")
    message = r"; model.fp16.safetensors is there: give a copy named model.safetensors, which is re"
    with pytest.raises(FileNotFoundError, match=message):
        convert.to_workdir("clip", text_encoder_dir, tmp_path / "workdir")
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint file at \S*{message}"):
        convert.tensor_files.read(text_encoder_dir / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at \S*other.safetensors\.$"):
        convert.tensor_files.read(text_encoder_dir / "other.safetensors")


def test_tokenizer_json_replaces_the_lists(text_encoder_dir, golden, tmp_path):
    directory = text_encoder_dir.parent / "tokenizer"
    (directory / "merges.txt").unlink()
    (directory / "tokenizer_config.json").write_text('{"pad_token": {"content": "<|endoftext|>"}}')
    text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 5, "!").save(directory / "tokenizer.json")
    tokenize = convert.clip.read_tokenizer(text_encoder_dir, published_configs.CLIP_CONFIG)
    np.testing.assert_array_equal(tokenize(["the cat's on", ""]), golden["tokens"][:2])
