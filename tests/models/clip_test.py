"""CLIP's text transformer against a recorded one of transformers."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from helpers import published_configs
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import convert, models
from dit_jax.convert import parameters
from dit_jax.models import clip
from dit_jax.sharding import axes


@pytest.fixture(scope="module")
def golden():
    """A tiny CLIPTextModel of transformers 5.23: parameters, tokens, and its last hidden states.

    'gelu' has the other activation, 'skipped' the final LayerNorm after the last layer but one.
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


def _changed(**changes):
    return ConfigDict(published_configs.CLIP_CONFIG.to_dict() | changes)


def _error(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hidden_states_are_the_recorded_ones(golden, params, activation):
    model = models.build(_changed(activation=activation))
    actual = jax.jit(model.apply)({"params": params}, golden["tokens"])
    assert actual.dtype == jnp.float32
    assert _error(actual, golden[activation]) < 1e-5
    other = "gelu" if activation == "quick_gelu" else "quick_gelu"
    assert _error(actual, golden[other]) > 1e-2


def test_tokens_see_themselves_and_those_before_them(golden, encode):
    tokens = golden["tokens"]
    before, changed = encode(tokens), tokens.copy()
    changed[:, 5] = 100
    after = encode(changed)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (np.abs(after[:, 5:] - before[:, 5:]).max(axis=-1) > 1e-3).all()


def test_fewer_tokens_are_the_beginning_of_more(golden, encode):
    expected = encode(golden["tokens"])[:, :7]
    assert_close(encode(golden["tokens"][:, :7]), expected, 1e-5)


def test_bfloat16_rounds_activations_not_parameters_nor_outputs(golden, params, encode):
    model = models.build(_changed(dtype="bfloat16"))
    shapes = models.param_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    actual = jax.jit(model.apply)({"params": params}, golden["tokens"])
    assert actual.dtype == jnp.float32
    assert 1e-4 < _error(actual, encode(golden["tokens"])) < 5e-2


def test_products_are_full_f32_whatever_the_default(golden, params):
    def products(dtype):
        model = models.build(_changed(dtype=dtype))
        with jax.default_matmul_precision("default"):
            jaxpr = jax.make_jaxpr(model.apply)({"params": params}, golden["tokens"])
        return [line for line in str(jaxpr).splitlines() if "precision=" in line]

    assert len(products("float32")) == 8  # q, k, v, logits, values, out; fc1, fc2
    assert all("HIGHEST" in line for line in products("float32"))
    assert not any("HIGHEST" in line for line in products("bfloat16"))


@pytest.mark.parametrize(
    ("name", "count"), [("clip-vit-l-14", 123_060_480), ("openclip-h", 340_387_840)]
)
def test_presets_have_the_published_counts(name, count):
    shapes = parameters.get_shapes(
        ConfigDict(clip.PRESETS[name] | dict(name="clip", dtype="float32"))
    )
    assert sum(map(math.prod, shapes.values())) == count


def test_initial_deviations_are_clip_s():
    config = _changed(hidden_size=64, mlp_size=256, depth=8, num_heads=4, length=77)
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


def test_table_of_axes_has_every_parameter():
    ranks = {
        path: len(shape)
        for path, shape in parameters.get_shapes(published_configs.CLIP_CONFIG).items()
    }
    assert ranks == {name: len(spec) for name, spec in axes.CLIP_AXES.items()}
    assert axes.CLIP_AXES.items() <= axes.PARAMETER_AXES.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide hidden_size=16"),
        ({"activation": "relu"}, "unknown activation='relu'; choose one of quick_gelu, gelu"),
        ({"dtype": "float16"}, "unknown dtype='float16'"),
        ({"depth": 0}, "depth=0 must be a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build(_changed(**changes))


@pytest.mark.parametrize(
    "tokens",
    [np.zeros((1, 13), np.int32), np.zeros((12,), np.int32), np.zeros((1, 12), np.float32)],
)
def test_other_tokens_are_refused(params, tokens):
    with pytest.raises(ValueError, match=r"takes \[B, M\] of int32, M up to 12"):
        models.build(published_configs.CLIP_CONFIG).apply({"params": params}, tokens)


def test_token_outside_the_vocabulary_is_seen(encode):
    assert np.isnan(encode(np.full((1, 2), 535, np.int32))).all()
