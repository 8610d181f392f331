"""CLIP's text transformer against a recording from transformers, and its import from files."""

import functools
import json
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS
from helpers import bpe, published_configs
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert, models, sharding
from dit_jax.convert import parameters
from dit_jax.data import text
from dit_jax.models import clip
from dit_jax.sharding import axes
from dit_jax.workdirs import checkpoint


@pytest.fixture(scope="module")
def golden():
    """A recorded CLIPTextModel of transformers 5.23: parameters "w/...", "tokens", and outputs.

    "quick_gelu" and "gelu" are the last hidden states with this activation. "skipped" is with
    quick_gelu too, but the final LayerNorm follows the last layer but one.
    """
    with np.load(GOLDENS / "clip_tiny_reference.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def published(golden):
    return {name.removeprefix("w/"): a for name, a in golden.items() if name.startswith("w/")}


@pytest.fixture(scope="module")
def params(published):
    return jax.tree.map(jnp.asarray, convert.load("clip", published, published_configs.CLIP_CONFIG))


@pytest.fixture(scope="module")
def encode(params):
    """encode(tokens): the hidden states of the recorded model."""
    apply = jax.jit(models.build(published_configs.CLIP_CONFIG).apply)
    return lambda tokens: np.asarray(apply({"params": params}, tokens))


def _change_config(**changes):
    return ConfigDict(published_configs.CLIP_CONFIG.to_dict() | changes)


def _error(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hidden_states_equal_the_recording(golden, params, activation):
    model = models.build(_change_config(activation=activation))
    actual = jax.jit(model.apply)({"params": params}, golden["tokens"])
    assert actual.dtype == jnp.float32
    assert _error(actual, golden[activation]) < 1e-5
    other = "gelu" if activation == "quick_gelu" else "quick_gelu"
    assert _error(actual, golden[other]) > 1e-2


def test_tokens_attend_to_themselves_and_earlier_tokens_alone(golden, encode):
    tokens = golden["tokens"]
    before, changed = encode(tokens), tokens.copy()
    changed[:, 5] = 100
    after = encode(changed)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (np.abs(after[:, 5:] - before[:, 5:]).max(axis=-1) > 1e-3).all()


def test_shorter_sequences_give_the_first_states_of_longer_ones(golden, encode):
    expected = encode(golden["tokens"])[:, :7]
    assert_close(encode(golden["tokens"][:, :7]), expected, 1e-5)


def test_bfloat16_rounds_activations_but_neither_parameters_nor_outputs(golden, params, encode):
    model = models.build(_change_config(dtype="bfloat16"))
    shapes = models.param_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    actual = jax.jit(model.apply)({"params": params}, golden["tokens"])
    assert actual.dtype == jnp.float32
    assert 1e-4 < _error(actual, encode(golden["tokens"])) < 5e-2


def test_f32_products_are_full_precision_under_any_default(golden, params):
    def list_products(dtype):
        model = models.build(_change_config(dtype=dtype))
        with jax.default_matmul_precision("default"):
            jaxpr = jax.make_jaxpr(model.apply)({"params": params}, golden["tokens"])
        return [line for line in str(jaxpr).splitlines() if "precision=" in line]

    assert len(list_products("float32")) == 8  # q, k, v, logits, values, out; fc1, fc2
    assert all("HIGHEST" in line for line in list_products("float32"))
    assert not any("HIGHEST" in line for line in list_products("bfloat16"))


@pytest.mark.parametrize(
    ("name", "count"), [("clip-vit-l-14", 123_060_480), ("openclip-h", 340_387_840)]
)
def test_presets_have_the_published_parameter_counts(name, count):
    shapes = parameters.get_shapes(
        ConfigDict(clip.PRESETS[name] | dict(name="clip", dtype="float32"))
    )
    assert sum(map(math.prod, shapes.values())) == count


def test_initial_deviations_equal_clip_s():
    config = _change_config(hidden_size=64, mlp_size=256, depth=8, num_heads=4, length=77)
    init = jax.jit(functools.partial(models.init_params, models.build(config)))
    params = init(jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    expected = {
        "embeddings_token_embedding/embedding": 0.02,
        "embeddings_position_embedding/embedding": 0.01,
        "encoder_layers/self_attn/q_proj/kernel": 1 / 8,
        "encoder_layers/self_attn/k_proj/kernel": 1 / 8,
        "encoder_layers/self_attn/v_proj/kernel": 1 / 8,
        "encoder_layers/self_attn/out_proj/kernel": 1 / 32,
        "encoder_layers/mlp/fc1/kernel": 1 / 128**0.5,
        "encoder_layers/mlp/fc2/kernel": 1 / 32,
    }
    for path, value in flat.items():
        if path in expected:
            assert np.std(value) == pytest.approx(expected.pop(path), rel=0.05), path
        else:
            np.testing.assert_array_equal(value, 1 if path.endswith("scale") else 0)
    assert not expected


def test_axes_table_has_every_parameter():
    ranks = {
        path: len(shape)
        for path, shape in parameters.get_shapes(published_configs.CLIP_CONFIG).items()
    }
    assert ranks == {name: len(spec) for name, spec in axes.CLIP_AXES.items()}
    assert axes.CLIP_AXES.items() <= sharding.PARAMETER_AXES.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide hidden_size=16"),
        ({"activation": "relu"}, "unknown activation='relu'; choose one of quick_gelu, gelu"),
        ({"dtype": "float16"}, "unknown dtype='float16'"),
        ({"depth": 0}, "depth=0 must be a whole number"),
    ],
)
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build(_change_config(**changes))


@pytest.mark.parametrize(
    "tokens",
    [np.zeros((1, 13), np.int32), np.zeros((12,), np.int32), np.zeros((1, 12), np.float32)],
)
def test_tokens_with_a_wrong_shape_or_dtype_are_refused(params, tokens):
    with pytest.raises(ValueError, match=r"takes \[B, M\] of int32, M up to 12"):
        models.build(published_configs.CLIP_CONFIG).apply({"params": params}, tokens)


def test_tokens_outside_the_vocabulary_give_nan(encode):
    assert np.isnan(encode(np.full((1, 2), 535, np.int32))).all()


# Shapes of a CLIPModel's arrays outside the text transformer.
UNUSED = {
    "vision_model.embeddings.class_embedding": (16,),
    "vision_model.embeddings.position_ids": (1, 5),
    "vision_model.encoder.layers.0.mlp.fc1.bias": (48,),
    "visual_projection.weight": (8, 16),
    "text_projection.weight": (8, 16),
    "logit_scale": (),
}


def _write(directory, arrays, class_name="CLIPTextModel", **changes):
    """Writes the arrays and a config as transformers does, and returns the directory."""
    directory.mkdir(parents=True)
    sizes = published_configs.CLIP | changes
    config = {"text_config": sizes} if class_name == "CLIPModel" else sizes
    (directory / "config.json").write_text(json.dumps({"architectures": [class_name]} | config))
    safetensors.numpy.save_file(arrays, directory / "model.safetensors")
    return directory


@pytest.fixture
def stable_diffusion(published, tmp_path):
    """The text model's folder in a pipeline of diffusers, with the tokenizer beside it."""
    bpe.write(tmp_path / "sd" / "tokenizer")
    (tmp_path / "sd" / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    return _write(tmp_path / "sd" / "text_encoder", published)


def _load(workdir):
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    return checkpoint.load_model(workdir, mesh, "float32", "clip")


def test_kernels_are_the_published_weights_transposed(params, published):
    layers = params["encoder_layers"]
    assert layers["self_attn"]["k_proj"]["kernel"].shape == (3, 16, 16)
    for value, name in (
        (layers["self_attn"]["k_proj"]["kernel"][1, 5, 9], "layers.1.self_attn.k_proj.weight"),
        (layers["mlp"]["fc2"]["kernel"][2, 5, 9], "layers.2.mlp.fc2.weight"),
    ):
        assert value == published[f"text_model.encoder.{name}"][9, 5]


def test_converted_workdir_has_parameters_config_and_tokenizer(stable_diffusion, golden, tmp_path):
    config = convert.to_workdir("clip", stable_diffusion, tmp_path / "workdir")
    assert config.model.to_dict() == published_configs.CLIP_CONFIG.to_dict()
    tokenizer = text.load_tokenizer(tmp_path / "workdir")
    assert (tokenizer.length, tokenizer.vocab_size) == (12, 535)
    tokens = tokenizer(["the cat's on", ""])
    np.testing.assert_array_equal(tokens[:, 5:], [[534] + [0] * 6, [0] * 7])  # pad "!"
    padded_with_end = np.where(tokens == 0, 534, tokens)
    np.testing.assert_array_equal(padded_with_end, golden["tokens"][:2])
    model, params = _load(tmp_path / "workdir")
    actual = jax.jit(model.apply)({"params": params}, padded_with_end)
    assert _error(actual, golden["quick_gelu"][:2]) < 1e-5


@pytest.mark.parametrize(
    ("tokenizer_config", "special_tokens", "pad"),
    [
        ({"pad_token": text.END}, {"pad_token": "!"}, "!"),
        ({"pad_token": "!"}, {"eos_token": text.END}, "!"),
        ({"pad_token": {"content": "!"}, "added_tokens_decoder": {}}, {"pad_token": text.END}, "!"),
        (None, {"pad_token": {"content": "!"}}, "!"),
        (None, None, text.END),
    ],
)
def test_padding_token_is_read_from_the_tokenizer_files(
    tokenizer_config, special_tokens, pad, tmp_path
):
    """special_tokens_map.json takes precedence, unless the config has added_tokens_decoder."""
    bpe.write(tmp_path)
    if tokenizer_config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if special_tokens is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    tokenizer = convert.clip.read_tokenizer(tmp_path, published_configs.CLIP_CONFIG)
    assert tokenizer([""])[0, -1] == bpe.VOCAB[pad]


def test_skip_layers_omits_the_last_layers(golden, run_command, stable_diffusion, tmp_path):
    workdir = tmp_path / "workdir"
    out = run_command("convert", "clip", stable_diffusion, workdir, "--skip_layers=1")
    assert out == f"{workdir}: {json.dumps(_change_config(depth=2).to_dict())}\n"
    assert text.load_tokenizer(workdir).length == 12
    model, params = _load(workdir)
    actual = jax.jit(model.apply)({"params": params}, golden["tokens"])
    assert _error(actual, golden["skipped"]) < 1e-5
    for skip_layers in (3, -1):
        with pytest.raises(
            ValueError, match=rf"{skip_layers=} must be in 0..2: .*config.json has 3"
        ):
            convert.to_workdir("clip", stable_diffusion, tmp_path / "none", skip_layers=skip_layers)


@pytest.mark.parametrize(
    ("class_name", "unused"),
    [
        ("CLIPTextModel", {}),
        ("CLIPTextModelWithProjection", {"text_projection.weight"}),
        ("CLIPModel", UNUSED.keys()),
    ],
)
def test_every_clip_class_may_have_its_own_unused_arrays_and_no_others(
    class_name, unused, published, params, tmp_path
):
    arrays = published | {name: np.ones(UNUSED[name], np.float32) for name in unused}
    arrays["text_model.embeddings.position_ids"] = np.arange(12, dtype=np.int64)[None]
    source = bpe.write(_write(tmp_path / "hf", arrays, class_name))
    config = convert.to_workdir("clip", source, tmp_path / "workdir")
    assert config.model.to_dict() == published_configs.CLIP_CONFIG.to_dict()
    _, loaded = _load(tmp_path / "workdir")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # visual_projection.weight is unused in CLIPModel, but unexpected in the other classes.
    arrays["visual_projection.weight"] = arrays["text_model.other"] = np.ones(3, np.float32)
    source = bpe.write(_write(tmp_path / "unexpected", arrays, class_name))
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.to_workdir("clip", source, tmp_path / "other")
    assert "other (3,)" in str(error.value)
    assert ("visual_projection.weight" in str(error.value)) == (class_name != "CLIPModel")
    assert not (tmp_path / "other").exists()


def test_names_without_the_prefix_are_read_if_no_name_has_it(published, params):
    """transformers 5 writes names without the prefix text_model."""
    arrays = {name.removeprefix("text_model."): array for name, array in published.items()}
    arrays["embeddings.position_ids"] = np.zeros((1, 12), np.float32)
    loaded = convert.load("clip", arrays, published_configs.CLIP_CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    arrays["text_model.final_layer_norm.bias"] = arrays.pop("final_layer_norm.bias")
    with pytest.raises(ValueError, match=r"missing \(1\): final_layer_norm.bias \(16,\)"):
        convert.load("clip", arrays, published_configs.CLIP_CONFIG)


def test_sizes_missing_from_the_config_default_to_those_of_transformers(published, tmp_path):
    source = _write(tmp_path / "hf", published, "CLIPModel")
    config = {"architectures": ["CLIPModel"], "text_config": {"hidden_size": 1, "vocab_size": 9}}
    config["text_config_dict"] = {"hidden_size": 768, "num_attention_heads": 12}
    (source / "config.json").write_text(json.dumps(config))
    assert convert.clip.read_config(source).to_dict() == dict(
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
        ("CLIPTextModel", {"vocab_size": 534}, r"ids up to 534, but the text model 534 tokens"),
    ],
)
def test_unsupported_models_are_refused(published, tmp_path, class_name, changes, message):
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
def test_errors_name_missing_files(stable_diffusion, tmp_path, missing, message):
    (tmp_path / "sd" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert.to_workdir("clip", stable_diffusion, tmp_path / "workdir")


def test_error_for_a_missing_checkpoint_names_its_variants(stable_diffusion, tmp_path):
    folder = stable_diffusion
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    message = r"; model.fp16.safetensors is there: give a copy named model.safetensors, which is re"
    with pytest.raises(FileNotFoundError, match=message):
        convert.to_workdir("clip", folder, tmp_path / "workdir")
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint file at \S*{message}"):
        convert.tensor_files.read(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at \S*other.safetensors\.$"):
        convert.tensor_files.read(folder / "other.safetensors")


def test_tokenizer_json_is_read_if_merges_txt_is_missing(stable_diffusion, golden, tmp_path):
    folder = stable_diffusion.parent / "tokenizer"
    (folder / "merges.txt").unlink()
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "<|endoftext|>"}}')
    text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 5, "!").save(folder / "tokenizer.json")
    tokenizer = convert.clip.read_tokenizer(stable_diffusion, published_configs.CLIP_CONFIG)
    np.testing.assert_array_equal(tokenizer(["the cat's on", ""]), golden["tokens"][:2])
