"""Sizes and common properties of the UNet's variants; tests/convert compares its outputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import initial_params, random_params
from helpers.close import assert_close, assert_trees_close
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dit_jax import models, sharding
from dit_jax.models import options, unet_blocks, unet_presets

RUNTIME = dict(dtype="float32", attention="auto", remat="none")
TINY = dict(
    name="unet",
    input_size=8,
    in_channels=4,
    base_channels=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_levels=(1,),
    transformer_depth=1,
    num_heads=2,
    head_dim=0,
    context_size=12,
    time_scale_shift=False,
    resample="conv",
    norm_groups=4,
    norm_epsilon=1e-5,
    dropout=0.0,
    condition="context",
    num_classes=0,
    null_condition=True,
    **unet_presets.UNUSED_TEXT_FIELDS,
    learn_sigma=False,
    **RUNTIME,
)
ADM = TINY | dict(
    transformer_depth=0,
    num_heads=0,
    head_dim=8,
    context_size=0,
    time_scale_shift=True,
    resample="resnet",
    condition="label",
    num_classes=5,
    null_condition=False,
    learn_sigma=True,
)
LABELLED = TINY | dict(condition="label", num_classes=5)  # the transformers attend to a label
CAPTIONED = TINY | dict(condition="tokens", text_length=6, text_depth=1)
VARIANTS = {"latent": TINY, "adm": ADM, "labelled": LABELLED, "captioned": CAPTIONED}


def _build(fields, **changes):
    return models.build(ConfigDict(fields | changes))


def _shapes(model):
    return models.param_shapes(model)


def _random_params(model):
    return random_params(model, spread=0.1)


def _inputs(model, batch=4):
    rng = np.random.default_rng(1)
    size, channels = model.input_size, model.in_channels
    x_t = rng.standard_normal((batch, size, size, channels)).astype(np.float32)
    if model.condition == "context":
        cond = rng.standard_normal((batch, 3, model.context_size)).astype(np.float32)
    elif model.condition == "tokens":
        cond = rng.integers(0, 256, (batch, model.text_length), np.int32)
    else:
        cond = rng.integers(0, max(model.num_classes, 1), batch, np.int32)
    return x_t, rng.uniform(0, 999, batch).astype(np.float32), cond


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """(fields, model, random parameters, inputs, compiled apply)."""
    fields = VARIANTS[request.param]
    model = _build(fields)
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    return fields, model, _random_params(model), _inputs(model), apply


@pytest.mark.parametrize("fields", [TINY, ADM], ids=["latent", "adm"])
def test_initial_blocks_are_identities_and_the_output_is_zero(fields):
    model = _build(fields, channel_mult=(1,), attention_levels=())
    params = initial_params(model)
    assert not np.any(np.asarray(params["conv_out"]["kernel"]))
    out = jax.jit(model.apply)({"params": params}, *_inputs(model))
    assert out.shape == (4, 8, 8, 8 if model.learn_sigma else 4)
    assert not np.any(np.asarray(out))
    zeros = {"conv2", "conv_out", "proj_out" if model.transformer_depth else "to_out_0"}
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *_, module, kind = (key.key for key in path)
        if kind in ("kernel", "embedding"):
            assert np.any(np.asarray(leaf)) != (module in zeros), path
            seen.add(module)
    assert zeros < seen


def _make_jaxpr(model, **rngs):
    params = _shapes(model)
    return jax.make_jaxpr(lambda p, *x: model.apply({"params": p}, *x, rngs=rngs))(
        params, *_inputs(model)
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_acts_only_with_a_key(remat):
    with_dropout, without = (_build(ADM, dropout=rate, remat=remat) for rate in (0.5, 0.0))
    assert str(_make_jaxpr(with_dropout)) == str(_make_jaxpr(without))
    key = jax.random.key(0)
    # The residual blocks: 6 in the levels, 2 in the middle, and 2 for resampling.
    draws = str(_make_jaxpr(with_dropout, dropout=key)).count("name=_bernoulli")
    assert draws == 6 + 2 + 2
    assert str(_make_jaxpr(without, dropout=key)).count("name=_bernoulli") == 0


def test_dropout_depends_on_its_key():
    model = _build(ADM, dropout=0.5, channel_mult=(1,), attention_levels=())
    params, inputs = _random_params(model), _inputs(model)
    apply = jax.jit(lambda key: model.apply({"params": params}, *inputs, rngs={"dropout": key}))
    first, other, repeated = (apply(jax.random.key(i)) for i in (0, 1, 0))
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_array_equal(first, repeated)


@pytest.mark.slow
def test_bfloat16_returns_f32_near_the_f32_output(variant):
    fields, _, params, inputs, apply = variant
    bf16_out = jax.jit(_build(fields, dtype="bfloat16").apply)({"params": params}, *inputs)
    assert bf16_out.dtype == jnp.float32
    out = apply(params, *inputs)
    error = np.abs(bf16_out - out).max() / np.abs(out).max()
    assert 1e-5 < error < 0.05  # above 1e-5, so bfloat16 was used


@pytest.mark.slow
def test_remat_changes_neither_output_nor_gradient():
    def value_and_grad(remat):
        # With dropout, because a block computed again must drop the same values.
        model = _build(TINY, remat=remat, dropout=0.5)
        params, inputs, key = _random_params(model), _inputs(model), jax.random.key(0)

        def loss(params):
            out = model.apply({"params": params}, *inputs, rngs={"dropout": key})
            return jnp.mean(out**2)

        # The levels have 6 residual blocks and 3 transformers, the middle 2 and 1.
        jaxpr = str(jax.make_jaxpr(loss)(params))
        assert len(re.findall(r"(remat2?|checkpoint)\[", jaxpr)) == 12 * (remat != "none")
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_grad("none")
    for remat in ("dots", "full"):
        assert_trees_close(value_and_grad(remat), expected, 1e-4)


def test_time_and_condition_reach_every_output(variant):
    _, model, params, (x_t, t, cond), apply = variant
    out = apply(params, x_t, t, cond)
    assert out.shape == (4, 8, 8, 8 if model.learn_sigma else 4)
    for changed in ((x_t, (t + 500) % 1000, cond), (x_t, t, (cond + 1) % 5)):
        difference = np.abs(apply(params, *changed) - out).max(axis=(1, 2))
        assert difference.min() > 1e-3
    if model.condition == "context":  # a set: its order has no effect
        order = np.array([2, 0, 1])
        reordered = apply(params, x_t, t, cond[:, order])
        assert_close(reordered, out, 5e-6)
    if model.condition == "tokens":  # a sequence: its order has an effect
        assert np.abs(apply(params, x_t, t, cond[:, ::-1]) - out).max() > 1e-3


def test_norm_before_the_transformers_has_epsilon_1e_6():
    """With no transformer blocks and identity projections, only the norm remains."""
    block = unet_blocks.SpatialTransformer(0, 2, groups=4, dtype="float32", attention="xla")
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 4, 4, 8)).astype(np.float32)
    params = jax.jit(block.init)(jax.random.key(0), x, None)["params"]
    params |= {name: dict(params[name], kernel=jnp.eye(8)) for name in ("proj_in", "proj_out")}
    groups = x.reshape(2, 16, 4, 2)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = x + ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    out = jax.jit(block.apply)({"params": params}, x, None)
    assert_close(out, expected, 5e-6)


def test_unconditional_model_ignores_labels():
    model = _build(ADM, num_classes=0)
    assert "class_embedding" not in _shapes(model)
    jaxpr = _make_jaxpr(model).jaxpr
    *_, t, cond = jaxpr.invars
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    assert id(t) in used
    assert id(cond) not in used


@pytest.mark.parametrize(("null_condition", "num_embeddings"), [(False, 1000), (True, 1001)])
def test_null_class_adds_an_embedding(null_condition, num_embeddings):
    for fields, width in ((ADM, 4 * 16), (LABELLED, 12)):
        model = _build(fields, num_classes=1000, null_condition=null_condition)
        assert _shapes(model)["class_embedding"]["embedding"].shape == (num_embeddings, width)


MESHES = [
    dict(data=8, fsdp=1, tensor=1),
    dict(data=2, fsdp=4, tensor=1),
    dict(data=2, fsdp=2, tensor=2),
]
SHARDED = {
    "latent": TINY,
    "adm": ADM,
    "one level": TINY | dict(channel_mult=(1,), attention_levels=()),
}
# All axes at once, with one example on each shard, is the case that XLA got wrong in transformers.
QUICK = ("one level", MESHES[2])


def _loss_and_grads(fields, batch_size, mesh, devices=None):
    """Returns (loss, gradients), with parameters and gradients sharded as in training."""
    model = _build(fields)
    params, inputs = _random_params(model), _inputs(model, batch_size)
    mesh = sharding.make_mesh(mesh, devices)
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, sharding.with_shardings(mesh, _shapes(model))
    )
    batch = sharding.batch_sharding(mesh)

    def loss(params, *inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.mean(model.apply({"params": params}, *inputs) ** 2)

    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(shardings, batch, batch, batch),
        out_shardings=(sharding.replicated(mesh), shardings),
    )
    return jax.device_get(step(params, *inputs))


@functools.cache
def _loss_and_grads_on_one_device(name, batch_size):
    mesh = dict(data=1, fsdp=1, tensor=1)
    return _loss_and_grads(SHARDED[name], batch_size, mesh, jax.devices()[:1])


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[] if (name, mesh) == QUICK else pytest.mark.slow)
        for name in SHARDED
        for mesh in MESHES
        if name != "one level" or mesh == MESHES[2]
    ],
    ids=str,
)
def test_eight_devices_compute_the_loss_and_gradients_of_one(name, mesh):
    batch_size = mesh["data"] * mesh["fsdp"]
    actual = _loss_and_grads(SHARDED[name], batch_size, mesh)
    expected = _loss_and_grads_on_one_device(name, batch_size)
    assert_close(actual[0], expected[0], 1e-5)
    gradients = jax.tree_util.tree_leaves_with_path(expected[1])
    for a, (path, e) in zip(jax.tree.leaves(actual[1]), gradients, strict=True):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("to_k/bias"):
            # The softmax cancels a bias that all keys share, so its gradient is 0.
            assert max(np.abs(a).max(), np.abs(e).max()) < 1e-9
            continue
        assert_trees_close({path: a}, {path: e}, 1e-5)


@pytest.mark.parametrize("fields", [TINY, ADM], ids=["latent", "adm"])
def test_every_parameter_has_axes(fields, caplog):
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    shapes = sharding.with_shardings(mesh, _shapes(_build(fields, in_channels=2)))
    assert not [r for r in caplog.records if "no sharding for" in r.getMessage()]
    replicated = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if leaf.sharding.is_fully_replicated
    ]
    assert replicated == []
    if fields is TINY:
        attn = shapes["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]
        assert attn["to_q"]["kernel"].sharding.spec == P("fsdp", "tensor", None)
        assert attn["to_out_0"]["kernel"].sharding.spec == P("tensor", "fsdp")


# Parameters of diffusers' modules with the same sizes; LDM-4 also has 1001 label embeddings.
COUNTS = {
    "ddpm-cifar10": 35_746_307,
    "adm-imagenet64": 295_904_454,
    "adm-imagenet256": 553_838_086,
    "ldm4-imagenet256": 400_920_579 + 1001 * 512,
    "sd15-unet": 859_520_964,
    "sd2-unet": 865_910_724,
    "unet-tiny": 702_753,
}


QUICK_COUNTS = ("ddpm-cifar10", "unet-tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK_COUNTS)) for n in COUNTS]
)
def test_presets_have_the_published_parameter_counts(name):
    shapes = _shapes(_build(dict(name="unet", **unet_presets.get(name), **RUNTIME)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_error_for_an_unknown_preset_lists_the_names():
    assert COUNTS.keys() == unet_presets.PRESETS.keys()
    with pytest.raises(ValueError, match=r"unknown model 'sd3'; the names are ddpm-cifar10, adm"):
        unet_presets.get("sd3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(channel_mult=()), r"channel_mult=\(\) needs a number for each level"),
        (dict(blocks_per_level=0), r"blocks_per_level=0 must be a whole number in 1\.\.100"),
        (
            dict(input_size=9),
            r"input_size=9 must be a multiple of 2: .* has 2 levels",
        ),
        (dict(base_channels=15), "base_channels=15 must be even"),
        (dict(norm_groups=32), r"norm_groups=32 must divide .*, not \[16\]. .* channel_mult"),
        (dict(norm_groups=0), r"model.norm_groups=0 must be a whole number in 1..1048576"),
        (
            dict(attention_levels=(1, 2)),
            r"attention_levels=\(1, 2\) has \[2\]; .* 0..1, where 0",
        ),
        (dict(head_dim=8), "num_heads=2, head_dim=8: exactly one must not be 0"),
        (dict(num_heads=0), "num_heads=0, head_dim=0: exactly one must not be 0"),
        (dict(num_heads=3), r"num_heads=3, head_dim=0: .* must divide .* middle, \[32\]"),
        (dict(num_heads=0, head_dim=24), r"head_dim=24: .* must divide .* middle, \[32\]"),
        (dict(resample="fir"), "unknown resample='fir'; choose one of conv, resnet"),
        (
            dict(condition="text"),
            "unknown condition='text'; choose one of label, tokens, context",
        ),
        (
            dict(transformer_depth=0),
            "=0, condition='context', context_size=12, .*condition='label'",
        ),
        (dict(transformer_depth=0, condition="label", num_classes=5), "'label', context_size=12"),
        (dict(context_size=0), "transformer_depth=1, .*context_size=0, .*need context_size, 768"),
        (dict(condition="label"), "'label', .* num_classes=0: .*for labels num_classes"),
        (
            dict(condition="label", transformer_depth=0, context_size=0),
            "null_condition=True with num_classes=0",
        ),
        (dict(remat="some"), "remat='some'.*none, dots, full"),
        (dict(dtype="float8"), "dtype='float8'.*bfloat16"),
        (dict(dropout=1.0), r"dropout=1.0 must be a number in \[0, 1\)"),
        (dict(null_condition=0.1), "null_condition=0.1 must be a bool"),
        (dict(attention="flash"), "attention='flash'.*auto, xla, cudnn"),
        (dict(attention="cudnn"), "cudnn.*not an NVIDIA GPU"),
    ],
    ids=str,
)
def test_invalid_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _build(TINY, **change)


def test_cudnn_attention_is_used_in_levels_whose_head_size_allows_it(monkeypatch):
    """The first level has 24 channels per head; the second and the middle have 48."""

    def resolve(choice, dtype, head_dim):
        return "cudnn" if choice == "auto" and head_dim == 48 else "xla"

    monkeypatch.setattr(options, "resolve_attention", resolve)
    sizes = dict(base_channels=48, channel_mult=(1, 2, 2), attention_levels=(0, 1))
    for choice in ("auto", "cudnn"):
        assert _build(TINY, **sizes, attention=choice).attention == ("xla", "cudnn", "cudnn")
    assert _build(TINY, **sizes, attention="xla").attention == ("xla", "xla", "xla")


def test_channels_may_be_fractions_of_the_base():
    model = _build(TINY, channel_mult=[0.5, 1.25])  # a list, as in JSON
    assert model.widths == [8, 20]
    shapes = _shapes(model)
    assert shapes["conv_in"]["kernel"].shape == (3, 3, 4, 8)
    assert shapes["time_embedding"]["linear_1"]["kernel"].shape == (16, 64)


def test_inputs_with_wrong_sizes_are_refused():
    def apply(fields, x_t, cond):
        model = _build(fields)
        inputs = jnp.zeros(x_t), jnp.zeros(2), jnp.zeros(cond, int if len(cond) == 1 else float)
        jax.eval_shape(lambda p: model.apply({"params": p}, *inputs), _shapes(model))

    with pytest.raises(ValueError, match=r"\(2, 8, 16, 4\); the model takes \('B', 8, 8, 4\)"):
        apply(TINY, (2, 8, 16, 4), (2, 3, 12))
    with pytest.raises(ValueError, match=r"\(2, 3, 16\); .*context_size=12 takes \('B', 'M', 12\)"):
        apply(TINY, (2, 8, 8, 4), (2, 3, 16))
    with pytest.raises(ValueError, match=r"condition has shape \(2,\); .*condition='context'"):
        apply(TINY, (2, 8, 8, 4), (2,))
    with pytest.raises(ValueError, match=r"cond has shape \(2, 3, 12\); .*condition='label'"):
        apply(ADM, (2, 8, 8, 4), (2, 3, 12))
