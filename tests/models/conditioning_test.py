"""Kinds of conditions: networks take a new kind without change, and refuse an unknown one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from ml_collections import ConfigDict

from dit_jax import conditions, models
from dit_jax.models import blocks, conditioning, unet_presets


class Depth(conditioning.Kind):
    """A map [B, h, w, 1] beside x_t."""

    def example(self, model):
        return jnp.zeros((1, model.input_size, model.input_size, 1))

    def join(self, model, x_t, cond):
        return jnp.concatenate([x_t, cond], axis=-1)


@pytest.fixture(params=[*blocks.BLOCKS, "unet"])
def config(request, golden_model_config):
    """Of a small network without classes."""
    if request.param == "unet":
        fields = unet_presets.get("unet-tiny") | {"name": "unet", "dtype": "float32"}
        config = ConfigDict(fields | {"attention": "xla", "remat": "none"})
    else:
        config = golden_model_config.copy_and_resolve_references()
        config.update(block=request.param, depth=1)
    config.update(num_classes=0, null_condition=False)
    return config


def test_a_new_kind_needs_no_change_of_the_networks(config, monkeypatch):
    monkeypatch.setitem(conditioning.KINDS, "depth", Depth())
    config.condition = "depth"
    model = models.build(config)
    params = random_params(model)
    size, channels = model.input_size, model.in_channels
    rng = np.random.default_rng(0)
    x_t = rng.standard_normal((2, size, size, channels)).astype(np.float32)
    depth = rng.standard_normal((2, size, size, 1)).astype(np.float32)
    apply = jax.jit(lambda cond: model.apply({"params": params}, x_t, np.ones(2), cond))
    difference = np.abs(apply(depth) - apply(-depth)).max(axis=(1, 2, 3))
    assert difference.min() > 1e-3
    counts = models.count(ConfigDict({"model": config, "data": {"image_size": size}}))
    assert counts["params"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_an_unknown_kind_is_refused(config):
    config.condition = "depth"
    message = "unknown condition='depth'; choose one of label, tokens, context"
    with pytest.raises(ValueError, match=message):
        models.build(config)


def test_every_condition_has_its_part_in_the_networks():
    assert conditions.KINDS.keys() == conditioning.KINDS.keys()


def test_labels_of_another_shape_are_refused(config):
    config.update(num_classes=3)
    model = models.build(config)
    x_t, t, label = model.example_inputs()
    with pytest.raises(ValueError, match=r"cond has shape \(1, 1\); .*condition='label' takes"):
        jax.eval_shape(model.init, jax.random.key(0), x_t, t, label[:, None])
